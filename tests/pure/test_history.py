"""The cost of history: an epoch costs the same after 100,000 others, in every file and every message."""

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.errors import RunStopped, SlQueueError
from sl_queue.protocol.codec import encode
from sl_queue.protocol.control import EpochDone, EpochResult, Epochs, Join, Message, Open, Progress, Status, kind_of
from sl_queue.protocol.history import NEWEST, PAGE, History
from sl_queue.protocol.messages import SCHEDULER, Header, MicroBatch
from sl_queue.protocol.scheduler.reducer import reduce
from sl_queue.protocol.scheduler.state import EarlyStopping, Plan, RunState
from sl_queue.protocol.scheduler.status import as_json, describe
from tests.contract.test_scheduling import again, ask_to_stop
from tests.support.toy_run import CrashAt, ToyRun

JOB: dict[str, Any] = {"name": "toy"}
PARTIES = ("a", "label")
EARLY = EarlyStopping("loss", 10**9, 0.0, lower_is_better=True)


def epoch(number: int) -> EpochResult:
    return EpochResult(number, number, 0.3571234567890123, {"loss": 0.5, "auroc": None}, 0.25)


def size(message: Message) -> int:
    return len(encode(Header("r", 0, kind_of(message), "label", SCHEDULER, MicroBatch(0, 0)), message))


def plan(epochs: int) -> Plan:
    return Plan(JOB, "label", ("a",), epochs, patience_s=1.0, early_stopping=EARLY)


def running(epochs: int) -> RunState:
    """Return a run that has just begun."""
    state = RunState()
    for party in PARTIES:
        joined = Join(f"{party}1", JOB, 10, "d", "integer", None, 0, ())
        state, _ = reduce(plan(epochs), state, party, joined, 0.0, "r")
    return state


# The value ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["after", "until", "first", "branch"]), st.integers(0, 12)), max_size=40))
def test_a_history_is_a_list_that_never_changes_whatever_is_made_of_it(story: list[tuple[str, int]]) -> None:
    history, model = History(), list[EpochResult]()
    older = [(history, list(model))]
    for what, number in story:
        match what:
            case "after":
                history, model = history.after(epoch(number)), [*model, epoch(number)]
            case "first":
                history, model = history.first(number), model[:number]
            case "branch":
                history, model = older[number % len(older)]
                model = list(model)
            case _:
                while model and model[-1].step > number:
                    model.pop()
                history = history.until(number)
        older.append((history, list(model)))
    for kept, expected in older:
        assert list(kept) == expected
        assert kept == History.of(expected)
        assert list(kept.newest(3)) == expected[-3:]


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_two_histories_have_in_common_what_both_begin_with(ours: list[int], theirs: list[int]) -> None:
    both = [a == b for a, b in zip(ours, theirs, strict=False)]
    expected = both.index(False) if False in both else len(both)
    assert History.of(map(epoch, ours)).in_common(History.of(map(epoch, theirs))) == expected


# Messages -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_collector")
def test_each_of_thousands_of_epochs_costs_the_same_time_and_bytes() -> None:
    n_epochs, told, clock = 6_000, dict[int, int](), [time.thread_time()]
    rules, state = plan(n_epochs), running(n_epochs)
    for number in range(n_epochs):
        state, orders = reduce(rules, state, "label", EpochDone("label1", 0, epoch(number)), 1.0, "r")
        state, _ = reduce(rules, state, "label", Progress("label1", 0, number, (number,)), 1.0, "r")
        if number in (n_epochs // 2 - 1, n_epochs - 1):
            clock.append(time.thread_time())
        if number in (200, n_epochs - 2):
            joined = Join("label1", JOB, 10, "d", "integer", "r", 0, (1,), state.history.newest())
            messages = [order for _, order in orders] + [Status(as_json(describe(rules, state, 1.0, 0.0))), joined]
            told[number] = sum(map(size, messages))
    assert len(state.history) == n_epochs
    assert state.standing.best == epoch(0)
    first_half, second_half = clock[1] - clock[0], clock[2] - clock[1]
    assert second_half < 2 * first_half + 0.1, "linear: a growing cost would make it three times"
    first, last = told.values()
    assert last < first + 500, "no more than longer numbers"
    assert size(Status(as_json(describe(rules, state, 1.0, 0.0)))) < 10_000


def test_a_status_shows_the_last_few_epochs_and_how_many_there_are() -> None:
    state = replace(running(100), history=History.of(map(epoch, range(50))))
    status = describe(plan(100), state, 0.0, 0.0)
    assert status.epoch == 50
    assert [done.epoch for done in status.history] == list(range(50 - NEWEST, 50))


def test_a_page_of_epochs_fits_into_a_message_and_a_party_that_lacks_some_gets_the_next() -> None:
    history = History.of(map(epoch, range(1_000)))
    assert size(Epochs("label1", 0, history.page(0))) < 64 * 1024
    assert [result.epoch for result in history.page(150)] == list(range(150, 150 + PAGE))
    assert [result.epoch for result in history.page(999)] == [999]
    assert history.page(1_000) == ()
    assert History.of(map(epoch, range(7, 9))).page(3) == (), "those are not here"


def test_a_scheduler_that_lacks_epochs_asks_until_it_knows_them_all() -> None:
    rules, state = plan(1_000), running(1_000)
    history = History.of(map(epoch, range(500)))
    state, orders = reduce(rules, state, "label", EpochDone("label1", 0, epoch(500)), 1.0, "r")
    asked = []
    while orders:
        ((_, question),) = [(party, order) for party, order in orders if party == "label"]
        assert isinstance(question, Open) and question.known == len(state.history)
        asked.append(question.known)
        page = Epochs("label1", 0, history.page(question.known))
        state, orders = reduce(rules, state, "label", page, 1.0, "r") if page.results else (state, ())
    assert asked == [0, 200, 400, 500]
    assert state.history == history


# Whole runs ---------------------------------------------------------------------------------------------------


def told(run: ToyRun) -> list[tuple[int, float, Any]]:
    assert run.state is not None
    return [(e.epoch, e.loss, e.holdout) for e in run.state.history]


class AfterEpochs(CrashAt):
    """Crashes at the operation that comes so many operations after so many epochs."""

    def __init__(self, run: ToyRun, epochs: int, operation: int = 0, **more: Any) -> None:
        CrashAt.__init__(self, operation, **more)
        self.run, self.epochs = run, epochs

    def __call__(self, name: str) -> None:
        if len(self.run.journal.history) >= self.epochs:
            CrashAt.__call__(self, name)


@pytest.mark.parametrize("early", [None, EarlyStopping("loss", 2, 0.0, lower_is_better=True)], ids=["all", "early"])
@pytest.mark.parametrize("operation", range(0, 24, 4))
def test_a_scheduler_that_loses_its_folder_learns_the_whole_history_again(
    operation: int, early: EarlyStopping | None
) -> None:
    quiet = ToyRun(epochs=6, early_stopping=early).run()
    run = ToyRun(epochs=6, early_stopping=early)

    def lose() -> None:
        run.ledger.state = None

    crash = AfterEpochs(run, 1 + operation % 4, operation, act=lose)
    run.crashes = {SCHEDULER: crash}
    run.run()
    assert crash.count > operation
    assert run.weights() == quiet.weights()
    assert told(run) == told(quiet)


def test_a_history_of_more_than_a_page_is_told_again_page_by_page() -> None:
    shape = {"n_rows": 4, "batch_size": 4, "micro_batches": 1, "depth": 1, "holdout": 0.0, "patience_s": 5.0}
    run = ToyRun(epochs=PAGE + 40, **shape)
    lost: list[int] = []

    def lose() -> None:
        run.ledger.state = None
        lost.append(len(run.journal.history))

    run.crashes = {SCHEDULER: AfterEpochs(run, PAGE + 20, act=lose)}
    run.run()
    assert lost and lost[0] < run.epochs
    assert [number for number, _, _ in told(run)] == list(range(PAGE + 40))
    assert list(run.journal.history) == [replace(e, seconds=0.0) for e in run.state.history] if run.state else False


def stopped() -> ToyRun:
    """Return a run of six epochs that was stopped after some."""
    run = ToyRun(epochs=6)
    run.crashes = {"label": AfterEpochs(run, 2, act=lambda: ask_to_stop(run), survives=True)}
    with pytest.raises(RunStopped):
        run.run()
    assert 0 < len(run.journal.history) < 6
    return run


def test_checkpoints_of_the_version_before_that_hold_the_history_are_read() -> None:
    quiet, run = ToyRun(epochs=6).run(), stopped()
    store = run.stores["label"]
    for step, saved in store.saved.items():
        epochs = [
            {"epoch": e.epoch, "step": e.step, "loss": e.loss, "holdout": dict(e.holdout or {})}
            for e in run.journal.history.until(step)
        ]
        store.saved[step] = replace(saved, values={"epochs": epochs, "running": saved.values["running"]})
    run.journal.history, run.ledger.state = History(), None
    resumed = again(run).run()
    assert told(resumed) == told(quiet)
    assert resumed.weights() == quiet.weights()
    assert len(run.journal.history) == 6, "written to the file of its own from then on"


def test_a_label_holder_that_lost_the_history_that_the_scheduler_lacks_says_so() -> None:
    run = stopped()
    run.journal.history, run.ledger.state = History(), None
    with pytest.raises(SlQueueError, match=r"restore history\.jsonl"):
        again(run).run()


def test_a_label_holder_that_lost_its_history_goes_on_where_the_scheduler_knows_it() -> None:
    quiet, run = ToyRun(epochs=6).run(), stopped()
    run.journal.history = History()
    resumed = again(run).run()
    assert told(resumed) == told(quiet)
    assert resumed.weights() == quiet.weights()

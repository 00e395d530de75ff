"""Beginning, opening, stopping and ending a run: with real roles and channels, and a scheduler that may be gone."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import pytest

from sl_queue.errors import CheckpointError, PeerFailed, PeerSilent, RunStopped, SlQueueError
from sl_queue.protocol.codec import encode
from sl_queue.protocol.control import Failed, Finished, Join, Report, StopRequest
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Header, Kind, MicroBatch
from sl_queue.protocol.scheduler.state import EarlyStopping, Phase, RunState
from sl_queue.transport.memory import MemoryBroker
from tests.support.toy import ToyStage
from tests.support.toy_run import AtLast, AtOnce, Crash, CrashAt, FaultyCheckpoints, ToyRun
from tests.support.waiting import await_that


def report(broker: MemoryBroker, sender: str, report: Report) -> None:
    """Put a report into the scheduler's queue."""
    header = Header("", 0, Kind.REPORT, sender, SCHEDULER, MicroBatch(0, 0))
    broker.publish(SCHEDULER, sender, encode(header, report), persistent=True, expires=False)


def ask_to_stop(run: ToyRun) -> None:
    """Ask for a stop as the operator does: the scheduler that runs now, and again the next one, until it is taken."""

    def is_taken() -> bool:
        report(run.broker, OPERATOR, StopRequest(run.scheduler))
        return run.ledger.state is not None and run.ledger.state.phase in (Phase.STOPPING, Phase.STOPPED)

    await_that(is_taken)


def test_what_workers_of_another_job_or_run_left_in_the_queues_misleads_no_scheduler() -> None:
    run = ToyRun()
    for party in run.topology.parties:
        report(run.broker, party, Join("gone", {"name": "other"}, 5, "d", "text", "old", 3, (7,), to="gone"))
        report(run.broker, party, Failed("gone", "ComputeError", "of long ago"))
        report(run.broker, party, Finished("gone", {}))
    assert run.run().weights() == ToyRun().run().weights()
    assert run.state is not None
    assert (run.state.generation, run.state.run) != (3, "old")


@pytest.mark.parametrize("lower_is_better", [True, False], ids=["lower", "higher"])
@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_leaves_every_party_with_the_weights_of_a_run_of_just_the_best_epochs(
    patience: int, lower_is_better: bool
) -> None:
    early = EarlyStopping("loss", patience, 0.0, lower_is_better)
    run = ToyRun(epochs=12, early_stopping=early).run()
    assert run.state is not None
    losses = [(result.holdout or {}).get("loss") or 0.0 for result in run.state.history]
    best = losses.index(min(losses) if lower_is_better else max(losses))
    assert best + patience + 1 == len(losses) < 12, "it ends after `patience` epochs without a gain"
    assert run.weights() == ToyRun(epochs=best + 1).run().weights()
    assert {store.final.step for store in run.stores.values()} == {run.state.history[best].step}


def again(run: ToyRun, **changes: Any) -> ToyRun:
    """Return the same state folders and broker, with every worker started again."""
    return replace(run, errors=[], crashes={}, stages={}, counts={}, **changes)


@pytest.mark.parametrize("what", [CheckpointError("no room"), MemoryError("no room")], ids=["disk", "bug"])
def test_a_checkpoint_that_fails_while_a_stop_comes_is_told_and_no_stop(what: Exception) -> None:
    """A party that stops with its last checkpoint unwritten would end with exit code 0, and nobody would know."""
    under_way = threading.Event()

    def committer() -> Executor | None:
        """Have b commit in line, so that a waits for a gradient while it commits: b's next activation never comes."""
        return AtOnce() if threading.current_thread().name == "b-main" else None

    run = ToyRun(epochs=6, checkpoint_every=1, committer=committer)

    def has_failed() -> bool:
        return run.ledger.state is not None and run.ledger.state.phase is Phase.FAILED

    class Disk(FaultyCheckpoints):
        def __init__(self, fail: Callable[[], None]) -> None:
            super().__init__()
            self.fail = fail

        def save(self, *args: Any, **kwargs: Any) -> None:
            if len(self.steps()) == 2:
                self.fail()
            super().save(*args, **kwargs)

    def after_the_stop() -> None:
        under_way.set()
        await_that(has_failed)
        time.sleep(0.1)  # if the order comes later, the test only proves less
        raise what

    def before_it() -> None:
        assert under_way.wait(10.0)
        raise CheckpointError("boom")

    run.stores |= {"a": Disk(after_the_stop), "b": Disk(before_it)}
    with pytest.raises(SlQueueError):
        run.run()
    told = [error for error in run.errors if not isinstance(error, RunStopped)]
    assert {text for text in ("boom", "no room") if any(text in str(error) for error in told)} == {"boom", "no room"}


@pytest.mark.parametrize("operation", range(8, 100, 7))
@pytest.mark.parametrize("committer", [AtOnce, AtLast])
def test_a_stop_while_a_checkpoint_is_written_means_that_checkpoint(committer: Any, operation: int) -> None:
    run = ToyRun(epochs=6, micro_batches=1, depth=1, checkpoint_every=1, committer=committer)

    def stop_it() -> None:
        ask_to_stop(run)

    run.crashes = {"label": CrashAt(operation, act=stop_it, survives=True)}
    with pytest.raises(RunStopped):
        run.run()
    assert len({run.newest(party) for party in run.stores}) == 1, "after the same step"


def test_final_weights_that_are_lost_after_the_end_are_written_again() -> None:
    run = ToyRun().run()
    weights = run.weights()
    for party in ("a", "label"):
        run.stores[party].final = run.stores[party].final_weights = None
    assert again(run, late_s=5.0).run().weights() == weights


def test_a_state_that_is_lost_after_the_end_is_said_to_be_and_nobody_waits() -> None:
    run = ToyRun().run()
    del run.stores["a"]
    with pytest.raises(CheckpointError, match="they are lost; to train from scratch"):
        again(run, late_s=2.0, patience_s=6000.0).run()  # who waited for a peer would not end within the test's time


def test_a_stop_that_was_meant_for_an_earlier_scheduler_stops_nobody() -> None:
    run = ToyRun()
    report(run.broker, OPERATOR, StopRequest("another"))
    assert run.run().weights() == ToyRun().run().weights()


@pytest.mark.parametrize("killed", [None, "a", "label", SCHEDULER])
@pytest.mark.parametrize("operation", range(8, 180, 20))
def test_a_run_that_is_stopped_ends_everywhere_after_one_step_and_resumes_to_equal_weights(
    operation: int, killed: str | None
) -> None:
    run = ToyRun(epochs=6)
    committed: list[int] = []  # by the label holder when the stop was asked for

    def stop_it() -> None:
        committed.append(run.newest("label"))
        ask_to_stop(run)

    stop = CrashAt(operation, act=stop_it, survives=True)
    run.crashes = {"label": stop} if killed != "label" else {"b": stop}

    def has_not_told_that_it_stopped(role: str, state: RunState) -> bool:
        """Whoever is killed after that and started again waits for a scheduler that has ended."""
        if role == "label":
            return [run.newest(role)] == committed
        return role == SCHEDULER or state.stop_after is None or run.newest(role) < state.stop_after

    class CrashWhileStopping(CrashAt):
        def __call__(self, name: str) -> None:
            state = run.ledger.state
            if state is not None and state.phase is Phase.STOPPING and has_not_told_that_it_stopped(str(killed), state):
                CrashAt.__call__(self, name)

    if killed is not None:
        run.crashes[killed] = CrashWhileStopping(operation // 20)
    with pytest.raises(RunStopped, match="stopped by the operator"):
        run.run()
    assert [type(error) for error in run.errors] == [RunStopped] * 4, "every role ends, and says why"
    assert len({run.newest(party) for party in run.stores}) == 1, "after the same step"
    assert run.ledger.state is not None
    assert run.ledger.state.phase is Phase.STOPPED
    told = [result.step for result in run.ledger.state.history]
    assert told == [result.step for result in run.journal.history], "what is measured is told"
    assert again(run).run().weights() == ToyRun(epochs=6).run().weights()


def test_nobody_needs_the_scheduler_while_it_is_dead_for_a_whole_epoch() -> None:
    quiet = ToyRun(epochs=3).run()
    run = ToyRun(epochs=3)
    last_step = run.pipeline.batches.last_step
    lives: list[str] = []

    class CrashInTheFirstEpoch(CrashAt):
        def __call__(self, name: str) -> None:
            if len(lives) == 1 and run.newest("label") > -1:
                raise Crash(name)

    class WaitForThatCrash(CrashAt):
        def __call__(self, name: str) -> None:
            if run.newest("label") > -1:
                await_that(lambda: len(lives) > 1)

    def stay_dead(role: str, link: Any) -> None:
        if role == SCHEDULER:
            lives.append(role)
            if len(lives) == 2:
                await_that(lambda: run.newest("label") >= last_step(1))

    run.on_start = stay_dead
    run.crashes = {SCHEDULER: CrashInTheFirstEpoch(), "label": WaitForThatCrash()}
    run.run()
    assert len(lives) == 2
    assert run.weights() == quiet.weights()
    assert run.state is not None
    assert quiet.state is not None
    assert [e.loss for e in run.state.history] == [e.loss for e in quiet.state.history]
    assert all(len(stages) == 1 for stages in run.stages.values()), "nobody else was started again"


def test_a_worker_that_fails_ends_every_other_with_its_reason() -> None:
    class Failing(ToyStage):
        def update(self) -> float:
            raise ZeroDivisionError("in the user's optimizer")

    run = ToyRun(stage=lambda party: Failing(party) if party == "b" else ToyStage(party))
    with pytest.raises(BaseException, match="ZeroDivisionError: in the user's optimizer"):
        run.run()
    assert sorted(type(e).__name__ for e in run.errors) == ["ComputeError", "PeerFailed", "PeerFailed", "PeerFailed"]


def fail_while_the_label_holder_is_gone(patience_s: float, until_it_may_come_back: Callable[[ToyRun], bool]) -> ToyRun:
    """Have the label holder die at its first commit, and "b" fail in that step before it is there again."""
    run = ToyRun(patience_s=patience_s)
    lives: list[str] = []

    class Failing(ToyStage):
        def update(self) -> float:
            if not self.weights_:
                return super().update()
            await_that(lambda: len(lives) == 2)
            raise ZeroDivisionError("in the user's optimizer")

    class CrashAtCommit(CrashAt):
        def __call__(self, name: str) -> None:
            if name == "after save" and len(lives) == 1:
                raise Crash(name)

    def stay_dead(role: str, link: Any) -> None:
        if role == "label":
            lives.append(role)
            await_that(lambda: len(lives) == 1 or until_it_may_come_back(run))

    run.stage = lambda party: Failing(party) if party == "b" else ToyStage(party)
    run.crashes = {"label": CrashAtCommit()}
    run.on_start = stay_dead
    with pytest.raises(SlQueueError):
        run.run()
    return run


def test_who_is_started_again_just_as_the_run_fails_is_told_as_well() -> None:
    run = fail_while_the_label_holder_is_gone(
        10.0, lambda run: run.ledger.state is not None and run.ledger.state.phase is Phase.FAILED
    )
    assert sorted(type(e).__name__ for e in run.errors) == ["ComputeError", "PeerFailed", "PeerFailed", "PeerFailed"]


def test_a_scheduler_of_a_run_that_failed_waits_for_nobody_longer_than_a_patience() -> None:
    run = fail_while_the_label_holder_is_gone(0.3, lambda run: len(run.errors) == 3)
    assert isinstance(run.errors[3], PeerSilent), "it came when the scheduler had gone"
    assert isinstance(run.errors[2], PeerFailed), "and the scheduler was the last of the others"

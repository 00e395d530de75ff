"""The scheduler's reducer: whatever arrives in whatever order, a run begins when all agree and ends when all have."""

from collections.abc import Callable
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.protocol.control import (
    Alive,
    EpochDone,
    EpochResult,
    Failed,
    Finish,
    Finished,
    Lost,
    Open,
    Progress,
    Report,
    Start,
    Stop,
    Stopped,
    StopRequest,
    Waiting,
)
from sl_queue.protocol.messages import OPERATOR, Kind
from sl_queue.protocol.party.orders import Orders
from sl_queue.protocol.scheduler.agreement import differing_keys
from sl_queue.protocol.scheduler.epochs import best_epoch
from sl_queue.protocol.scheduler.state import (
    GIVE_UP,
    EarlyStopping,
    Phase,
    RunState,
    durable,
    history_line,
    missing,
    restarted,
    silent,
    untold,
)
from tests.support.progress import JOB, PARTIES, STEPS, Mind, decide, epoch, joined, plan

# Joining ------------------------------------------------------------------------------------------------------


def test_the_run_starts_when_the_last_party_has_joined_and_opens_two_epochs() -> None:
    mind = Mind()
    for party in ("label", "a"):
        assert mind.hear(party, joined(f"{party}1")).orders == ()
    mind.hear("b", joined("b1"))
    assert mind.ordered(Start) == {p: Start(f"{p}1", "r") for p in PARTIES}
    assert mind.ordered(Open) == {p: Open(f"{p}1", 1, known=0) for p in PARTIES}
    assert mind.state.phase is Phase.RUNNING


def test_with_early_stopping_an_epoch_is_opened_only_when_the_one_before_is_measured() -> None:
    mind = Mind(plan(early=EarlyStopping("loss", 2, 0.0, lower_is_better=True))).everyone_joins()
    assert mind.ordered(Open) == {p: Open(f"{p}1", 0, known=0) for p in PARTIES}
    mind.hear("label", EpochDone("label1", 0, epoch(0)))
    assert mind.ordered(Open) == {p: Open(f"{p}1", 1, keep=1, known=1) for p in PARTIES}


def test_a_job_file_that_differs_is_named_by_its_keys_with_both_values_and_ends_everyone() -> None:
    mind = Mind().hear("a", joined("a1"))
    other = JOB | {"epochs": 5, "pipeline": {"depth": 2, "staleness": 1}}
    mind.hear("b", joined("b1", job=other))
    assert mind.state.error == "AlignmentError"
    assert "epochs = 5 at 'b', 4 at the scheduler" in (mind.state.reason or "")
    assert "pipeline.staleness = 1 at 'b', 0 at the scheduler" in (mind.state.reason or "")
    assert "name" not in (mind.state.reason or "")
    assert {p: o.error for p, o in mind.ordered(Stop).items()} == {"a": "AlignmentError", "b": "AlignmentError"}
    mind.hear("label", joined("label1"))
    assert mind.ordered(Stop)["label"].error == "AlignmentError", "who comes later is told, too"


def test_the_base_of_one_run_is_not_joined_with_the_fuse_of_another() -> None:
    mind = Mind().hear("a", joined("a1", weights="a034")).hear("b", joined("b1", weights="91c2"))
    assert mind.state.error == "AlignmentError"
    told = mind.state.reason or ""
    assert told.startswith("a has the weights of run a034, b has the weights of run 91c2; ")
    assert "--run" in told
    mind = Mind().everyone_joins(weights="a034")
    assert mind.state.error is None
    mind.restart().hear("b", joined("b1", weights="a034"))
    assert mind.state.error is None, "a scheduler that starts again has yet to hear it of the others"


def test_rows_that_differ_are_told_by_their_counts_and_never_by_an_id_or_digest() -> None:
    mind = Mind().hear("a", joined("a1", n_rows=10, rows_digest="c0ffee"))
    mind.hear("label", joined("label1", n_rows=12, rows_digest="decade"))
    reason = mind.state.reason or ""
    assert mind.state.phase is Phase.FAILED
    assert "'label' has 12 rows, 'a' has 10" in reason
    assert "c0ffee" not in reason
    assert "decade" not in reason


def test_ids_of_different_types_are_told_as_such() -> None:
    mind = Mind().hear("a", joined("a1")).hear("b", joined("b1", id_type="text", rows_digest="e"))
    assert "the ids of 'a' are of type integer and those of 'b' of type text" in (mind.state.reason or "")
    strange = Mind().hear("a", joined("a1")).hear("b", joined("b1", id_type="a lie", rows_digest="e"))
    assert "the ids of 'b' and 'a' are of different types" in (strange.state.reason or "")


def test_state_folders_of_different_runs_are_told_with_who_holds_which() -> None:
    mind = Mind().hear("a", joined("a1", held=(1,))).hear("b", joined("b1", held=(1,), run="other"))
    assert "a holds r, b holds other" in (mind.state.reason or "")
    known = Mind(state=RunState(run="mine")).hear("a", joined("a1", held=(1,)))
    assert "the scheduler holds mine" in (known.state.reason or "")


@given(st.recursive(st.none() | st.integers(0, 3), lambda v: st.dictionaries(st.sampled_from("abc"), v) | st.lists(v)))
def test_no_key_differs_from_itself_and_every_added_key_is_found(value: Any) -> None:
    ours = {"x": value, "y": {"z": 1}}
    assert differing_keys(ours, {"x": value, "y": {"z": 1}}) == {}
    assert differing_keys(ours, {"x": value, "y": {"z": 2}}) == {"y.z": (1, 2)}
    assert differing_keys({}, {"new": 1}) == {"new": (None, 1)}


def test_a_scheduler_with_a_new_folder_goes_on_from_what_all_parties_hold() -> None:
    mind = Mind()
    mind.hear("a", joined("a1", held=(1, 3, 5), generation=1))
    mind.hear("b", joined("b1", held=(1, 3), generation=1))
    mind.hear("label", joined("label1", held=(1, 3, 5), generation=1, epochs=(epoch(0), epoch(1), epoch(2))))
    assert mind.ordered(Start)["a"] == Start("a1", "r", rollback_steps=(3, 3))
    assert [result.epoch for result in mind.state.history] == [0, 1]
    assert mind.ordered(Open)["a"] == Open("a1", 3, known=2)


def test_a_party_that_joins_again_is_told_everything_anew() -> None:
    mind = Mind().everyone_joins().hear("label", EpochDone("label1", 0, epoch(0)))
    mind.hear("a", joined("a2", held=(1,)))
    assert mind.orders == (("a", Start("a2", "r")), ("a", Open("a2", 2, known=1)))


REPORTS: dict[str, Callable[[str], Report]] = {
    "alive": Alive,
    "progress": lambda i: Progress(i, 0, 7, (7,)),
    "epoch": lambda i: EpochDone(i, 0, epoch(0)),
    "waiting": lambda i: Waiting(i, 0, "a", Kind.ACTIVATION, 0, 0, 1.0, 1.0),
    "lost": lambda i: Lost(i, 0, "a", Kind.GRADIENT, 0, 0, 1.0),
    "failed": lambda i: Failed(i, "ComputeError", "nan"),
    "stopped": lambda i: Stopped(i, 1),
    "finished": lambda i: Finished(i, {}),
}


@pytest.mark.parametrize("kind", REPORTS)
@pytest.mark.parametrize("sender", PARTIES)
def test_reports_of_an_earlier_worker_of_a_party_and_of_strangers_change_nothing(sender: str, kind: str) -> None:
    mind = Mind().everyone_joins()
    before = mind.state
    assert mind.hear(sender, REPORTS[kind](f"{sender}0")).state == before
    assert mind.hear("mallory", REPORTS[kind](f"{sender}1")).state == before
    assert mind.orders == ()


def test_only_the_label_holder_measures_epochs_and_only_once_and_in_order() -> None:
    mind = Mind().everyone_joins()
    mind.hear("a", EpochDone("a1", 0, epoch(0))).hear("label", EpochDone("label1", 0, epoch(1)))
    assert mind.orders == (("label", Open("label1", 1, known=0)),), "it is told which epochs are missing"
    mind.hear("label", EpochDone("label1", 0, epoch(0)), EpochDone("label1", 0, epoch(0, loss=9.0)), now=2.0)
    assert list(mind.state.history) == [replace(epoch(0), seconds=2.0)]


def test_a_line_of_history_has_the_holdout_only_if_there_is_one() -> None:
    assert history_line(epoch(0)) == {"epoch": 0, "step": 1, "loss": 0.1, "holdout": {"loss": 0.5}, "seconds": 0.0}
    assert history_line(EpochResult(0, 1, 0.1, None))["holdout"] is None


# Early stopping -----------------------------------------------------------------------------------------------


metrics = st.none() | st.just(nan) | st.sampled_from([-inf, inf, 0.0, 0.1, 0.2, 0.5, 0.51, 1.0])


@given(st.lists(metrics, min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([0.0, 0.05, 0.3]), st.booleans())
@settings(max_examples=150)
def test_early_stopping_ends_after_patience_epochs_without_a_gain_and_restores_the_best(
    values: list[float | None], patience: int, min_delta: float, lower: bool
) -> None:
    rule = EarlyStopping("loss", patience, min_delta, lower_is_better=lower)
    mind = Mind(plan(len(values), rule)).everyone_joins()
    trained, final = decide(rule, values)
    for number in range(trained):
        assert not mind.ordered(Finish)
        mind.hear("label", EpochDone("label1", 0, epoch(number, values[number])))
        opened = {order.through for order in mind.ordered(Open).values()}
        assert opened == {number if number + 1 == trained else number + 1}
    last = STEPS * trained - 1
    for party in PARTIES:
        assert not mind.ordered(Finish)
        mind.hear(party, Progress(f"{party}1", 0, last, (last,)))
    found = best_epoch(mind.plan, mind.state)
    assert (trained - 1 if found is None else found.epoch) == final
    assert {order.step for order in mind.ordered(Finish).values()} == {STEPS * (final + 1) - 1}


@pytest.mark.parametrize("undefined", [None, nan])
def test_a_metric_that_no_epoch_defines_neither_ends_the_run_nor_chooses_its_weights(undefined: float | None) -> None:
    mind = Mind(plan(epochs=6, early=EarlyStopping("loss", 1, 0.0, lower_is_better=False))).everyone_joins()
    for number in range(6):
        mind.hear("label", EpochDone("label1", 0, epoch(number, undefined)))
    for party in PARTIES:
        mind.hear(party, Progress(f"{party}1", 0, STEPS * 6 - 1, (STEPS * 6 - 1,)))
    assert {order.step for order in mind.ordered(Finish).values()} == {STEPS * 6 - 1}


# Endings ------------------------------------------------------------------------------------------------------


def test_nobody_finishes_before_everybody_has_the_last_step_on_disk() -> None:
    mind = Mind(plan(epochs=1)).everyone_joins().hear("label", EpochDone("label1", 0, epoch(0)))
    for party in PARTIES:
        assert not mind.ordered(Finish)
        mind.hear(party, Progress(f"{party}1", 0, 1, (1,)))
    assert mind.ordered(Finish) == {p: Finish(f"{p}1", 1) for p in PARTIES}
    for party in PARTIES:
        assert mind.state.phase is Phase.RUNNING
        mind.hear(party, Finished(f"{party}1", {}))
    assert mind.state.phase is Phase.FINISHED


def test_a_failure_stops_the_others_with_its_reason_and_the_first_one_counts() -> None:
    mind = Mind().everyone_joins()
    mind.hear("a", Failed("a1", "NonFiniteError", "step 3: the loss is NaN"))
    assert (mind.state.error, mind.state.reason) == ("NonFiniteError", "party 'a': step 3: the loss is NaN")
    assert {p: o.error for p, o in mind.ordered(Stop).items()} == {"b": "PeerFailed", "label": "PeerFailed"}
    before = mind.state
    mind.hear("b", Failed("b1", "ComputeError", "other"))
    assert (mind.state.error, mind.state.reason, mind.orders) == (before.error, before.reason, ())


def test_a_reason_names_its_party_once() -> None:
    said = "party 'a', micro-batch 3.1: base failed"
    assert Mind().everyone_joins().hear("a", Failed("a1", "ComputeError", said)).state.reason == said


@pytest.mark.parametrize("told", [True, False], ids=["told", "killed before it told"])
def test_a_run_that_failed_at_its_end_finishes_later_without_those_who_have_finished(told: bool) -> None:
    mind = Mind(plan(epochs=1)).everyone_joins().hear("label", EpochDone("label1", 0, epoch(0)))
    for party in PARTIES:
        mind.hear(party, Progress(f"{party}1", 0, 1, (1,)))
    if told:
        mind.hear("a", Finished("a1", {}))
    mind.hear("b", Failed("b1", "CheckpointError", "the disk is full")).restart()
    if not told:
        mind.hear("a", Finished("a1", {}))
    mind.hear("b", Failed("b1", "CheckpointError", "of long ago"))
    for party in ("label", "b"):
        assert mind.state.phase == Phase.GATHERING.value
        mind.hear(party, joined(f"{party}2", held=(1,)))
    assert mind.ordered(Finish) == {p: Finish(f"{p}2", 1) for p in ("b", "label")}
    mind.hear("b", Finished("b2", {})).hear("label", Finished("label2", {}))
    assert mind.state.phase is Phase.FINISHED


def test_a_stop_ends_the_label_holder_first_and_then_everyone_after_the_same_step() -> None:
    mind = Mind().everyone_joins().hear(OPERATOR, StopRequest("s"))
    assert list(mind.ordered(Stop)) == ["label"]
    assert mind.ordered(Stop)["label"].after_step is None
    mind.hear("label", Stopped("label1", 3))
    assert {p: o.after_step for p, o in mind.ordered(Stop).items()} == {"a": 3, "b": 3}
    mind.hear("a", Stopped("a1", 3))
    assert mind.state.phase is Phase.STOPPING
    mind.hear("b", joined("b2", held=(1,)))
    assert mind.ordered(Stop)["b"].after_step == 3, "who was killed while the run stopped is told where to stop"
    assert mind.hear("b", Stopped("b2", 3)).state.phase is Phase.STOPPED


def test_a_stop_before_the_start_ends_those_who_are_here() -> None:
    mind = Mind().hear("a", joined("a1")).hear(OPERATOR, StopRequest("s"))
    assert {p: o.error for p, o in mind.ordered(Stop).items()} == {"a": "RunStopped"}
    assert mind.state.phase is Phase.STOPPED


def finished() -> Mind:
    """Return a run of one epoch, whose scheduler was started again after all had finished."""
    mind = Mind(plan(epochs=1)).everyone_joins()
    mind.hear("label", EpochDone("label1", 0, epoch(0)))
    for party in PARTIES:
        mind.hear(party, Progress(f"{party}1", 0, 1, (1,)), Finished(f"{party}1", {}))
    assert mind.state.phase is Phase.FINISHED and not untold(mind.plan, mind.state)
    return mind.restart()


def test_who_has_lost_its_final_weights_after_the_end_writes_them_again_from_their_checkpoint() -> None:
    mind = finished().hear("a", joined("a2", held=(1,)))
    assert mind.orders == (("a", Start("a2", "r")), ("a", Finish("a2", 1)))
    assert untold(mind.plan, mind.state) == ("a",)
    mind.hear("a", Finished("a2", {}))
    assert mind.state.phase is Phase.FINISHED and not untold(mind.plan, mind.state)


def test_who_has_lost_their_checkpoint_too_is_told_so_and_does_not_wait() -> None:
    mind = finished().hear("a", joined("a2"))
    order = mind.ordered(Stop)["a"]
    assert order.error == "CheckpointError" and "new state folder" in order.reason
    mind.hear("a", Failed("a2", "CheckpointError", order.reason))
    assert mind.state.phase is Phase.FINISHED and not untold(mind.plan, mind.state)


def test_who_comes_with_another_run_after_the_end_is_told_so() -> None:
    order = finished().hear("a", joined("a2", held=(1,), run="another")).ordered(Stop)["a"]
    assert order.error == "AlignmentError" and "different runs" in order.reason


def test_who_has_not_come_before_a_stop_is_awaited_to_be_told() -> None:
    mind = Mind().hear("a", joined("a1")).hear(OPERATOR, StopRequest("s")).hear("a", Stopped("a1", -1))
    assert missing(mind.plan, mind.state) == untold(mind.plan, mind.state) == ("b", "label")
    mind.hear("b", joined("b1"))
    assert mind.ordered(Stop)["b"].error == "RunStopped"


def test_a_worker_that_was_interrupted_stops_nobody_else() -> None:
    mind = Mind().everyone_joins().hear("a", joined("a2"))
    assert mind.hear("label", Stopped("label1", 1)).orders == ()
    assert mind.state.phase is Phase.RUNNING


def test_a_scheduler_that_is_restarted_while_the_run_stops_goes_on_stopping_it() -> None:
    mind = Mind().everyone_joins().hear(OPERATOR, StopRequest("s")).restart()
    assert mind.ordered(Stop)["label"].after_step is None, "it may have been killed before it told"
    mind.hear("label", Stopped("label1", 3)).restart()
    assert mind.ordered(Stop)["a"].after_step == 3
    mind.hear("a", Stopped("a1", 3)).hear("b", Stopped("b1", 3))
    assert mind.state.phase is Phase.STOPPED
    assert mind.restart().state.phase is Phase.GATHERING


def test_who_has_been_silent_for_too_long_is_named_and_who_has_ended_is_not() -> None:
    mind = Mind().everyone_joins()
    mind.hear("a", Alive("a1"), now=GIVE_UP)
    assert silent(mind.plan, mind.state, 0.0, GIVE_UP + 1.0) == {"b": GIVE_UP + 1.0, "label": GIVE_UP + 1.0}
    mind.hear("b", Finished("b1", {})).hear(OPERATOR, StopRequest("s")).hear("label", Stopped("label1", 1))
    assert silent(mind.plan, mind.state, 0.0, 2 * GIVE_UP + 1.0) == {"a": GIVE_UP + 1.0}


def test_a_party_that_never_came_is_silent_since_the_scheduler_began() -> None:
    assert silent(plan(), RunState(), 5.0, 6.0) == {}
    assert silent(plan(), RunState(), 5.0, 6.0 + GIVE_UP) == dict.fromkeys(("a", "b", "label"), GIVE_UP + 1.0)


# Generations --------------------------------------------------------------------------------------------------


def waiting(seconds: float, generation: int = 0) -> Waiting:
    return Waiting("a1", generation, "label", Kind.GRADIENT, 4, 0, seconds, 0.1)


def lost(asked_s: float, generation: int = 0) -> Lost:
    return Lost("label1", generation, "a", Kind.GRADIENT, 4, 0, asked_s)


def running() -> Mind:
    """Two epochs are done; a holds less than the others."""
    mind = Mind().everyone_joins()
    mind.hear("label", EpochDone("label1", 0, epoch(0)), EpochDone("label1", 0, epoch(1)))
    mind.hear("a", Progress("a1", 0, 3, (1,)))
    mind.hear("b", Progress("b1", 0, 3, (1, 3)))
    return mind.hear("label", Progress("label1", 0, 3, (1, 3)))


def test_a_message_that_is_asked_for_again_after_it_was_lost_takes_everyone_to_the_newest_common_checkpoint() -> None:
    mind = running()
    mind.hear("a", waiting(1.0)).hear("label", lost(1.0))
    assert mind.orders == ()
    mind.hear("a", waiting(2.0)).hear("label", lost(2.0))
    assert mind.ordered(Start) == {p: Start(f"{p}1", "r", rollback_steps=(1,)) for p in PARTIES}
    assert mind.ordered(Open) == {p: Open(f"{p}1", 2, known=1) for p in PARTIES}
    assert [result.epoch for result in mind.state.history] == [0]
    assert all(member.committed == 1 for member in mind.state.members.values())
    before = mind.state
    for sender, late in (("label", EpochDone("label1", 0, epoch(1))), ("b", Progress("b1", 0, 9, (9,)))):
        assert mind.hear(sender, late).state == before, "reports of the older generation are void"
    mind.hear("a", waiting(2.0)).hear("label", lost(3.0))
    assert mind.state.generation == 1, "of the older generation, too"


def test_messages_that_a_sender_has_lost_to_several_are_missed_by_each() -> None:
    mind = running()
    for asked_s in (1.0, 2.0):
        assert mind.state.generation == 0
        for party in ("a", "b"):
            mind.hear(party, replace(waiting(asked_s), incarnation=f"{party}1"))
            mind.hear("label", replace(lost(asked_s), receiver=party))
    assert mind.state.generation == 1, "what a misses was said twice, whatever was said of b in between"


def test_what_is_said_of_nobody_is_kept_for_nobody() -> None:
    mind = running()
    before = mind.state.members.keys()
    for asked_s in (1.0, 2.0):
        mind.hear("label", replace(lost(asked_s), receiver="nobody"))
    assert (mind.state.generation, mind.state.members.keys()) == (0, before)


@pytest.mark.parametrize(
    "story",
    [
        pytest.param([("a", waiting(1.0)), ("label", lost(1.0)), ("label", lost(1.0))], id="one question, told twice"),
        pytest.param([("label", lost(1.0)), ("label", lost(2.0))], id="nobody waits"),
        pytest.param(
            [("a", waiting(1.0)), ("label", lost(1.0)), ("a", Progress("a1", 0, 4, (1,))), ("label", lost(2.0))],
            id="it came after all",
        ),
        pytest.param(
            [
                ("a", waiting(1.0)),
                ("b", replace(lost(1.0), incarnation="b1")),
                ("b", replace(lost(2.0), incarnation="b1")),
            ],
            id="told by another party",
        ),
        pytest.param(
            [("a", waiting(1.0)), ("label", replace(lost(1.0), step=3)), ("label", lost(2.0))], id="two messages"
        ),
        pytest.param([("a", waiting(5.0))] * 9, id="time alone"),
    ],
)
def test_nothing_less_than_a_second_question_begins_a_generation(story: list[tuple[str, Report]]) -> None:
    mind = running()
    for sender, report in story:
        mind.hear(sender, report)
    assert mind.state.generation == 0


def test_a_scheduler_that_does_not_know_what_all_hold_waits_before_it_goes_back() -> None:
    mind = running().restart()
    for party in ("a", "label"):
        mind.hear(party, joined(f"{party}1", held=(1,)))
    mind.hear("a", waiting(1.0)).hear("label", lost(1.0)).hear("a", waiting(2.0)).hear("label", lost(2.0))
    assert mind.state.generation == 0
    mind.hear("b", joined("b1", held=(1, 3))).hear("a", waiting(3.0)).hear("label", lost(3.0))
    assert mind.state.bases == (1,)


def test_what_the_label_holder_remembered_of_an_abandoned_timeline_does_not_come_back() -> None:
    mind = running()
    mind.hear("label", joined("label1", held=(1, 3), epochs=(epoch(0), epoch(1))))
    mind.hear("a", waiting(1.0)).hear("label", lost(1.0)).hear("a", waiting(2.0)).hear("label", lost(2.0))
    mind.hear("label", Progress("label1", 1, 1, (1,)))
    mind.hear("b", joined("b1", held=(1,)))
    assert [result.epoch for result in mind.state.history] == [0]


def test_the_state_on_disk_has_nothing_of_a_moment_and_a_running_run_goes_on_from_it() -> None:
    mind = running().hear("a", waiting(1.0), now=3.0)
    saved = durable(mind.state)
    assert durable(saved) == saved
    assert all(m.heard is None and m.waiting is None and m.held is None for m in saved.members.values())
    again = restarted(saved, 7.0)
    assert (again.phase, again.history, again.epoch_began) == (Phase.RUNNING, mind.state.history, 7.0)


# What a worker makes of orders --------------------------------------------------------------------------------


def test_a_new_generation_voids_what_was_opened_and_finished_and_an_old_one_nothing() -> None:
    orders = Orders().after(Start("a", "r")).after(Open("a", 5, keep=3)).after(Finish("a", 9))
    assert orders.after(Start("a", "r", rollback_steps=(1,))) == Orders(start=Start("a", "r", rollback_steps=(1,)))
    assert orders.after(Start("a", "r")) == orders


def test_orders_that_come_twice_or_late_undo_nothing() -> None:
    stop, at_once = Stop("a", "later", after_step=3), Stop("a", "at once", error="RunStopped")
    orders = Orders().after(Open("a", 1)).after(Open("a", 2, keep=3)).after(at_once)
    assert Orders().after(stop).after(replace(stop, after_step=None)).stop == stop
    assert orders.after(Open("a", 1)).open == Open("a", 2, keep=3)
    assert orders.after(Open("a", 2, keep=5)).open == Open("a", 2, keep=5)
    assert orders.after(stop).stop == at_once
    assert Orders().after(stop).after(at_once).stop == at_once

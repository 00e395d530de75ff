"""A run as shown and kept follows from statuses: who waited, what went wrong, and curves of bounded size."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from sl_queue.observe.activity import Activity, spent_of
from sl_queue.observe.curves import MOST_POINTS, Curves
from sl_queue.observe.happenings import MOST, Happenings
from sl_queue.observe.trace import MOST_EPOCHS, Trace
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus
from sl_queue.protocol.totals import Now, Totals, bounded


def totals(age_s: float, busy_s: float, source: str = "label", **counts: Any) -> Totals:
    """Return totals of a process that has waited for one source whenever it was not busy."""
    return Totals(age_s, busy_s, {source: {"gradient": age_s - busy_s}}, **counts)


def status(party: PartyStatus | None = None, **changes: Any) -> RunStatus:
    parties = {} if party is None else {"a": party}
    return RunStatus(**{"phase": "running", "job": "toy", "run": "r1", "epochs": 9, "parties": parties, **changes})


# Time -----------------------------------------------------------------------------------------------------------


def test_the_last_ten_seconds_are_those_and_not_the_time_since_the_start() -> None:
    activity = Activity()
    for second in range(100):  # idle at first, then busy
        activity.take(totals(float(second), max(0.0, second - 80.0)))
    assert activity.lately.seconds == pytest.approx(10.0)
    assert activity.lately.busy_s == pytest.approx(10.0)
    assert activity.whole.busy_s == pytest.approx(19.0)
    assert activity.whole.waited_s == {("label", "gradient"): pytest.approx(80.0)}


def test_the_time_of_a_process_that_was_killed_is_not_lost_and_none_is_counted_twice() -> None:
    activity = Activity()
    for told in (totals(5.0, 4.0, sent_bytes=100), totals(6.0, 5.0, sent_bytes=120), totals(2.0, 1.0, sent_bytes=30)):
        activity.take(told)
        activity.take(told)  # a status tells the same again
    assert (activity.whole.seconds, activity.whole.busy_s) == (8.0, 6.0)
    assert activity.whole.counts["sent_bytes"] == 150
    assert activity.lately.seconds == 2.0  # of the new process alone
    assert spent_of(json.loads(json.dumps(activity.whole.as_json()))) == activity.whole


def test_of_what_a_party_tells_only_sources_that_there_are_and_numbers_are_believed() -> None:
    many = {f"cause {number}": 1.0 for number in range(10_000)}
    told = Totals(
        float("nan"),
        float("inf"),
        {"label": many, "somebody\x1b[2J": {"x": 1.0}},
        {f"fate {number}": -1 for number in range(10_000)},
        now=Now("somebody", "x", 1.0),
    )
    believed = bounded(told, ("a", "label"))
    assert (believed.age_s, believed.busy_s, believed.now) == (0.0, 0.0, None)
    assert {source: len(causes) for source, causes in believed.waited_s.items()} == {"label": 16}
    assert set(believed.messages.values()) == {0}
    assert len(believed.messages) == 16


# Curves ---------------------------------------------------------------------------------------------------------


def test_a_million_steps_are_a_bounded_number_of_points_in_order_with_both_ends() -> None:
    curves = Curves()
    for step in range(0, 1_000_000, 10):
        curves.take(step / 100, step, 32 * step, 1.0 / (step + 1))
    steps = [step for step, _, _ in curves.points]
    assert len(steps) <= MOST_POINTS
    assert len(steps) > MOST_POINTS // 4
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert steps[-1] > 999_000
    assert curves.samples_per_s == pytest.approx(3200.0)


def test_a_run_that_goes_back_takes_its_points_with_it() -> None:
    curves = Curves()
    for step in range(50):
        curves.take(float(step), step, step, float(step))
    serial = curves.serial
    curves.take(51.0, 20, 20, 20.5)
    assert [step for step, _, _ in curves.points] == list(range(21))
    assert curves.serial > serial  # whoever has seen the old points is shown all of them again


def test_a_label_holder_that_was_restarted_counts_from_zero_and_its_speed_stays_sane() -> None:
    curves = Curves()
    for second in range(20):
        curves.take(float(second), 100 + second, 1000 * second, 1.0)
    curves.take(20.0, 120, 0, 1.0)
    assert curves.samples_per_s is None
    curves.take(21.0, 121, 1000, 1.0)
    assert curves.samples_per_s == pytest.approx(1000.0)


# What happened ----------------------------------------------------------------------------------------------------


def whats(happenings: Happenings) -> list[str]:
    return [line.what for line in happenings.lines]


def test_a_killed_worker_is_gone_heard_of_again_and_restarted() -> None:
    happenings = Happenings()
    alive = PartyStatus("here", committed=4, silent_s=0.2, totals=totals(9.0, 5.0))
    happenings.take(status(alive), 100.0)
    happenings.take(status(replace(alive, silent_s=2.6)), 102.6)
    happenings.take(status(replace(alive, silent_s=2.9)), 102.9)
    happenings.take(status(PartyStatus("here", committed=4, silent_s=0.0)), 108.0)  # it has joined, and told no totals
    happenings.take(status(replace(alive, silent_s=0.1, totals=totals(1.0, 0.5))), 109.0)
    assert whats(happenings) == ["phase", "lost", "back", "restarted"]
    assert "step 5" in happenings.lines[-1].text


def test_one_that_has_finished_is_not_gone() -> None:
    happenings = Happenings()
    happenings.take(status(PartyStatus("here", silent_s=0.1, totals=totals(9.0, 5.0))), 1.0)
    happenings.take(status(PartyStatus("finished", silent_s=99.0, totals=totals(9.0, 5.0))), 2.0)
    assert whats(happenings) == ["phase", "finished"]


def test_counts_are_of_one_line_and_a_restarted_scheduler_doubles_none() -> None:
    happenings = Happenings()
    party = PartyStatus("here", silent_s=0.1)
    for at_s, told in ((1.0, totals(1.0, 1.0)), (2.0, totals(2.0, 2.0, resent=3)), (3.0, totals(3.0, 3.0, resent=5))):
        happenings.take(status(replace(party, totals=told)), at_s)
    happenings.take(status(party), 4.0)  # of a scheduler that has just been started
    happenings.take(status(replace(party, totals=totals(5.0, 5.0, resent=5))), 5.0)
    assert [(line.what, line.count) for line in happenings.lines] == [("phase", None), ("resent", 5)]


def test_of_checkpoints_the_newest_of_each_party_is_kept_and_the_rest_is_bounded() -> None:
    happenings = Happenings()
    for step in range(1000):
        phase = "waiting" if step % 2 else "here"
        happenings.take(status(PartyStatus(phase, committed=step), generation=step), float(step))
    assert sum(line.what == "checkpoint" for line in happenings.lines) == 1
    assert len(happenings.lines) <= MOST


# All of it --------------------------------------------------------------------------------------------------------


def traced() -> Trace:
    trace = Trace()
    for second in range(30):
        told = PartyStatus("here", committed=second, silent_s=0.1, totals=totals(second + 1.0, 0.25 * second))
        epochs = tuple(
            EpochResult(e, 10 * e, 1.0 / (e + 1), {"auroc": None}) for e in range(max(0, second - 19), second)
        )
        trace.take(
            status(told, step=second, loss=1.0, samples=second * 32, epoch=second, history=epochs), 100.0 + second
        )
    return trace


def test_a_trace_goes_on_where_it_was_kept_and_is_plain_json() -> None:
    trace = traced()
    kept = json.loads(json.dumps(trace.as_json(), allow_nan=False))
    again = Trace.from_json("r1", kept)
    assert again.curves.points == trace.curves.points
    assert again.epochs == trace.epochs
    assert [epoch["epoch"] for epoch in again.epochs] == list(range(29))
    assert again.parties["a"].whole == trace.parties["a"].whole
    again.take(status(PartyStatus("here", silent_s=0.1, totals=totals(2.0, 1.0)), step=40, loss=0.5), 200.0)
    assert again.parties["a"].whole.seconds == pytest.approx(32.0)
    with pytest.raises(ValueError, match="another run"):
        Trace.from_json("r2", kept)


def test_the_bubble_is_that_of_the_busiest_party_with_the_ideal_of_what_each_computes_a_step() -> None:
    asked: list[Mapping[str, float]] = []

    def ideal(busy_s: Mapping[str, float]) -> float:
        asked.append(busy_s)
        return 0.125

    found = traced().view(ideal)["bubble"]
    assert found == {"measured": pytest.approx(0.75), "of": "a", "ideal": 0.125}
    assert asked == [{"a": pytest.approx(0.25)}]  # a step a second


def test_another_run_of_the_job_begins_with_nothing_of_the_one_before() -> None:
    trace = traced()
    serial = trace.curves.serial
    trace.take(status(run="r2", step=0, loss=3.0), 500.0)
    assert [point[:2] for point in trace.curves.points] == [(0, 3.0)]
    assert (trace.epochs, trace.parties) == ([], {})
    assert trace.curves.serial > serial


def test_a_hundred_thousand_epochs_stay_few_and_in_order() -> None:
    trace = Trace()
    for epoch in range(0, 20_000, 10):
        history = tuple(EpochResult(e, e, 1.0) for e in range(epoch, epoch + 10))
        trace.take(status(history=history), float(epoch))
    numbers = [line["epoch"] for line in trace.epochs]
    assert len(numbers) <= MOST_EPOCHS
    assert numbers == sorted(set(numbers))
    assert (numbers[0], numbers[-1]) == (0, 19_999)


def test_an_alignment_that_goes_on_before_a_run_is_shown_as_what_it_is() -> None:
    trace = Trace()
    trace.take(status(PartyStatus("masking 40 %"), phase="aligning", run=None), 1.0)
    view = trace.view()
    assert (view["status"]["phase"], view["status"]["parties"]["a"]["phase"]) == ("aligning", "masking 40 %")
    assert [line["text"] for line in view["log"]] == ["the run is aligning"]
    assert not view["parties"]["a"]["lost"]


def test_a_trace_of_nothing_is_a_view_too() -> None:
    view = Trace().view()
    assert (view["status"], view["parties"], view["bubble"], view["epochs"]) == (None, {}, None, [])


def test_numbers_that_json_does_not_have_are_none() -> None:
    trace = Trace()
    trace.take(status(step=0, loss=float("nan"), history=(EpochResult(0, 0, float("inf")),)), 1.0)
    json.dumps(trace.as_json(), allow_nan=False)

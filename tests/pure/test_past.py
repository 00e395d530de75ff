"""The past of a run fits in a status however long the run is, and whoever begins to watch has all of its curves."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.observe import curves
from sl_queue.observe.keeper import PAST_EVERY, Keeper
from sl_queue.observe.live import Live, Seen
from sl_queue.observe.trace import MISSED_S, MOST_EPOCHS, Trace
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.control import EpochResult, Status
from sl_queue.protocol.history import History
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Header, Kind, MicroBatch
from sl_queue.protocol.scheduler.past import MOST_NUMBERS, MOST_POINTS, Past, Point, past_of
from sl_queue.protocol.scheduler.status import as_json, from_json, on_the_wire
from tests.pure.test_trace import status

EPOCH_STEPS = 10


def history(epochs: int, metrics: int = 1, parties: int = 0) -> History:
    """Return epochs of ten steps each."""
    holdout = {f"metric {number}": 0.5 for number in range(metrics)}
    leak = {f"party {number}": dict.fromkeys(("norm", "direction", "patient"), 0.75) for number in range(parties)}
    tables = {"confusion": [[1.0] * 50] * 50}
    return History.of(
        EpochResult(e, EPOCH_STEPS * (e + 1) - 1, 1 / (e + 1), holdout, 1.0, leak or None, tables=tables)
        for e in range(epochs)
    )


def points(steps: int) -> list[Point]:
    return [(step, 1.0 / (step + 1), None) for step in range(steps)]


@given(st.integers(0, 2000), st.integers(0, 700), st.integers(0, 100), st.integers(0, 5))
def test_it_is_bounded_even_in_order_and_ends_with_the_newest(
    steps: int, epochs: int, metrics: int, parties: int
) -> None:
    past = past_of(points(steps), history(epochs, metrics, parties))
    assert len(past.points) <= MOST_POINTS
    assert len(past.epochs) * (3 + metrics + 3 * parties) <= max(MOST_NUMBERS, 3 + metrics + 3 * parties)
    for chosen, count in (([p[0] for p in past.points], steps), ([e.epoch for e in past.epochs], epochs)):
        assert chosen == sorted(set(chosen))
        assert chosen[-1:] == ([count - 1] if count else [])
        assert len({b - a for a, b in pairwise(chosen)}) <= 1
        assert all(first <= count / 2 for first in chosen[:1] if len(chosen) > 1)


def test_a_status_with_the_past_of_a_hundred_thousand_epochs_is_small_and_is_read_again() -> None:
    told = status(step=999_999, past=past_of(points(1_000_000), history(100_000, 20, 3)))
    header = Header("", 0, Kind.COMMAND, SCHEDULER, OPERATOR, MicroBatch(0, 0))
    body = encode(header, Status(on_the_wire(told)))
    assert len(body) < 100_000
    _, message = decode(body)
    assert isinstance(message, Status)
    assert from_json(message.run) == told


def test_programs_and_workers_of_the_version_before_are_shown_a_status_as_it_was() -> None:
    told = status(step=3, past=past_of(points(4), history(1)))
    assert as_json(told) == as_json(status(step=3))
    assert "past" not in on_the_wire(status(step=3))
    assert from_json(on_the_wire(status(step=3))).past is None


def test_who_begins_to_watch_has_the_curves_of_the_whole_run_and_then_what_is_new() -> None:
    trace, epochs = Trace(), history(500, 1)
    trace.take(status(step=4999, loss=1.0, history=epochs.newest()), 100.0)
    assert [line["epoch"] for line in trace.epochs] == list(range(480, 500))
    serial = trace.curves.serial
    trace.take(status(step=5000, loss=1.0, history=epochs.newest(), past=past_of(points(5000), epochs)), 100.25)
    steps = [step for step, _, _ in trace.curves.points]
    assert steps[0] < EPOCH_STEPS * 2
    assert steps[-2:] == [4999, 5000]
    assert steps == sorted(set(steps))
    assert len(steps) > MOST_POINTS / 2
    assert trace.curves.serial > serial  # a page that is open is given all of them
    numbers = [line["epoch"] for line in trace.epochs]
    assert numbers[0] <= 1
    assert numbers[-20:] == list(range(480, 500))
    assert numbers == sorted(set(numbers))
    trace.take(status(step=5001, loss=1.0), 100.5)
    assert [step for step, _, _ in trace.curves.points][-2:] == [5000, 5001]


def test_a_past_that_tells_nothing_new_changes_nothing_so_that_no_page_is_sent_all_again() -> None:
    trace = Trace()
    for step in range(40):
        past = past_of(points(step), history(3)) if step % PAST_EVERY == 0 else None
        trace.take(status(step=step, loss=1.0 / (step + 1), past=past), step / 4)
    assert trace.curves.serial == 0
    assert [step for step, _, _ in trace.curves.points] == list(range(40))


def test_what_passed_while_nothing_was_heard_is_filled_in() -> None:
    trace = Trace()
    for step in [*range(20), *range(60, 80)]:
        at_s = step / 4 + (MISSED_S if step >= 60 else 0.0)
        trace.take(status(step=step, loss=0.5, past=past_of(points(step), history(0))), at_s)
    assert [step for step, _, _ in trace.curves.points] == list(range(80))
    assert trace.curves.points[10][1] == 0.5  # as it was seen
    assert trace.curves.points[40][1] == pytest.approx(1 / 41)


def test_the_past_of_another_run_is_not_mixed_in() -> None:
    trace = Trace()
    trace.take(status(step=99, loss=1.0, past=past_of(points(99), history(9))), 1.0)
    trace.take(status(run="r2", step=5, loss=9.0, past=Past(((2, 8.0, None),), ())), 1.25)
    assert [point[:2] for point in trace.curves.points] == [(2, 8.0), (5, 9.0)]
    assert trace.epochs == []


def test_a_run_that_went_back_is_shown_without_what_was_given_up() -> None:
    trace = Trace()
    trace.take(status(step=99, loss=1.0, past=past_of(points(99), history(9))), 1.0)
    trace.take(status(step=40, loss=1.0, generation=1, history=history(4).newest()), 1.25)
    assert max(step for step, _, _ in trace.curves.points) == 40
    assert [line["epoch"] for line in trace.epochs] == [0, 1, 2, 3]


def test_a_past_of_whatever_size_and_content_stays_bounded_and_can_be_shown() -> None:
    many = tuple((step, math.nan if step % 2 else math.inf, None) for step in range(-5, 50_000))
    epochs = tuple(EpochResult(e, e, math.nan) for e in range(20_000))
    live = Live()
    live.take(status(step=60_000, loss=1.0, past=Past(many, epochs)))
    text, _ = live.next(Seen(), 1.0)
    assert text is not None
    shown = json.loads(text)
    assert len(shown["curves"]["points"]) <= curves.MOST_POINTS
    assert len(shown["epochs"]) <= MOST_EPOCHS


def test_each_seventh_status_has_the_past_and_so_has_one_of_each_of_a_few_who_share_them(tmp_path: Path) -> None:
    for watchers in range(1, PAST_EVERY):
        keeper, told = Keeper(tmp_path), []
        for number in range(PAST_EVERY * watchers):
            keeper.take(status(step=number, loss=1.0))
            told += [number % watchers] if keeper.past(history(1)) is not None else []
        assert sorted(told) == list(range(watchers))


def test_the_scheduler_says_what_it_kept_before_it_was_restarted(tmp_path: Path) -> None:
    first = Keeper(tmp_path, clock := iter(range(0, 10**6, 20)).__next__, clock)
    for step in range(30):
        first.take(status(step=step, loss=1.0))
    again = Keeper(tmp_path)
    again.take(status(step=30, loss=1.0))
    found = next(past for past in (again.past(history(3)) for _ in range(PAST_EVERY)) if past is not None)
    assert [step for step, _, _ in found.points] == list(range(31))
    assert [epoch.epoch for epoch in found.epochs] == [0, 1, 2]
    assert all(epoch.tables is None for epoch in found.epochs)

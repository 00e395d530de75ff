"""The vocabulary of events: JSON gives back what was said, and no sink harms who says it."""

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.errors import CheckpointError, JobError, RunStopped
from sl_queue.observe.fan_out import fan_out
from sl_queue.observe.json_lines import EventFile, JsonFormatter, entries, error_line
from sl_queue.observe.log import LEVELS, text_of, to_log
from sl_queue.protocol import events
from sl_queue.protocol.event_json import KINDS, as_json, from_json
from sl_queue.protocol.events import Event, ending

DONE = events.StepDone("bank", 0, 7, 256, None, {"applied": 4})
PER_MESSAGE = (
    events.Sent("bank", "insurer", "activation", 100),
    events.Received("bank", "insurer", 100, False),
    events.WaitBegan("bank", "insurer", "gradient"),
    events.Waited("bank", "insurer", "gradient", 0.5, 7, 1),
)
ANY = st.one_of(*(st.from_type(kind) for kind in KINDS.values()))


def is_finite(event: Event) -> bool:
    numbers = [getattr(event, field.name) for field in fields(event)]
    numbers += [value for number in numbers if isinstance(number, Mapping) for value in number.values()]
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


@given(ANY.filter(is_finite))
def test_every_event_comes_back_from_json_as_it_was(event: Event) -> None:
    assert from_json(json.loads(json.dumps(as_json(event)))) == event


def test_an_event_is_named_in_words_and_holds_plain_values() -> None:
    assert as_json(DONE) == {
        "event": "step_done",
        "party": "bank",
        "generation": 0,
        "step": 7,
        "samples": 256,
        "loss": None,
        "messages": {"applied": 4},
    }
    assert set(KINDS) >= {"sent", "wait_began", "still_waiting", "epoch_done", "generation_began", "finished"}


def test_a_number_that_is_not_finite_is_null_so_that_every_line_is_json() -> None:
    told = as_json(events.EpochDone("insurer", 0, 4, 0.5, {"auroc": math.nan, "r2": -math.inf, "mse": 1.0}))
    assert told["holdout"] == {"auroc": None, "r2": None, "mse": 1.0}


def test_what_a_later_version_adds_is_passed_over() -> None:
    assert from_json({"event": "teleported", "party": "bank"}) is None
    assert from_json({**as_json(DONE), "mood": "good"}) == DONE


@pytest.mark.parametrize("change", [{"step": "x"}, {"messages": [1]}, {"party": None}, {"step": None}])
def test_an_event_that_is_malformed_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="StepDone"):
        from_json({**as_json(DONE), **change})


@pytest.mark.parametrize("values", [{}, {"event": 7}, {"event": ["step_done"]}, {"event": None}])
def test_what_is_no_event_is_none(values: dict[str, Any]) -> None:
    assert from_json(values) is None


def test_how_a_worker_ends_is_an_event() -> None:
    assert ending("bank", RunStopped("as asked")) == events.Stopped("bank", "as asked")
    assert ending("bank", CheckpointError("torn")) == events.Failed("bank", "CheckpointError", "torn", 4)


# Sinks ----------------------------------------------------------------------------------------------------------


def test_what_one_sink_raises_reaches_neither_who_speaks_nor_the_other_sinks(caplog: pytest.LogCaptureFixture) -> None:
    taken: list[Event] = []

    def broken(event: Event, /) -> None:
        raise ZeroDivisionError

    observe = fan_out(broken, taken.append)
    for _ in range(100):
        observe(DONE)
    assert taken == [DONE] * 100
    assert [record.getMessage() for record in caplog.records] == ["an observer of the run has failed; the run goes on"]


def test_nobody_who_watches_costs_nothing() -> None:
    assert fan_out() is events.ignore
    assert fan_out(events.ignore) is events.ignore


def test_every_event_that_is_not_counted_has_words(caplog: pytest.LogCaptureFixture) -> None:
    said_elsewhere = {events.EpochDone, events.Stopped, events.Failed}  # the last two as the process ends
    assert {*get_args(events.Rare)} == {*LEVELS} | said_elsewhere
    with caplog.at_level(logging.DEBUG, "sl_queue"):
        for event in PER_MESSAGE:
            to_log(event)
        to_log(DONE)
    (record,) = caplog.records
    assert record.getMessage() == "bank: step 7 is done; messages of this process so far: {'applied': 4}"
    assert record.event is DONE  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (events.Resent("a", "b", 3, "gradient 1.0"), "sent 3 messages again to party 'b', from gradient 1.0 on"),
        (events.Resent("a", "b", 3, seconds=61.0), "sent 3 messages again to party 'b' in 61 s"),
        (events.Rejected("a", "b", "why"), "rejected a message of 'b': why"),
        (
            events.Rejected("a", "b", "why", 4999, 2.0),
            "rejected 4,999 further messages of 'b' in 2 s, the last: why",
        ),
        (events.StillWaiting("a", "x", 61.0, silent_s=3.0), "has waited 61 s for x; last heard from it 3 s ago"),
        (events.PhaseChanged("scheduler", "job", None, "gathering"), "job job is gathering"),
        (events.PhaseChanged("scheduler", "job", "r", "failed", "why"), "run r is failed: why"),
        (events.Missing("scheduler", ("a", "b")), "waiting for a, b"),
        (
            events.EpochDone("scheduler", 0, 4, 0.5, {"r2": None}, 1.25, 8),
            "epoch 1/8  loss 0.5000  held-out r2 -  after step 4, 1.2 s",
        ),
        (events.Finished("a", 7, "x/final"), "finished; final weights in x/final"),
        (events.Finished("a", 7, "x/final", True), "already finished after step 7; final weights in x/final"),
    ],
)  # fmt: skip
def test_people_read_events_in_words(event: Event, said: str) -> None:
    assert text_of(event) == said


def record_of(event: Event | None, message: str = "line\nbreak", exc_info: Any = None) -> logging.LogRecord:
    record = logging.LogRecord("sl_queue", logging.WARNING, "x.py", 1, message, None, exc_info)
    if event is not None:
        record.event = event
    return record


def test_a_json_log_has_one_line_a_record_and_the_fields_of_an_event() -> None:
    line = JsonFormatter().format(record_of(DONE))
    told = json.loads(line)
    assert "\n" not in line
    assert {key: told[key] for key in as_json(DONE)} == as_json(DONE)
    assert (told["level"], told["message"]) == ("warning", "line\nbreak")
    plain = json.loads(JsonFormatter().format(record_of(None)))
    assert set(plain) == {"at", "level", "message"}
    try:
        raise ZeroDivisionError("bug")
    except ZeroDivisionError as error:
        broken = JsonFormatter().format(record_of(None, exc_info=(type(error), error, error.__traceback__)))
    assert "ZeroDivisionError: bug" in json.loads(broken)["traceback"] and "\n" not in broken
    assert json.loads(error_line("error: x"))["message"] == "error: x"


def test_a_file_of_events_holds_what_is_not_several_times_a_step(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write = EventFile(path)
    for event in (*PER_MESSAGE, DONE, events.Committed("bank", 0, 7, 0.01)):
        write(event)
    EventFile(path)(events.Loaded("insurer"))  # another process, the same file
    found = list(entries(path.read_text()))
    assert [entry.event for entry in found] == [DONE, events.Committed("bank", 0, 7, 0.01), events.Loaded("insurer")]
    assert {entry.pid for entry in found} == {os.getpid()}
    assert [entry.at_s for entry in found] == sorted(entry.at_s for entry in found)


def test_a_line_that_is_torn_or_of_another_program_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventFile(path)(DONE)
    whole = path.read_text()
    wrong = (whole.replace('"clock"', '"watch"'), whole.replace('"step": 7', '"step": "x"'))
    for other in ("nonsense", "[1]", "{}", "null", whole[:40], *wrong):
        assert [entry.event for entry in entries(f"{other.strip()}\n{whole}")] == [DONE], other
    assert list(entries("")) == []


def test_a_file_that_cannot_be_opened_is_a_mistake_and_one_that_fills_up_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(JobError, match=r"SL_QUEUE_EVENTS = .*: Is a directory; name a file"):
        EventFile(tmp_path)
    write = EventFile(Path("/dev/full"))
    write(DONE)
    write(DONE)
    (record,) = caplog.records
    assert "/dev/full cannot be written (No space left on device)" in record.getMessage()

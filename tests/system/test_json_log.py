"""SL_QUEUE_LOG_FORMAT=json and SL_QUEUE_EVENTS: workers whose every line a program can read."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sl_queue.protocol.event_json import from_json
from sl_queue.protocol.events import (
    Began,
    Committed,
    EpochDone,
    Event,
    Failed,
    Finished,
    Loaded,
    PhaseChanged,
    Resent,
    StepDone,
)
from tests.support.credit import edit
from tests.support.crew import ROLES, STEPS, Crew, write_job


def set_environ(values: Mapping[str, str]) -> None:
    os.environ.update(values)


@pytest.fixture
def crew(tmp_path: Path, broker_url: str) -> Iterator[Crew]:
    write_job(tmp_path)
    with Crew(tmp_path, broker_url) as crew:
        yield crew


def lines(crew: Crew, role: str) -> list[dict[str, Any]]:
    """Every line that the newest worker of a role wrote, which must all be JSON."""
    return [json.loads(line) for line in crew.log(role).splitlines()]


def logged(crew: Crew, role: str) -> list[Event]:
    return [event for line in lines(crew, role) if (event := from_json(line)) is not None]


def test_every_line_of_a_run_is_json_and_tells_the_same_as_the_file_of_events(crew: Crew) -> None:
    crew.start(prepare=(set_environ, {"SL_QUEUE_LOG_FORMAT": "json"}))
    crew.finish()
    for role in ROLES:
        assert all({"at", "level", "message"} <= line.keys() for line in lines(crew, role))
        assert sorted(map(repr, logged(crew, role))) == sorted(map(repr, crew.events(role)))  # threads take turns
        assert isinstance(crew.events(role)[0], Loaded)
        assert {event.party for event in crew.events(role)} == {role}
    for role in ("bank", "insurer"):
        told = crew.events(role)
        assert [event.step for event in told if isinstance(event, StepDone)] == list(range(STEPS))
        assert [event.step for event in told if isinstance(event, Began)] == [-1]
        assert [event.step for event in told if isinstance(event, Committed)][-1] == STEPS - 1
        assert [type(event) for event in told if not isinstance(event, Resent)][-1] is Finished  # counts are told last
    told = crew.events("scheduler")
    epochs = [event for event in told if isinstance(event, EpochDone)]
    assert [event.epoch for event in epochs] == list(range(8))
    assert all(event.loss is not None and event.epochs == 8 for event in epochs)
    assert [event.phase for event in told if isinstance(event, PhaseChanged)][-1] == "finished"


def test_the_error_that_ends_a_worker_is_a_line_and_an_event(crew: Crew, tmp_path: Path) -> None:
    edit(tmp_path / "bank.toml", 'party = "bank"', 'party = "bank"\nmood = "good"')
    crew.start("bank", prepare=(set_environ, {"SL_QUEUE_LOG_FORMAT": "json"}))
    assert crew.wait("bank") == 2
    (line,) = lines(crew, "bank")
    assert line["level"] == "error" and line["message"].startswith("error: ") and "mood" in line["message"]
    (ended,) = crew.events("bank")
    assert isinstance(ended, Failed) and (ended.error, ended.exit_code) == ("JobError", 2)

"""The scheduler keeps the trace of its run for a report: whole or not at all, and the run never depends on it."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from sl_queue.observe.keeper import EVERY_S, KEPT, Keeper, read_kept
from tests.pure.test_trace import status


class Clock:
    """A clock that is set. Mutable."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_is_written_every_ten_seconds_and_at_each_change_of_phase(tmp_path: Path) -> None:
    clock = Clock()
    keeper = Keeper(tmp_path, clock, clock)
    keeper.take(status(phase="gathering", run=None))
    assert read_kept(tmp_path) is None  # no run yet
    keeper.take(status(step=0, loss=1.0))
    assert len(points(tmp_path)) == 1
    for step in range(1, 5):
        keeper.take(status(step=step, loss=1.0))
    assert len(points(tmp_path)) == 1
    clock.now = EVERY_S
    keeper.take(status(step=5, loss=1.0))
    assert len(points(tmp_path)) == 6
    keeper.take(status(phase="finished", step=6, loss=1.0))
    assert len(points(tmp_path)) == 7
    assert (tmp_path / KEPT).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [KEPT]


def points(folder: Path) -> list[object]:
    kept = read_kept(folder)
    assert kept is not None
    return list(kept["curves"]["points"])


def test_a_scheduler_that_is_started_again_goes_on_and_another_run_begins_anew(tmp_path: Path) -> None:
    first = Keeper(tmp_path)
    first.take(status(step=3, loss=0.5))
    again = Keeper(tmp_path)
    again.take(status(phase="gathering", run=None))
    again.take(status(step=9, loss=0.25))
    assert [point[:2] for point in points(tmp_path)] == [[3, 0.5], [9, 0.25]]  # type: ignore[index]
    other = Keeper(tmp_path)
    other.take(status(run="r2", step=0, loss=2.0))
    assert [point[:2] for point in points(tmp_path)] == [[0, 2.0]]  # type: ignore[index]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "status": null}'])
def test_what_cannot_be_read_is_written_over(tmp_path: Path, text: str) -> None:
    (tmp_path / KEPT).write_text(text)
    Keeper(tmp_path).take(status(step=3, loss=0.5))
    assert len(points(tmp_path)) == 1


def test_a_disk_that_cannot_be_written_is_said_once_and_costs_the_run_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = Keeper(tmp_path / "gone")
    (tmp_path / "gone").mkdir()
    keeper.take(status(step=0, loss=1.0))
    shutil.rmtree(tmp_path / "gone")
    with caplog.at_level(logging.WARNING, "sl_queue"):
        for phase in ("stopping", "stopped", "running"):
            keeper.take(status(phase=phase))
    assert len(caplog.records) == 1
    assert "not kept for a report" in caplog.text


def test_what_is_kept_is_bounded_after_a_million_steps(tmp_path: Path) -> None:
    clock = Clock()
    keeper = Keeper(tmp_path, clock, clock)
    for step in range(0, 1_000_000, 100):
        clock.now += 0.025
        keeper.take(status(step=step, loss=1.0, samples=step))
    assert len(json.dumps(read_kept(tmp_path))) < 200_000

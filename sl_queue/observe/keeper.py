"""The trace of a run in the scheduler's state folder, for a report: `trace.json`, whole or not at all.

Nothing depends on it: a trace that is lost or cannot be written costs the report its curves, and the run nothing.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sl_queue.observe.trace import Trace
from sl_queue.protocol.history import History
from sl_queue.protocol.scheduler.past import Past, past_of
from sl_queue.protocol.scheduler.status import RunStatus

KEPT = "trace.json"
EVERY_S = 10.0  # and at each change of phase
FORMAT = 1
PAST_EVERY = 7  # statuses; a prime, so that of a few who share the statuses in turns each is told

log = logging.getLogger("sl_queue")


def read_kept(folder: Path) -> dict[str, Any] | None:
    """Return what was kept in a folder; None if there is nothing of this version that can be read."""
    try:
        values = json.loads((folder / KEPT).read_text())
        return dict(values) if values["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Keeper:
    """Folds in the statuses that the scheduler tells, and goes on with what an earlier process kept. Mutable."""

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._clock, self._wall = folder, clock, wall
        self._trace, self._resumed = Trace(), False
        self._phase, self._written = "", clock()
        self._failed, self._told = False, 0

    def past(self, history: History) -> Past | None:
        """Return the past of the run with each seventh status, else None."""
        self._told += 1
        if self._told % PAST_EVERY:
            return None
        return past_of(self._trace.curves.points, history)

    def take(self, status: RunStatus) -> None:
        """Take a status; never raises."""
        if self._failed:
            return
        try:
            self._take(status)
        except Exception as error:
            self._failed = True
            log.warning("the curves of this run are not kept for a report any more (%s); the run goes on", error)

    def _take(self, status: RunStatus) -> None:
        if status.run is not None and not self._resumed:
            self._resumed = True
            self._trace = _resumed(self._folder, status.run) or self._trace
        self._trace.take(status, self._wall())
        if status.run is not None and (status.phase != self._phase or self._clock() - self._written >= EVERY_S):
            self._phase, self._written = status.phase, self._clock()
            self._write()

    def _write(self) -> None:
        path = self._folder / KEPT
        temporary = path.with_name(f".{KEPT}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, **self._trace.as_json()}, file, allow_nan=False)
        temporary.replace(path)


def _resumed(folder: Path, run: str) -> Trace | None:
    kept = read_kept(folder)
    try:
        return None if kept is None else Trace.from_json(run, kept)
    except (KeyError, TypeError, ValueError):
        return None

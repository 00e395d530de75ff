"""The trace of a run that goes on, for several who look at it: one thread folds statuses in, others wait for them."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sl_queue.observe.trace import Ideal, Trace, unknown
from sl_queue.protocol.event_json import finite
from sl_queue.protocol.scheduler.status import RunStatus

IDEAL_S = 5.0  # the ideal bubble is found so often: it changes with what the parties' work costs
SPARE_S = 0.45  # views are made no more often, whoever looks


@dataclass(frozen=True, slots=True)
class Seen:
    """Position of a viewer: the view it was shown last, and how much of the curves it has."""

    number: int = 0
    serial: int = -1
    points: int = 0


class Live:
    """Thread-safe; mutable: it takes statuses, and remembers the newest view, which all share."""

    def __init__(
        self, ideal: Ideal = unknown, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._trace, self._changed, self._clock, self._wall = Trace(), threading.Condition(), clock, wall
        self._best: float | None = None
        self._ideal, self._best_at = ideal, float("-inf")
        self._heard: float | None = None
        self._problem: str | None = None
        self._number = 0
        self._view: tuple[int, float, dict[str, Any]] = (0, float("-inf"), {})

    def take(self, status: RunStatus, age_s: float = 0.0) -> None:
        """Take a status that the scheduler reported `age_s` ago."""
        with self._changed:
            self._trace.take(status, self._wall() - age_s)
            self._heard, self._problem = self._clock() - age_s, None
            self._touch()

    def trouble(self, problem: str) -> None:
        """Note why nothing can be heard of the run."""
        with self._changed:
            self._problem = problem
            self._touch()

    def _touch(self) -> None:
        self._number += 1
        self._changed.notify_all()

    def next(self, seen: Seen, timeout_s: float) -> tuple[str | None, Seen]:
        """Return what is new as JSON, with what has been seen then; None if nothing is within `timeout_s`.

        `curves` in it has the points from number `from` on; those before have been seen, and are still right.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._number > seen.number, timeout_s)
            if self._number <= seen.number:
                return None, seen
            number, view = self._newest()
            curves, problem = self._trace.curves, self._problem
            known = seen.points if curves.serial == seen.serial else 0
            points, serial, count = finite(curves.points[known:]), curves.serial, len(curves.points)
            silent_s = None if self._heard is None else self._clock() - self._heard
        told = {**view, "curves": {"points": points, "from": known}, "problem": problem, "silent_s": silent_s}
        text = json.dumps(told, allow_nan=False, separators=(",", ":"))
        return text, Seen(number, serial, count)

    def _newest(self) -> tuple[int, dict[str, Any]]:
        """Return the newest view, made again if it is old enough to be. With the lock held."""
        number, made, view = self._view
        now = self._clock()
        if number == self._number:
            return number, view
        if view and now - made < SPARE_S:
            self._changed.wait_for(lambda: False, SPARE_S - (now - made))  # others may take the lock meanwhile
        view = self._trace.view(self._found)
        self._view = self._number, self._clock(), view
        return self._number, view

    def _found(self, busy: Any) -> float | None:
        if self._clock() - self._best_at >= IDEAL_S:
            self._best_at = self._clock()
            self._best = self._ideal(busy)
        return self._best

"""Trackers that people already use, fed beside a run: `--track tensorboard:DIR` and `--track mlflow:URL`.

The law: a tracker never slows or stops a run. What is to be said waits in a bounded queue for a thread of its own; a
tracker that is down is tried again, and that it is down is said once a minute. What it already has it is asked first,
so a restart of the scheduler doubles no point.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sl_queue.errors import JobError
from sl_queue.observe.scalars import Scalar, Scalars
from sl_queue.observe.sink import Sink, TrackerDown, TrackerRefuses
from sl_queue.protocol.scheduler.status import RunStatus
from sl_queue.protocol.text import counted

MOST_WAITING = 50_000  # numbers; the oldest are given up
BATCH = 500
EVERY_S = 1.0
PAUSE_S = 5.0  # after a failure
SAY_S = 60.0
LEAVE_S = 20.0  # at the end, when nobody waits for the scheduler any more, for what is still to be said

log = logging.getLogger("sl_queue")


def sink_of(text: str, job: str) -> Sink:
    """Return the tracker that a command line names. Raises JobError."""
    kind, _, where = text.partition(":")
    if kind == "tensorboard" and where:
        from sl_queue.observe.tensorboard import TensorBoard

        return TensorBoard(Path(where), job)
    if kind == "mlflow" and where.startswith(("http://", "https://")):
        from sl_queue.observe.mlflow import MLflow

        return MLflow(where, job)
    raise JobError(f"--track {text}: it must be tensorboard:DIR, or mlflow:URL with http:// or https://")


def parameters_of(job: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Return a job as flat names and texts: `pipeline.depth` is "4". Keys are of no tracker's business."""
    found = {}
    for name, value in job.items():
        if isinstance(value, Mapping):
            found.update(parameters_of(value, f"{before}{name}.") if name != "security" else {})
        elif value is not None:
            found[f"{before}{name}"] = str(value)
    return found


def _new(batch: Sequence[Scalar], known: Mapping[str, int]) -> list[Scalar]:
    """Return what comes after the newest that is known, one of each name and step."""
    found = {(each.name, each.step): each for each in reversed(batch) if each.step > known.get(each.name, -1)}
    return list(reversed(found.values()))


class Tracker:
    """Feeds one sink in a thread of its own, from the constructor to `close`. Mutable, thread-safe."""

    def __init__(
        self,
        name: str,
        sink: Sink,
        job: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._name, self._sink, self._parameters = name, sink, parameters_of(job)
        self._clock, self._wall = clock, wall
        self._scalars, self._changed = Scalars(), threading.Condition()
        self._waiting: deque[Scalar] = deque(maxlen=MOST_WAITING)
        self._run: str | None = None
        self._phase, self._closed = "", False
        self._known: dict[str, int] | None = None  # what the tracker has; None: not asked yet
        self._said_at = float("-inf")
        self._thread = threading.Thread(target=self._work, name=f"track {name.partition(':')[0]}", daemon=True)
        self._thread.start()

    def take(self, status: RunStatus) -> None:
        """Have what is new in a status said some time; never blocks and never raises."""
        try:
            if status.run is None:
                return
            with self._changed:
                self._run, self._phase = status.run, status.phase
                self._waiting += self._scalars.of(status, self._wall())
        except Exception:
            log.exception("%s: a status could not be followed; the run goes on", self._name)

    def close(self) -> None:
        """Say what is left, as long as it takes some seconds at most."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(LEAVE_S)
        if self._waiting:
            lost = counted(len(self._waiting), "number was", "numbers were")
            log.warning("--track %s: the run has ended, and %s not logged", self._name, lost)

    # The thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause_s = EVERY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, pause_s)
                run, closed = self._run, self._closed
            try:
                if run is not None:
                    self._tell(run, closed)
                pause_s = EVERY_S
            except TrackerDown as error:
                self._known = None  # it may have taken what it did not answer to
                self._say(f"{error}; it is tried again, and the run goes on")
                pause_s = PAUSE_S
            except Exception as error:
                self._say(f"{type(error).__name__}: {error}; the run goes on")
                pause_s = PAUSE_S
            if closed:
                return

    def _tell(self, run: str, closed: bool) -> None:
        if self._known is None:
            self._known = dict(self._sink.begin(run, self._parameters))
        while batch := self._batch():
            try:
                self._sink.write(_new(batch, self._known))
            except TrackerRefuses as error:
                self._say(f"{error}: {len(batch)} numbers are left out; the run goes on")
            self._note(batch)
        if closed:
            self._sink.end(self._phase)

    def _batch(self) -> list[Scalar]:
        """Return the oldest numbers; they stay until they are noted."""
        with self._changed:
            return [self._waiting[place] for place in range(min(BATCH, len(self._waiting)))]

    def _note(self, batch: Sequence[Scalar]) -> None:
        assert self._known is not None
        with self._changed:
            for each in batch:
                self._known[each.name] = max(each.step, self._known.get(each.name, -1))
                if self._waiting and self._waiting[0] is each:  # else it was given up meanwhile
                    self._waiting.popleft()

    def _say(self, problem: str) -> None:
        now = self._clock()
        if now - self._said_at >= SAY_S:
            self._said_at = now
            log.warning("--track %s: %s", self._name, problem)

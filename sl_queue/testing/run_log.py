"""Log of what the workers of a run did: each step by worker and time, repetitions too. Read from their events.

The workers append their events to a file (SL_QUEUE_EVENTS). An event that was written is there even if its worker was
killed right after it.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from sl_queue.observe.json_lines import Entry, entries
from sl_queue.protocol.events import Event, Loaded, Resent, StepDone

READ_EVERY_S = 0.02


@dataclass(slots=True)
class Process:  # mutable: it goes on
    """One process of a worker, from its start to its end."""

    pid: int
    started_s: float
    loaded_s: float | None = None  # when Python and the libraries were there
    steps: list[tuple[int, float]] = field(default_factory=list)  # (step, when it was done), in order
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def to_next_step_s(self) -> float | None:
        """Seconds from the loaded libraries to the first step; None if it did not come so far."""
        return None if self.loaded_s is None or not self.steps else self.steps[0][1] - self.loaded_s


class RunLog:
    """Mutable, thread-safe. Times are those of the machine's monotonic clock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._processes: dict[str, list[Process]] = defaultdict(list)
        self._running: dict[str, int] = {}
        self._reached = -1
        self._ended = False
        self._resent = 0

    # What happens -----------------------------------------------------------------------------------------------

    def start(self, worker: str, pid: int) -> None:
        with self._changed:
            self._processes[worker].append(Process(pid, time.monotonic()))
            self._running[worker] = pid
            self._changed.notify_all()

    def killed(self, worker: str) -> None:
        """Note that its process is no longer there to be killed."""
        with self._changed:
            self._running.pop(worker, None)

    def take(self, entry: Entry) -> None:
        """Take in an event of a process that was started."""
        event = entry.event
        with self._changed:
            if isinstance(event, Resent):
                self._resent += event.messages
            processes = reversed(self._processes.get(event.party, ()))
            process = next((process for process in processes if process.pid == entry.pid), None)
            if process is None:
                return
            if isinstance(event, Loaded):
                process.loaded_s = entry.at_s
            elif isinstance(event, StepDone):
                process.steps.append((event.step, entry.at_s))
                process.counts = event.messages or {}
                self._reached = max(self._reached, event.step)
                self._changed.notify_all()

    def end(self) -> None:
        """Note that nothing more will happen."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # Waiting ----------------------------------------------------------------------------------------------------

    def await_step(self, step: int) -> bool:
        """Block until some worker has done that step; False if the run ends before."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._reached >= step)
            return not self._ended

    def await_process(self, worker: str) -> int | None:
        """Block until a process of that worker runs; its number, or None if the run ends before."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or worker in self._running)
            return None if self._ended else self._running[worker]

    def await_end(self, timeout_s: float) -> bool:
        """Block for that long, or until the run ends: then True."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, timeout_s)

    # What came of it --------------------------------------------------------------------------------------------

    @property
    def last_step(self) -> int:
        with self._changed:
            return self._reached

    @property
    def resent(self) -> int:
        """Messages that their senders sent again because somebody asked for them."""
        with self._changed:
            return self._resent

    def processes(self, worker: str) -> tuple[Process, ...]:
        with self._changed:
            return tuple(self._processes[worker])

    def count(self, what: str) -> int:
        """Count messages `applied`, `redelivered`, `duplicates`, `stale` or `rejected`, of all processes together."""
        with self._changed:
            return sum(p.counts.get(what, 0) for processes in self._processes.values() for p in processes)

    def recomputed(self, worker: str) -> tuple[list[int], int]:
        """Return the steps done again after each restart of that worker, and those done again without a restart."""
        with self._changed:
            return recomputed([[step for step, _ in process.steps] for process in self._processes[worker]])

    def stalled_s(self, workers: Iterable[str], at_s: float) -> float:
        """Return the seconds from a moment to when each worker had done a further step, and never did an old one."""
        with self._changed:
            return max((self._next_progress(worker, at_s) - at_s for worker in workers), default=0.0)

    def _next_progress(self, worker: str, at_s: float) -> float:
        steps = [entry for process in self._processes[worker] for entry in process.steps]
        before = max((step for step, done_s in steps if done_s <= at_s), default=-1)
        return next((done_s for step, done_s in steps if done_s > at_s and step > before), at_s)


def recomputed(processes: list[list[int]]) -> tuple[list[int], int]:
    """Return as `RunLog.recomputed`, from the steps that each process of a worker has done, in order."""
    after_restart, without, reached = [], 0, -1
    for number, steps in enumerate(processes):
        known, again = reached, 0
        for step in steps:
            again += step <= known
            without += known < step <= reached
            reached = max(reached, step)
        after_restart += [again] if number else []
    return after_restart, without


@contextmanager
def following(path: Path, take: Callable[[Entry], None]) -> Iterator[None]:
    """Pass on what is appended to a file of events while the body runs, and what is left at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    ended = threading.Event()
    with path.open(encoding="utf-8") as file:

        def follow() -> None:
            rest = ""
            while not ended.wait(READ_EVERY_S):
                rest = _pass_on(file, rest, take)
            _pass_on(file, rest, take)

        thread = threading.Thread(target=follow, name="events", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _pass_on(file: IO[str], rest: str, take: Callable[[Entry], None]) -> str:
    """Pass on the whole lines; returns what has come of the next."""
    whole, newline, rest = (rest + file.read()).rpartition("\n")
    for entry in entries(whole + newline):
        take(entry)
    return rest


def events_in(path: Path) -> list[Event]:
    """Read the events in a file; none if it is not there."""
    return [entry.event for entry in entries(path.read_text())] if path.exists() else []

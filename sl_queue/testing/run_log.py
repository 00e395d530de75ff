"""What the workers of a run say about themselves, line by line: who did which step when, and who did it again.

The workers write these lines with SL_QUEUE_LOG=debug. A line that was written is here even if its worker was killed
right after it: it waits in a pipe.
"""

import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

_STEP = re.compile(r": step (\d+) is done; messages of this process so far: \{(.*)\}$")
_COUNT = re.compile(r"'(\w+)': (\d+)")
_LOADED = "libraries are loaded"
_RESENT = re.compile(r": sent (\d+) messages again to party ")


@dataclass(slots=True)
class Process:  # mutable: it goes on
    """One process of a worker, from its start to its end."""

    pid: int
    started_s: float
    loaded_s: float | None = None  # when Python and the libraries were there
    steps: list[tuple[int, float]] = field(default_factory=list)  # (step, when it was done), in order
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def to_next_step_s(self) -> float | None:
        """Seconds from the loaded libraries to the first step; None if it did not come so far."""
        return None if self.loaded_s is None or not self.steps else self.steps[0][1] - self.loaded_s


class Journal:
    """Mutable, thread-safe: lines come from the threads that read them. Times are monotonic, when a line came."""

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
        """Its process is no longer there to be killed."""
        with self._changed:
            self._running.pop(worker, None)

    def line(self, worker: str, text: str) -> bool:
        """Take in a line; False if it is for people rather than for this journal."""
        done = _STEP.search(text)
        resent = _RESENT.search(text)
        with self._changed:
            if resent is not None:
                self._resent += int(resent[1])
            if done is None and _LOADED not in text:
                return False
            process = self._processes[worker][-1]
            if done is None:
                process.loaded_s = time.monotonic()
                return True
            step = int(done[1])
            process.steps.append((step, time.monotonic()))
            process.counts.update({name: 0 for name, _ in _COUNT.findall(done[2])})
            process.counts |= Counter({name: int(count) for name, count in _COUNT.findall(done[2])})
            self._reached = max(self._reached, step)
            self._changed.notify_all()
            return True

    def end(self) -> None:
        """Nothing more will happen."""
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
        """Messages `applied`, `redelivered`, `duplicates`, `stale` or `rejected`, of all processes together."""
        with self._changed:
            return sum(p.counts[what] for processes in self._processes.values() for p in processes)

    def recomputed(self, worker: str) -> tuple[list[int], int]:
        """Steps done again after each restart of that worker, and steps done again without a restart."""
        with self._changed:
            return recomputed([[step for step, _ in process.steps] for process in self._processes[worker]])

    def stalled_s(self, workers: Iterable[str], at_s: float) -> float:
        """Seconds from a moment to when each of the workers had done a further step, and never did an old one."""
        with self._changed:
            return max((self._next_progress(worker, at_s) - at_s for worker in workers), default=0.0)

    def _next_progress(self, worker: str, at_s: float) -> float:
        steps = [entry for process in self._processes[worker] for entry in process.steps]
        before = max((step for step, done_s in steps if done_s <= at_s), default=-1)
        return next((done_s for step, done_s in steps if done_s > at_s and step > before), at_s)


def recomputed(processes: list[list[int]]) -> tuple[list[int], int]:
    """As `Journal.recomputed`, from the steps that each process of a worker has done, in order."""
    after_restart, without, reached = [], 0, -1
    for number, steps in enumerate(processes):
        known, again = reached, 0
        for step in steps:
            again += step <= known
            without += known < step <= reached
            reached = max(reached, step)
        after_restart += [again] if number else []
    return after_restart, without

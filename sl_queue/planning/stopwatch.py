"""Times of actions as a worker meets them: with other data in the caches, after a pause, beside others."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

CACHES_BYTES = 8 * 1024 * 1024  # read before each measurement


@dataclass(slots=True)
class Stopwatch:  # mutable: it collects
    """Times of named actions, each after a pause."""

    pause_s: float = 0.0
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    other: npt.NDArray[np.uint8] = field(default_factory=lambda: np.ones(CACHES_BYTES, np.uint8), repr=False)

    def time(self, party: str, what: str, action: Callable[[], T]) -> T:
        self.other.max()
        time.sleep(self.pause_s)
        began = time.perf_counter()
        found = action()
        self.seconds[party, what].append(time.perf_counter() - began)
        return found

    def median(self, party: str, what: str) -> float:
        return median(self.seconds[party, what])

    def times_as_long_as(self, other: "Stopwatch") -> float:
        """Return the ratio of the medians of both, at least 1."""
        here, there = (sum(clock.median(*action) for action in self.seconds) for clock in (self, other))
        return max(1.0, here / there)


@contextmanager
def copying() -> Iterator[None]:
    """Have another thread copy what does not fit into the caches, without Python's lock."""
    ended, source, target = threading.Event(), np.ones(CACHES_BYTES, np.uint8), np.zeros(CACHES_BYTES, np.uint8)

    def copy() -> None:
        while not ended.is_set():
            np.copyto(target, source)

    thread = threading.Thread(target=copy, name="copying")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

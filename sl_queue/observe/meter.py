"""Counters of a channel since its process started: counted here, shown by sl_queue.observe.prometheus.

The law: time is attributed once. At every moment the worker is busy, or waits for the innermost thing that it waits
for, so that `busy_s` and all of `waited_s` add up to the age, and none of them ever falls. Nanoseconds are whole
numbers: sums of floats would fall by their rounding.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sl_queue.protocol.measures import Connectivity, Measures

NS = 1e9

Whom = tuple[str, str]  # (source, cause)


class Meter:
    """Mutable and thread-safe: the worker, the link and the pulse count here. Only the worker waits.

    `clock`: nanoseconds, monotonic.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._began = self._pulse = self._since = clock()
        self._busy = 0
        self._waited: dict[Whom, int] = {}
        self._waiting: list[Whom] = []  # the innermost last; a commit may settle inside of a receive
        self._counts: Counter[str] = Counter()

    def count(self, what: str, much: int = 1) -> None:
        """Add to sent_bytes, received_bytes, commits or reconnects."""
        with self._lock:
            self._counts[what] += much

    def beat(self) -> None:
        """Note that the channel's own thread is alive."""
        with self._lock:
            self._pulse = self._clock()

    @contextmanager
    def waiting(self, source: str, cause: str) -> Iterator[None]:
        """Attribute the body's time to this wait, except for the waits inside of it."""
        with self._lock:
            self._attribute()
            self._waiting.append((source, cause))
        try:
            yield
        finally:
            with self._lock:
                self._attribute()
                self._waiting.pop()

    def read(self, messages: dict[str, int], silent_s: dict[str, float], broker: Connectivity) -> Measures:
        """Everything so far, a wait that goes on included."""
        with self._lock:
            now, counts = self._attribute(), self._counts
            return Measures(
                age_s=(now - self._began) / NS,
                busy_s=self._busy / NS,
                pulse_age_s=(now - self._pulse) / NS,
                waited_s={whom: waited / NS for whom, waited in self._waited.items()},
                silent_s=silent_s,
                messages=messages,
                sent_bytes=counts["sent_bytes"],
                received_bytes=counts["received_bytes"],
                commits=counts["commits"],
                reconnects=counts["reconnects"],
                broker=broker,
            )

    def _attribute(self) -> int:
        """Add the time since the last call to the innermost wait, or to being busy; returns now. With the lock held."""
        now = self._clock()
        passed, self._since = now - self._since, now
        if self._waiting:
            whom = self._waiting[-1]
            self._waited[whom] = self._waited.get(whom, 0) + passed
        else:
            self._busy += passed
        return now

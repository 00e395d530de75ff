"""Counters of a party since its process started, from its events; shown by sl_queue.observe.prometheus.

The law: time is attributed once. At every moment the worker is busy, or waits for the innermost thing that it waits
for, so that `busy_s` and all of `waited_s` add up to the age, and none of them ever falls. Nanoseconds are whole
numbers: sums of floats would fall by their rounding.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

from sl_queue.protocol.events import (
    Committed,
    Event,
    HandCame,
    HandLeft,
    Received,
    Reconnected,
    Resent,
    Sent,
    WaitBegan,
    Waited,
)
from sl_queue.protocol.measures import Connectivity, Measures
from sl_queue.protocol.totals import Now, Totals

NS = 1e9
FLOAT32_BYTES = 4

Whom = tuple[str, str]  # (source, cause)

COUNTED = (
    *("sent_bytes", "received_bytes", "tensor_bytes", "float32_bytes"),
    *("resent", "commits", "reconnects"),
)


class Meter:
    """An observer. Mutable and thread-safe: events of the worker, the link and the pulse count. Only the worker waits.

    `clock`: nanoseconds, monotonic. `leads`: hands may compute for the worker.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, *, leads: bool = False) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._began = self._since = clock()
        self._busy = 0
        self._waited: dict[Whom, int] = {}
        self._waiting: list[tuple[Whom, int]] = []  # since when; a commit may settle inside of a receive
        self._counts: Counter[str] = Counter()
        self._hands = 0 if leads else None

    def __call__(self, event: Event, /) -> None:
        """Count an event; time between a `WaitBegan` and its `Waited` is that wait's, except for waits inside of it."""
        with self._lock:
            match event:
                case Sent():
                    self._counts["sent_bytes"] += event.bytes
                    self._counts["tensor_bytes"] += event.bytes if event.numbers else 0
                    self._counts["float32_bytes"] += FLOAT32_BYTES * event.numbers
                case Received():
                    self._counts["received_bytes"] += event.bytes
                case WaitBegan():
                    self._waiting.append(((event.source, event.cause), self._attribute()))
                case Waited():
                    self._attribute()
                    self._waiting.pop()
                case Committed():
                    self._counts["commits"] += 1
                case Resent():
                    self._counts["resent"] += event.messages
                case Reconnected():
                    self._counts["reconnects"] += 1
                case HandCame() | HandLeft():
                    self._hands = event.hands
                case _:
                    pass

    def read(
        self, messages: Mapping[str, int], silent_s: Mapping[str, float], pulse_age_s: float, broker: Connectivity
    ) -> Measures:
        """Return everything so far, a wait that goes on included."""
        with self._lock:
            now, counts = self._attribute(), self._counts
            return Measures(
                age_s=(now - self._began) / NS,
                busy_s=self._busy / NS,
                pulse_age_s=pulse_age_s,
                waited_s={whom: waited / NS for whom, waited in self._waited.items()},
                silent_s=silent_s,
                messages=messages,
                sent_bytes=counts["sent_bytes"],
                received_bytes=counts["received_bytes"],
                commits=counts["commits"],
                reconnects=counts["reconnects"],
                broker=broker,
            )

    def totals(self, messages: Mapping[str, int]) -> Totals:
        """Return everything so far, for the scheduler; `messages`: of data, by what became of them."""
        with self._lock:
            at, counts = self._attribute(), self._counts
            waited: dict[str, dict[str, float]] = {}
            for (source, cause), nanoseconds in self._waited.items():
                waited.setdefault(source, {})[cause] = nanoseconds / NS
            now = None
            if self._waiting:
                (source, cause), began = self._waiting[-1]
                now = Now(source, str(cause), (at - began) / NS)
            return Totals(
                age_s=(at - self._began) / NS,
                busy_s=self._busy / NS,
                waited_s=waited,
                messages=messages,
                now=now,
                hands=self._hands,
                **{name: counts[name] for name in COUNTED},
            )

    def _attribute(self) -> int:
        """Add the time since the last call to the innermost wait, or to being busy; returns now. With the lock held."""
        now = self._clock()
        passed, self._since = now - self._since, now
        if self._waiting:
            whom, _ = self._waiting[-1]
            self._waited[whom] = self._waited.get(whom, 0) + passed
        else:
            self._busy += passed
        return now

"""Durations for which a link could carry nothing, so that no peer's silence is counted meanwhile."""

import threading
import time
from collections.abc import Callable

from sl_queue.transport.link import Outage


class Outages:
    """A stopwatch that runs while there is a reason for an outage. Mutable and thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._before = Outage()  # those that are over
        self._since: float | None = None
        self._reason = ""

    def begin(self, reason: str) -> None:
        """Start the watch, or give a newer reason for an outage that goes on."""
        with self._lock:
            self._since = self._clock() if self._since is None else self._since
            self._reason = reason

    def end(self) -> None:
        """Stop the watch. Idempotent."""
        with self._lock:
            if self._since is not None:
                self._before = Outage(self._before.total_s + self._clock() - self._since)
            self._since, self._reason = None, ""

    def read(self) -> Outage:
        """Return the time so far, an outage that goes on included; it is asked for with every message that comes in."""
        since = self._since
        if since is None:
            return self._before  # stored before the watch stops
        with self._lock:
            since = self._since
            now_s = 0.0 if since is None else self._clock() - since
            return Outage(self._before.total_s + now_s, now_s, self._reason)

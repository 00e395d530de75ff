"""What a channel has done since its process started: counted here, shown by sl_queue.observe."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from sl_queue.ports import Measures


class Meter:
    """Mutable and thread-safe: the worker, the link and the pulse count here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = self._pulse = time.monotonic()
        self._waited: dict[tuple[str, str], float] = {}
        self._waiting: tuple[tuple[str, str], float] | None = None  # whom for and since when, while the worker waits
        self._counts: Counter[str] = Counter()

    def count(self, what: str, much: int = 1) -> None:
        """Add to sent_bytes, received_bytes, commits or reconnects."""
        with self._lock:
            self._counts[what] += much

    def beat(self) -> None:
        """The channel's own thread is alive."""
        with self._lock:
            self._pulse = time.monotonic()

    @contextmanager
    def waiting(self, source: str, cause: str) -> Iterator[None]:
        """The worker waits in the body."""
        whom, since = (source, cause), time.monotonic()
        with self._lock:
            self._waiting = whom, since
        try:
            yield
        finally:
            with self._lock:
                self._waited[whom] = self._waited.get(whom, 0.0) + time.monotonic() - since
                self._waiting = None

    def read(self, messages: dict[str, int], silent_s: dict[str, float]) -> Measures:
        """Everything so far, a wait that goes on included."""
        with self._lock:
            now, waited = time.monotonic(), dict(self._waited)
            if self._waiting is not None:
                whom, since = self._waiting
                waited[whom] = waited.get(whom, 0.0) + now - since
            counts = self._counts
            return Measures(
                age_s=now - self._began,
                pulse_age_s=now - self._pulse,
                waited_s=waited,
                silent_s=silent_s,
                messages=messages,
                sent_bytes=counts["sent_bytes"],
                received_bytes=counts["received_bytes"],
                commits=counts["commits"],
                reconnects=counts["reconnects"],
            )

"""The thread of a channel that shows, also while its owner computes, that somebody is there."""

import threading
import time
from collections.abc import Callable

from sl_queue.errors import SlQueueError


class Pulse:
    """Calls `beat` every `every_s` seconds until it is ended, or the link has failed. Mutable."""

    def __init__(self, name: str, every_s: float, beat: Callable[[], None], *, first_s: float = 0.0) -> None:
        self._every_s, self._first_s, self._beat = every_s, first_s, beat
        self._ended, self._at = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"{name}-pulse", daemon=True)

    def start(self) -> None:
        """Beat for the first time after `first_s`."""
        self._thread.start()

    @property
    def age_s(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._at

    def end(self) -> None:
        """Beat no more; what has begun goes on."""
        self._ended.set()

    def join(self) -> None:
        """Block until the thread has ended, if there is one."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        pause_s = self._first_s
        while not self._ended.wait(pause_s):
            pause_s, self._at = self._every_s, time.monotonic()
            try:
                self._beat()
            except SlQueueError:
                return  # the link has failed or is closed: its owner's thread says so

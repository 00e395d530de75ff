"""The thread of a channel that shows, also while its owner computes, that somebody is there.

By itself it knows when nobody was: a process that is stopped, or that does not get to run, beats late. Whoever counts
the silence of others leaves that time out, for he would have heard nobody.
"""

import threading
import time
from collections.abc import Callable
from math import inf

from sl_queue.errors import SlQueueError

_SLOW_BEAT_S = 1.0  # that a beat may take by itself


class Pulse:
    """Calls `beat` every `every_s` seconds until it is ended, or the link has failed. Mutable."""

    def __init__(
        self, name: str, every_s: float, beat: Callable[[], None] = lambda: None, *, first_s: float = 0.0
    ) -> None:
        self._every_s, self._first_s, self._beat = every_s, first_s, beat
        self._ended, self._at = threading.Event(), time.monotonic()
        self._absence = (
            0.0,
            inf,
        )  # seconds that are over; when the thread is due: one assignment for both
        self._thread = threading.Thread(target=self._run, name=f"{name}-pulse", daemon=True)

    def start(self) -> None:
        """Beat for the first time after `first_s`."""
        self._thread.start()

    @property
    def age_s(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._at

    def absent_s(self) -> float:
        """Return the seconds in which the process did not run: those by which beats came late, where it was a beat."""
        return self._absent_until(time.monotonic())

    def _absent_until(self, now: float) -> float:
        before_s, due_at = self._absence
        late_s = now - due_at
        return before_s + late_s if late_s > self._every_s else before_s

    def _expect(self, within_s: float) -> None:
        """Expect to be here again within so many seconds."""
        now = time.monotonic()
        self._absence = (self._absent_until(now), now + within_s)

    def end(self) -> None:
        """Beat no more; what has begun goes on."""
        self._ended.set()

    def join(self) -> None:
        """Block until the thread has ended, if there is one."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        pause_s = self._first_s
        try:
            while True:
                self._expect(pause_s)
                if self._ended.wait(pause_s):
                    return
                self._expect(_SLOW_BEAT_S)
                pause_s, self._at = self._every_s, time.monotonic()
                self._beat()
        except SlQueueError:
            return  # the link has failed or is closed: its owner's thread says so
        finally:
            self._expect(inf)

"""Deliveries that are to be acknowledged: at once, or with the next message, which saves a system call and a packet."""

import threading
from collections.abc import Sequence
from typing import Final, Literal

from sl_queue.transport.link import Tag

MOST: Final = 32  # that wait, or half of a smaller window: it may not fill up with what was dealt with
LATER_S: Final = 1.0  # that they wait at most: the broker closes a channel for one that waits for half an hour

When = Literal["now", "in a while", "with the others"]


class Acknowledgements:
    """Tags of any thread, until they are taken. Mutable, thread-safe.

    `window`: how many deliveries of a sender are not acknowledged at most, 0 for any number.
    """

    def __init__(self, window: int) -> None:
        self._lock, self._most = threading.Lock(), min(MOST, window // 2 or 1) if window else MOST
        self._tags: list[Tag] = []
        self._some_wait = False  # and somebody has been told "in a while"

    def add(self, tags: Sequence[Tag], *, later: bool) -> When:
        """Keep these, and return when they are to be taken."""
        with self._lock:
            self._tags += tags
            if not later or len(self._tags) >= self._most:
                return "now"
            if self._some_wait:
                return "with the others"
            self._some_wait = True
            return "in a while"

    def take(self) -> list[Tag]:
        """Return all, and forget them."""
        with self._lock:
            taken, self._tags = self._tags, []
            return taken

    def the_while_is_over(self) -> None:
        """Tell the next one that waits to be taken in a while."""
        with self._lock:
            self._some_wait = False

"""Messages that are sent again because a peer asks for them: how often, and what the log says of it."""

import logging
import math
import time

from sl_queue.protocol.control import Waiting
from sl_queue.protocol.messages import MicroBatch
from sl_queue.transport.sparing import Sparing

ANSWERS = 40  # of a peer's questions in one patience: it asks no more than half as often

log = logging.getLogger("sl_queue")


class Resending:
    """When each peer was answered last, and how many messages it was sent again. Mutable."""

    def __init__(self, party: str, patience_s: float) -> None:
        self._party, self._patience_s = party, patience_s
        self._answered: dict[str, float] = {}  # when each peer's last question was, monotonic
        self._counts = Sparing(patience_s)

    def may_answer(self, peer: str) -> bool:
        """Return False for a question that comes too soon: the peer asks again, and gets no more than it reads."""
        now = time.monotonic()
        if now - self._answered.get(peer, -math.inf) < self._patience_s / ANSWERS:
            return False
        self._answered[peer] = now
        return True

    def log_first(self, peer: str, waiting: Waiting, count: int) -> None:
        """Log that `count` messages were sent again, if none were for a while; else count them."""
        if count and self._counts.note(peer, count, time.monotonic()):
            first = f"{waiting.kind} {MicroBatch(waiting.step, waiting.index)}"
            log.info("%s: sent %d messages again to party %r, from %s on", self._party, count, peer, first)

    def log_counts(self, *, all_of_it: bool = False) -> None:
        """Log the counts whose interval is over; at the end, `all_of_it`."""
        for peer, count, seconds in self._counts.due(time.monotonic(), all_of_it=all_of_it):
            log.info("%s: sent %d messages again to party %r in %.0f s", self._party, count, peer, seconds)

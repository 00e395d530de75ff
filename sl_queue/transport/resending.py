"""Messages that are sent again because a peer asks for them: how often, and which of them are events."""

import math
import time

from sl_queue.protocol.control import Waiting
from sl_queue.protocol.events import Observer, Resent
from sl_queue.protocol.messages import MicroBatch
from sl_queue.transport.sparing import Sparing

ANSWERS = 40  # of a peer's questions in one patience: it asks no more than half as often


class Resending:
    """The time at which each peer was answered last, and the messages that it was sent again. Mutable."""

    def __init__(self, party: str, patience_s: float, observe: Observer) -> None:
        self._party, self._patience_s, self._observe = party, patience_s, observe
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
        """Tell that `count` messages were sent again, if none were for a while; else count them."""
        if count and self._counts.note(peer, count, time.monotonic()):
            first = f"{waiting.kind} {MicroBatch(waiting.step, waiting.index)}"
            self._observe(Resent(self._party, peer, count, first))

    def log_counts(self, *, all_of_it: bool = False) -> None:
        """Tell the counts whose interval is over; at the end, `all_of_it`."""
        for peer, count, seconds in self._counts.due(time.monotonic(), all_of_it=all_of_it):
            self._observe(Resent(self._party, peer, count, seconds=seconds))

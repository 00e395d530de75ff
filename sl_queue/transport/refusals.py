"""Refused messages, which must cost less than they bring: the first of a sender in full, the others as counts.

A peer can send garbage as fast as the broker carries it. Each refusal costs a comparison and an acknowledgement; a log
line and a copy among the dead letters are for the first few of each sender and interval. The interval is one patience,
and twice as long each time while it goes on.
"""

from collections import Counter

from sl_queue.protocol.events import Observer, Rejected, ignore
from sl_queue.transport.sparing import Sparing

COPIES = 3  # dead letters of one sender in one interval; all of them may be on their way at once


class Refusals:
    """The refusals of one role by sender. Mutable; `now` is monotonic, in seconds."""

    def __init__(self, who: str, patience_s: float, observe: Observer = ignore) -> None:
        self._who, self._sparing, self._observe = who, Sparing(patience_s), observe
        self._latest: dict[str, str] = {}
        self._copies: Counter[str] = Counter()

    def note(self, sender: str, reason: str, now: float) -> bool:
        """Count a refusal, logging it in full if it is a sender's first; True to keep a copy as a dead letter."""
        if self._sparing.note(sender, 1, now):
            self._copies[sender] = 0
            self._observe(Rejected(self._who, sender, reason))
        self._latest[sender] = reason
        self._copies[sender] += 1
        return self._copies[sender] <= COPIES

    def tell(self, now: float, *, all_of_it: bool = False) -> None:
        """Log the counts of senders whose interval is over; at the end, of all."""
        for sender, count, seconds in self._sparing.due(now, all_of_it=all_of_it):
            self._copies[sender] = 0
            self._observe(Rejected(self._who, sender, self._latest[sender], count, seconds))

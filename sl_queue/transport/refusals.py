"""Refused messages, which must cost less than they bring: the first of a sender in full, the others as counts.

A peer can send garbage as fast as the broker carries it. Each refusal costs a comparison and an acknowledgement; a log
line and a copy among the dead letters are for the first few of each sender and interval. The interval is one patience,
and twice as long each time while it goes on.
"""

import logging
import threading
from dataclasses import dataclass

COPIES = 3  # dead letters of one sender in one interval; all of them may be on their way at once
LONGEST_S = 3600.0

log = logging.getLogger("sl_queue")


@dataclass(slots=True)
class _Refused:  # mutable: a running count
    """What was refused of one sender since it was last said."""

    since: float
    interval_s: float
    copies: int = 0
    count: int = 0
    latest: str = ""


class Refusals:
    """The refusals of one role by sender. Mutable and thread-safe; `now` is monotonic, in seconds."""

    def __init__(self, who: str, patience_s: float) -> None:
        self._who, self._patience_s = who, patience_s
        self._lock = threading.Lock()
        self._refused: dict[str, _Refused] = {}

    def note(self, sender: str, reason: str, now: float) -> bool:
        """Count a refusal, logging it in full if it is a sender's first; True to keep a copy as a dead letter."""
        with self._lock:
            known = self._refused.get(sender)
            if known is None:
                known = self._refused[sender] = _Refused(now, self._patience_s)
                log.warning("%s: rejected a message of %r: %s", self._who, sender, reason)
            else:
                known.count, known.latest = known.count + 1, reason
            known.copies += 1
            return known.copies <= COPIES

    def tell(self, now: float) -> None:
        """Log the counts of senders whose interval is over, and forget senders that have stopped."""
        with self._lock:
            for sender, known in list(self._refused.items()):
                if now - known.since < known.interval_s:
                    continue
                if not known.count:
                    del self._refused[sender]
                    continue
                self._say(sender, known, now)
                interval_s = min(2 * known.interval_s, LONGEST_S)
                self._refused[sender] = _Refused(now, interval_s)

    def close(self, now: float) -> None:
        """Log what was counted and not said yet."""
        with self._lock:
            for sender, known in self._refused.items():
                if known.count:
                    self._say(sender, known, now)
            self._refused.clear()

    def _say(self, sender: str, known: _Refused, now: float) -> None:
        log.warning(
            "%s: rejected %s further messages of %r in %.0f s, the last: %s",
            self._who, f"{known.count:,}", sender, now - known.since, known.latest,
        )  # fmt: skip

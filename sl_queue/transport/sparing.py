"""Notes that are logged the first time, and then as a sum after longer and longer pauses.

So a log stays short whatever a peer does, and nothing that happened is left out of its numbers.
"""

import threading
from dataclasses import dataclass

LONGEST_S = 3600.0


@dataclass(slots=True)
class _Said:  # mutable: a running count
    """The count of one subject since it was last logged."""

    since: float
    interval_s: float
    count: int = 0


class Sparing:
    """Counts by subject, and when to say them. Mutable and thread-safe; `now` is monotonic, in seconds."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._said: dict[str, _Said] = {}

    def note(self, subject: str, count: int, now: float) -> bool:
        """Add to a subject's count; True to say this one now, as it is the first for a while."""
        with self._lock:
            known = self._said.get(subject)
            if known is None:
                self._said[subject] = _Said(now, self._interval_s)
                return True
            known.count += count
            return False

    def due(self, now: float, *, all_of_it: bool = False) -> list[tuple[str, int, float]]:
        """Take the subjects whose pause is over, with their counts and the seconds that these took."""
        due = []
        with self._lock:
            for subject, known in list(self._said.items()):
                if now - known.since < known.interval_s and not all_of_it:
                    continue
                if known.count:
                    due.append((subject, known.count, now - known.since))
                    self._said[subject] = _Said(now, min(2 * known.interval_s, LONGEST_S))
                else:
                    del self._said[subject]
        return due

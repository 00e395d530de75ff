"""Sources that a worker waits for: silent ones are named with the time, and given up in the end."""

import threading
import time
from collections.abc import Callable, Iterable

from sl_queue.errors import AlignmentError, BrokerUnreachable, PeerSilent
from sl_queue.protocol.events import Observer, StillWaiting, ignore
from sl_queue.protocol.scheduler.state import GIVE_UP
from sl_queue.protocol.text import printable
from sl_queue.transport.link import Outage


class Liveness:
    """The time at which each source was heard last. Mutable; thread-safe: a lock keeps its clock, entries are assigned.

    `is_unreadable`: True of a source of which nothing could be opened. `outage`: of the own link; while it lasts nobody
    can be heard, so it counts as nobody's silence. Nor do the seconds in which the own process was `absent`.
    """

    def __init__(
        self,
        party: str,
        patience_s: float,
        is_unreadable: Callable[[str], bool],
        outage: Callable[[], Outage] = Outage,
        clock: Callable[[], float] = time.monotonic,
        observe: Observer = ignore,
        absent_s: Callable[[], float] = float,
    ) -> None:
        self._party, self._patience_s, self._is_unreadable = party, patience_s, is_unreadable
        self._outage, self._absent_s, self._clock, self._observe = outage, absent_s, clock, observe
        self._lock, self._listened_for_s, self._looked_at = threading.Lock(), 0.0, clock()
        self._looked = (0.0, 0.0)  # at the outage and the absence, in seconds
        self._heard: dict[str, float] = {}  # by a clock that stands still while nobody can be heard

    def hear(self, sources: Iterable[str]) -> None:
        """Note that something came from these."""
        now_s = self._listened_s()
        for source in sources:
            self._heard[source] = now_s

    def silence_s(self, source: str) -> float:
        """Return the seconds since `source` was heard of, without those in which nothing could be."""
        return max(0.0, self._listened_s() - self._heard[source])

    def _listened_s(self) -> float:
        with self._lock:
            outage_s, absent_s = self._outage().total_s, self._absent_s()
            now, before, self._looked = self._clock(), self._looked, (outage_s, absent_s)
            lost_s = max(outage_s - before[0], absent_s - before[1])  # a stop in an outage is one loss, not two
            self._listened_for_s += max(0.0, now - self._looked_at - lost_s)
            self._looked_at = now
            return self._listened_for_s

    def name(self, source: str, what: str, waited_s: float, foreign: str | None = None) -> None:
        """Tell whom we wait for; `foreign`: it speaks another version, and what to do.

        Raises PeerSilent or AlignmentError for one who has been silent for too long.
        """
        outage = self._outage()
        if outage.reason:
            why = printable(outage.reason)
            self._observe(StillWaiting(self._party, what, waited_s, outage_s=outage.now_s, reason=why))
            return
        silent_s = self.silence_s(source)
        self._observe(StillWaiting(self._party, what, waited_s, silent_s=silent_s))
        if silent_s <= GIVE_UP * self._patience_s:
            return  # also if nothing of it could be opened: whoever runs the broker can put in what nobody can open
        if self._is_unreadable(source):
            raise AlignmentError(
                f"no message of {source!r} can be opened by party {self._party!r}: their jobs do not have the same "
                "[security]; every party needs the same job file"
            )
        if foreign is not None:
            raise AlignmentError(foreign)
        raise PeerSilent(
            f"party {self._party!r} waits for {what}, which has been silent for {silent_s:.0f} s "
            f"({GIVE_UP} times patience); start that worker and this one again: the run resumes"
        )

    def name_broker(self, waited_s: float, connected_s: float) -> None:
        """Say that the broker confirms nothing. Raises BrokerUnreachable if it was connected for too long of that."""
        why = printable(self._outage().reason) or "it may have a resource alarm, or a receiver's queue is full"
        what = f"waited {waited_s:.0f} s for the broker to confirm what was sent: {why}"
        self._observe(StillWaiting(self._party, "the broker to confirm what was sent", waited_s, reason=why))
        if connected_s > GIVE_UP * self._patience_s:
            raise BrokerUnreachable(f"party {self._party!r} {what}; start this worker again: it resumes")

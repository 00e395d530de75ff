"""Whom a worker waits for: who has been silent for how long is named, and given up in the end."""

import logging
import time
from collections.abc import Callable, Iterable

from sl_queue.errors import AlignmentError, BrokerUnreachable, PeerSilent
from sl_queue.protocol.run_state import GIVE_UP

log = logging.getLogger("sl_queue")


class Patience:
    """When each source was heard of last. Mutable; thread-safe, as every entry is one assignment.

    `is_stranger`: whether nothing that a source sent could be opened.
    """

    def __init__(self, party: str, patience_s: float, is_stranger: Callable[[str], bool]) -> None:
        self._party, self._patience_s, self._is_stranger = party, patience_s, is_stranger
        self._heard: dict[str, float] = {}

    def hear(self, sources: Iterable[str]) -> None:
        """Something came from these."""
        self._heard.update(dict.fromkeys(sources, time.monotonic()))

    def silence_s(self, source: str) -> float:
        """Seconds since anything was heard of `source`."""
        return time.monotonic() - self._heard[source]

    def name(self, source: str, what: str, waited_s: float) -> None:
        """Say whom we wait for. Raises PeerSilent or AlignmentError for one who has been silent for too long."""
        silent_s = self.silence_s(source)
        log.warning(
            "%s: waiting for %s since %.0f s; last heard of it %.0f s ago", self._party, what, waited_s, silent_s
        )
        if silent_s <= GIVE_UP * self._patience_s:
            return  # also if nothing of it could be opened: whoever runs the broker can put in what nobody can open
        if self._is_stranger(source):
            raise AlignmentError(
                f"no message of {source!r} can be opened by party {self._party!r}: their jobs do not have the same "
                "[security]; every party needs the same job file"
            )
        raise PeerSilent(
            f"party {self._party!r} waits for {what}, which has been silent for {silent_s:.0f} s "
            f"({GIVE_UP} times patience); start that worker and this one again: the run resumes"
        )

    def name_broker(self, waited_s: float) -> None:
        """Say that the broker confirms nothing. Raises BrokerUnreachable for one that has not for too long."""
        what = (
            f"the broker to confirm what was sent since {waited_s:.0f} s: an alarm of its, or a receiver's full queue"
        )
        log.warning("%s: waiting for %s", self._party, what)
        if waited_s > GIVE_UP * self._patience_s:
            raise BrokerUnreachable(f"party {self._party!r} waited for {what}; start this worker again: it resumes")

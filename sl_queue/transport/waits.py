"""Waits of a party's worker for messages and orders: it asks with growing pauses, and names whoever is silent."""

import time
from collections.abc import Callable
from typing import TypeVar

from sl_queue.errors import AlignmentError
from sl_queue.protocol.events import Foreign
from sl_queue.protocol.messages import BEFORE_FIRST_STEP
from sl_queue.transport.reporting import Reports
from sl_queue.transport.shared import Shared

T = TypeVar("T")


class Waits:
    """Used by the worker's thread; `wake` by any. Mutable: it knows whether somebody wants the worker.

    `check` raises what ends or redirects the worker; it is called with the lock held. `between`: what a worker that was
    woken does.
    """

    def __init__(self, shared: Shared, reports: Reports, check: Callable[[], None]) -> None:
        self._party, self._patience_s = shared.party, shared.patience_s
        self._mail, self._timeline, self._changed = shared.mail, shared.timeline, shared.changed
        self._liveness, self._observe = shared.liveness, shared.observe
        self._reports, self._check = reports, check
        self._woken = False
        self.between: Callable[[], None] = _nothing

    def wake(self) -> None:
        """Have a worker that waits call `between` once, in its own thread."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def until(self, take: Callable[[], T | None], source: str, what: str, ask: Callable[[float], None]) -> T:
        """Block until `take` gives something; ask for it with growing pauses, and name whom we wait for."""
        began, name_at = time.monotonic(), self._patience_s
        ask_at = pause_s = self._patience_s / 20
        while True:
            with self._changed:
                self._check()
                taken = take()
                if taken is not None:
                    return taken
                if not self._timeline.announce and not self._woken:
                    self._changed.wait(min(0.5, pause_s))
                woken, self._woken = self._woken, False
            if woken:
                self.between()
            self._reports.announce_if_needed()
            waited = time.monotonic() - began
            if waited >= ask_at:
                ask(waited)
                pause_s = min(2 * pause_s, self._patience_s)
                ask_at = waited + pause_s
            if waited >= name_at:
                name_at += self._patience_s
                self._name(source, what, waited)

    def _name(self, source: str, what: str, waited_s: float) -> None:
        """Log whom we wait for. Raises AlignmentError for a peer of another version, unless the run was going on.

        Then that peer alone is refused, and waited for like one that is silent.
        """
        foreign = self._mail.foreign()
        for sender, reason in foreign.items():
            if not self._mail.has_understood(sender) and self._timeline.committed == BEFORE_FIRST_STEP:
                raise AlignmentError(reason)
            self._observe(Foreign(self._party, sender, reason))
        self._liveness.name(source, what, waited_s, foreign.get(source))


def _nothing() -> None:
    """Do nothing."""

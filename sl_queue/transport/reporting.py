"""Reports of a party about itself: that it is here, where it is, that it lives, and what it waits for."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.control import Alive, Failed, Finished, Join, Progress, Report, Stopped
from sl_queue.protocol.messages import SCHEDULER, Header, Kind, Masked, MicroBatch
from sl_queue.protocol.totals import TOTALS_S, Totals
from sl_queue.transport.shared import Shared

PULSE_S = 0.25  # how often progress is reported


def alive_every_s(patience_s: float) -> float:
    """Return the seconds between two signs of life."""
    return min(patience_s / 4, 5.0)


def report_every_s(patience_s: float) -> float:
    """Return the seconds between two looks at what there is to report."""
    return min(PULSE_S, alive_every_s(patience_s))


class Reports:
    """The reports of one party to the scheduler and to its peers, `receivers`. Mutable, thread-safe."""

    def __init__(self, shared: Shared, receivers: tuple[str, ...], totals: Callable[[], Totals] | None = None) -> None:
        self._mail, self._timeline, self._changed = shared.mail, shared.timeline, shared.changed
        self._link = shared.link
        self._liveness, self._patience_s = shared.liveness, shared.patience_s
        self._party, self._incarnation, self._receivers = shared.party, shared.incarnation, receivers
        self._describe: Callable[[], Join] | None = None
        self._progress: Progress | None = None
        self._reporting = threading.RLock()  # entered again where memory:// delivers on the publisher's thread
        self._alive_every_s, self._alive_at = alive_every_s(self._patience_s), 0.0
        self._totals, self._totals_at = totals, 0.0

    def announce(self, describe: Callable[[], Join]) -> None:
        """Report who is here, now and whenever the scheduler has to hear it again."""
        self._describe = describe
        self.announce_again()
        self.announce_if_needed()

    def announce_again(self, waited_s: float = 0.0) -> None:
        """Have the scheduler hear once more who is here, as soon as the worker waits."""
        with self._changed:
            self._timeline.announce = True

    def announce_if_needed(self) -> None:
        """Report who is here if the scheduler has not heard it."""
        with self._changed:
            again, self._timeline.announce = self._timeline.announce, False
            scheduler = self._timeline.scheduler_incarnation or ""
        if again and self._describe is not None:
            self.report(replace(self._describe(), to=scheduler))

    def report(self, report: Report) -> None:
        """Send the scheduler a report that lasts."""
        self._send_progress()  # what is reported last is the newest
        if isinstance(report, Finished | Failed | Stopped):
            self._tell_totals()  # whoever ends within a second has told none, or not its last ones
        self.send(SCHEDULER, report, lasting=True)

    def progress(self, report: Progress) -> None:
        """Report this some time soon, unless something newer comes."""
        with self._changed:
            self._progress = report

    def ask(self, sender: str, kind: Kind, micro_batch: MicroBatch, waited_s: float) -> None:
        """Ask a peer for a message, and report to the scheduler that it is awaited.

        Raises RemoteProtocolError for a message that was refused each time it came.
        """
        with self._changed:
            unusable = self._timeline.mailbox.ask(sender, kind, micro_batch)
        if unusable is not None and waited_s >= self._patience_s:
            raise RemoteProtocolError(
                f"party {self._party!r} waits for {kind} {micro_batch} of {sender!r}; what is computed from it is "
                f"refused: {unusable}; compare job, models and versions of both parties"
            )
        silent_s = self._liveness.silence_s(sender)
        waiting = self._timeline.waiting(sender, kind, micro_batch, waited_s, silent_s)
        self.send(sender, waiting)
        self.send(SCHEDULER, waiting)

    def send(self, receiver: str, report: Report, *, lasting: bool = False) -> None:
        """Send a report; one that does not last is worth nothing later."""
        header = self._timeline.header(receiver, report)
        self._mail.send(receiver, header, report, lasting=lasting)

    def send_apart(self, receiver: str, message: Masked, session: str) -> None:
        """Send what belongs to no run, and is worth nothing later."""
        header = Header(session, 0, message.kind, self._party, receiver, message.micro_batch)
        self._link.publish(
            receiver, message.kind, session, self._mail.sealed(receiver, header, message), persistent=False
        )

    def beat(self) -> None:
        """Report progress as soon as there is some, totals once a second, and a sign of life a few times a patience."""
        self._send_progress()
        now = time.monotonic()
        if now >= self._alive_at:
            self._alive_at = now + self._alive_every_s
            for receiver in self._receivers:
                self.send(receiver, Alive(self._incarnation))
        if now >= self._totals_at:
            self._totals_at = now + TOTALS_S
            self._tell_totals()

    def _tell_totals(self) -> None:
        if self._totals is not None:
            with self._reporting:  # so that no other thread's older ones follow
                self.send(SCHEDULER, Alive(self._incarnation, self._totals()))

    def _send_progress(self) -> None:
        """Take the newest progress and send it as one, so that no other thread sends a newer one in between."""
        with self._reporting:
            with self._changed:
                progress, self._progress = self._progress, None
            if progress is not None:
                self.send(SCHEDULER, progress)

"""The scheduler's channel: reports from anyone in, commands out; acknowledged when their effect is on disk.

What has been reported and not taken is bounded for each sender: by the broker to PREFETCH messages, and here to
INBOX_BYTES. More than that no worker has to say at once; what it says of the moment it says again.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from sl_queue.errors import SlQueueError
from sl_queue.protocol.codec import MAX_CONTROL_BYTES, Terms
from sl_queue.protocol.control import Alive, Command, Report, Status, kind_of
from sl_queue.protocol.events import Observer, ignore
from sl_queue.protocol.measures import Connectivity
from sl_queue.protocol.messages import SCHEDULER, Header, MicroBatch
from sl_queue.protocol.topology import Topology
from sl_queue.security.sealing import Seal
from sl_queue.transport.link import Link, Tag
from sl_queue.transport.mail import Letter, Mail, Spoilt
from sl_queue.transport.pulse import Pulse
from sl_queue.transport.reporting import alive_every_s

PREFETCH = 256  # reports of one sender that the broker hands over unacknowledged
INBOX_BYTES = 16 * 1024 * 1024  # of one sender: PREFETCH reports of 64 KiB, or a few of a whole history
REPORT_BYTES = MAX_CONTROL_BYTES + 4096  # the largest body with its header, before it is sealed


class LinkSchedulerChannel:
    """ports.SchedulerChannel over a link; `seal` keeps messages from the broker."""

    def __init__(
        self,
        link: Link,
        topology: Topology,
        incarnation: str,
        *,
        patience_s: float,
        seal: Seal | None = None,
        observe: Observer = ignore,
    ) -> None:
        self._link, self._parties, self._incarnation = link, topology.parties, incarnation
        senders = topology.senders_to(SCHEDULER)
        terms = {sender: Terms.between(topology, sender, SCHEDULER) for sender in senders}
        self._mail = Mail(
            link,
            SCHEDULER,
            terms,
            incarnation,
            patience_s=patience_s,
            largest=dict.fromkeys(senders, REPORT_BYTES),
            seal=seal,
            fresh_only=True,
            observe=observe,
        )
        self._changed = threading.Condition()
        self._inbox: deque[tuple[str, Report, bool, Tag]] = deque()
        self._waiting_bytes: Counter[str] = Counter()  # in the inbox, by sender
        self._taken: list[Tag] = []
        self._failure: SlQueueError | None = None
        self._asked_at = time.monotonic()
        self._pulse = Pulse(SCHEDULER, alive_every_s(patience_s), self._beat)

    def open(self) -> None:
        """Connect and consume. Raises BrokerUnreachable, PartyBusy."""
        self._mail.open(self)
        self._pulse.start()

    def close(self) -> None:
        """Flush what was published, then leave."""
        self._pulse.end()
        try:
            self._mail.close(failed=self._failure is not None)
        finally:
            self._pulse.join()

    @property
    def pulse_age_s(self) -> float:
        """Seconds since the scheduler's loop last asked for reports; it does so several times a second."""
        return time.monotonic() - self._asked_at

    @property
    def connectivity(self) -> Connectivity:
        """The connection to the broker, now."""
        return self._mail.connectivity

    def reports(self, timeout_s: float) -> Sequence[tuple[str, Report, bool]]:
        self._asked_at = time.monotonic()
        deadline = self._asked_at + timeout_s
        with self._changed:
            while not self._inbox and self._failure is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if self._failure is not None:
                raise self._failure
            taken = list(self._inbox)
            self._inbox.clear()
            self._waiting_bytes.clear()
            self._taken += [tag for *_, tag in taken]
        return [(sender, report, redelivered) for sender, report, redelivered, _ in taken]

    def deaf_s(self) -> float:
        return self._link.outage().total_s + self._pulse.absent_s()

    def unreadable_senders(self) -> Sequence[str]:
        return [party for party in self._parties if self._mail.is_unreadable(party)]

    def foreign(self) -> Mapping[str, str]:
        return self._mail.foreign()

    def command(self, party: str, command: Command | Status) -> None:
        if isinstance(command, Status):
            command = replace(command, incarnation=self._incarnation)
        self._send(party, command, lasting=True)

    def acknowledge(self) -> None:
        with self._changed:
            tags, self._taken = self._taken, []
        self._link.acknowledge(tags)

    def _send(self, receiver: str, message: Command | Status | Alive, *, lasting: bool) -> None:
        header = Header("", 0, kind_of(message), SCHEDULER, receiver, MicroBatch(0, 0))
        self._mail.send(receiver, header, message, lasting=lasting)

    def _beat(self) -> None:
        """Give every party a sign of life, so that a worker that waits for an order knows that somebody is there."""
        self._mail.log_refusals()
        for party in self._parties:
            self._greet(party)

    def _greet(self, party: str) -> None:
        self._send(party, Alive(self._incarnation), lasting=False)

    # What the mail and its link call ----------------------------------------------------------------------------

    def on_letter(self, letter: Letter) -> None:
        delivery, sender = letter.delivery, letter.header.sender
        report: Report = letter.message  # type: ignore[assignment]  # no other kind is sent to the scheduler
        with self._changed:
            waiting = self._waiting_bytes[sender] + len(delivery.body)
            if fits := waiting <= INBOX_BYTES:
                self._waiting_bytes[sender] = waiting
                self._inbox.append((sender, report, delivery.redelivered, delivery.tag))
                self._changed.notify_all()
        if not fits:
            why = f"{INBOX_BYTES} bytes of reports wait already; say it again later"
            self._mail.refuse(sender, delivery.tag, why)

    def on_late(self, letter: Letter) -> None:
        """Greet who has not heard of this scheduler."""
        if letter.header.sender in self._parties:
            with suppress(SlQueueError):  # the link has failed or is closed: the scheduler's thread says so
                self._greet(letter.header.sender)

    def on_spoilt(self, spoilt: Spoilt) -> None:
        self._mail.refuse(spoilt.delivery.sender, spoilt.delivery.tag, str(spoilt.reason))

    def on_reconnect(self) -> None:
        with self._changed:
            self._waiting_bytes.clear()
            self._inbox.clear()  # every report that was not acknowledged comes again
            self._taken.clear()
            self._mail.take_again()

    def on_failure(self, error: SlQueueError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    fail = on_failure

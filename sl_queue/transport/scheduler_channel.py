"""The scheduler's channel: reports from anyone in, commands out; acknowledged when their effect is on disk.

What has been reported and not taken is bounded for each sender: by the broker to PREFETCH messages, and here to
INBOX_BYTES. More than that no worker has to say at once; what it says of the moment it says again.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sl_queue.errors import RemoteProtocolError, SlQueueError
from sl_queue.ports import Connectivity
from sl_queue.protocol.codec import MAX_CONTROL_BYTES, AnotherVersion, decode, encode
from sl_queue.protocol.events import Observer, ignore
from sl_queue.protocol.messages import (
    OPERATOR,
    SCHEDULER,
    Alive,
    Command,
    Header,
    Joined,
    Kind,
    Lost,
    Message,
    MicroBatch,
    Progress,
    Report,
    Status,
    StopRequest,
    Waiting,
    kind_of,
)
from sl_queue.security.sealing import OVERHEAD_BYTES, News, Opened, Seal
from sl_queue.transport.link import Delivery, Link, Tag
from sl_queue.transport.refusals import Refusals
from sl_queue.transport.versions import Versions

OF_THE_MOMENT = (Alive, Joined, Lost, Progress, StopRequest, Waiting)  # an old one would mislead; all others are facts

PREFETCH = 256  # reports of one sender that the broker hands over unacknowledged
INBOX_BYTES = 16 * 1024 * 1024  # of one sender: PREFETCH reports of 64 KiB, or a few of a whole history
REPORT_BYTES = MAX_CONTROL_BYTES + OVERHEAD_BYTES + 4096  # the largest body, sealed and with its header


class LinkSchedulerChannel:
    """ports.SchedulerChannel over a link; `seal` keeps messages from the broker."""

    def __init__(
        self,
        link: Link,
        parties: tuple[str, ...],
        incarnation: str,
        *,
        patience_s: float,
        seal: Seal | None = None,
        observe: Observer = ignore,
    ) -> None:
        self._link, self._parties, self._incarnation, self._patience_s = link, parties, incarnation, patience_s
        self._seal, self._news = seal, News(seal)
        self._refusals, self._versions = Refusals(SCHEDULER, patience_s, observe), Versions(patience_s)
        self._changed = threading.Condition()
        self._inbox: deque[tuple[str, Report, bool, Tag]] = deque()
        self._waiting_bytes: Counter[str] = Counter()  # in the inbox, by sender
        self._taken: list[Tag] = []
        self._failure: SlQueueError | None = None
        self._asked_at = time.monotonic()
        self._closed = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="scheduler-pulse", daemon=True)

    def open(self) -> None:
        """Connect and consume. Raises BrokerUnreachable, PartyBusy."""
        self._link.open(self._on_delivery, self._on_reconnect, self._on_failure)
        self._pulse.start()

    def close(self) -> None:
        """Flush what was published, then leave."""
        self._closed.set()
        if self._failure is None:
            self._link.flush(timeout_s=5.0)
        self._link.close()
        self._refusals.tell(time.monotonic(), all_of_it=True)
        if self._pulse.ident is not None:
            self._pulse.join()

    @property
    def pulse_age_s(self) -> float:
        """Seconds since the scheduler's loop last asked for reports; it does so several times a second."""
        return time.monotonic() - self._asked_at

    @property
    def connectivity(self) -> Connectivity:
        """The connection to the broker, now."""
        return self._link.connectivity

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

    def outage_s(self) -> float:
        return self._link.outage().total_s

    def strangers(self) -> Sequence[str]:
        return [] if self._seal is None else [party for party in self._parties if self._seal.never_opened(party)]

    def foreign(self) -> Mapping[str, str]:
        """Name the parties of which nothing came for a patience but messages of another version, with what is wrong."""
        return self._versions.named(time.monotonic())

    def command(self, party: str, command: Command | Status) -> None:
        if isinstance(command, Status):
            command = replace(command, incarnation=self._incarnation)
        self._publish(party, command, persistent=True, expires_s=None)

    def acknowledge(self) -> None:
        with self._changed:
            tags, self._taken = self._taken, []
        self._link.acknowledge(tags)

    def _publish(
        self, receiver: str, message: Command | Status | Alive, *, persistent: bool, expires_s: float | None
    ) -> None:
        kind = kind_of(message)
        body = encode(Header("", 0, kind, SCHEDULER, receiver, MicroBatch(0, 0)), message)
        if self._seal is not None:
            body = self._seal.seal(receiver, body)
        self._link.publish(receiver, kind, "", body, persistent=persistent, expires_s=expires_s)

    def _beat(self) -> None:
        """A sign of life to every party, so that a worker that waits for an order knows that somebody is there."""
        while not self._closed.is_set():
            try:
                self._refusals.tell(time.monotonic())
                for party in self._parties:
                    self._greet(party)
            except SlQueueError:
                return  # the link has failed or is closed: the scheduler's thread says so
            self._closed.wait(min(self._patience_s / 4, 5.0))

    def _greet(self, party: str) -> None:
        self._publish(party, Alive(self._incarnation), persistent=False, expires_s=self._patience_s)

    def _on_delivery(self, delivery: Delivery) -> None:
        try:
            opened, message = self._read(delivery)
        except RemoteProtocolError as error:
            if isinstance(error, AnotherVersion):
                self._versions.foreign(delivery.sender, error.speaks, time.monotonic())
            self._refuse(delivery, str(error))
            return
        self._versions.understood(delivery.sender)
        if self._is_late(delivery.sender, message, opened):
            self._link.acknowledge([delivery.tag])
            return
        with self._changed:
            waiting = self._waiting_bytes[delivery.sender] + len(delivery.body)
            if fits := waiting <= INBOX_BYTES:
                self._waiting_bytes[delivery.sender] = waiting
                self._inbox.append((delivery.sender, message, delivery.redelivered, delivery.tag))
                self._changed.notify_all()
        if not fits:
            self._refuse(delivery, f"{INBOX_BYTES} bytes of reports wait already; say it again later")

    def _read(self, delivery: Delivery) -> tuple[Opened | None, Report]:
        """Open and decode a delivery. Raises RemoteProtocolError for all that is no report to the scheduler."""
        sender, size = delivery.sender, len(delivery.body)
        if size > REPORT_BYTES:
            raise RemoteProtocolError(f"a message of {size} bytes; a report has at most {REPORT_BYTES}")
        opened = None if self._seal is None else self._seal.open(sender, delivery.body)
        header, message = decode(delivery.body if opened is None else opened.body)
        if header.sender != sender:
            raise RemoteProtocolError(f"says it is from {header.sender!r:.100}, but came from {sender!r}")
        if header.kind is not Kind.REPORT or (isinstance(message, StopRequest) != (sender == OPERATOR)):
            raise RemoteProtocolError(f"a {type(message).__name__} from {sender!r} to the scheduler")
        return opened, message  # type: ignore[return-value]  # a Report by its kind

    def _refuse(self, delivery: Delivery, reason: str) -> None:
        if self._refusals.note(delivery.sender, reason, time.monotonic()):
            self._link.reject(delivery.tag, reason)
        else:
            self._link.acknowledge([delivery.tag])

    def _is_late(self, sender: str, message: Message, opened: Opened | None) -> bool:
        """Whether it was said before, or to an earlier scheduler; who has not heard of this one is greeted at once."""
        if not isinstance(message, OF_THE_MOMENT):
            return False
        if opened is not None and opened.fresh and not self._news.is_news(opened, message.type):
            return True
        if (opened is None or opened.fresh) and self._is_for_me(message):
            return False
        if sender in self._parties:
            try:
                self._greet(sender)
            except SlQueueError:
                pass  # the link has failed or is closed: the scheduler's thread says so
        return True

    def _is_for_me(self, message: Message) -> bool:
        """Who joins, or asks for a stop, says which scheduler it has heard of."""
        return not isinstance(message, Joined | StopRequest) or message.to == self._incarnation

    def _on_reconnect(self) -> None:
        with self._changed:
            self._waiting_bytes.clear()
            self._inbox.clear()  # every report that was not acknowledged comes again
            self._taken.clear()
            self._news.forget()

    def _on_failure(self, error: SlQueueError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    fail = _on_failure

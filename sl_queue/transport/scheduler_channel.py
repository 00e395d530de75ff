"""The scheduler's channel: reports from anyone in, commands out; acknowledged when their effect is on disk."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from sl_queue.errors import RemoteProtocolError, SlQueueError
from sl_queue.ports import Connectivity
from sl_queue.protocol.codec import decode, encode
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
from sl_queue.transport.link import Delivery, Link, Tag
from sl_queue.transport.seal import News, Opened, Seal

OF_THE_MOMENT = (Alive, Joined, Lost, Progress, StopRequest, Waiting)  # an old one would mislead; all others are facts

log = logging.getLogger("sl_queue")


class LinkSchedulerChannel:
    """ports.SchedulerChannel over a link; `seal` keeps messages from the broker."""

    def __init__(
        self, link: Link, parties: tuple[str, ...], incarnation: str, *, patience_s: float, seal: Seal | None = None
    ) -> None:
        self._link, self._parties, self._incarnation, self._patience_s = link, parties, incarnation, patience_s
        self._seal, self._news = seal, News()
        self._changed = threading.Condition()
        self._inbox: deque[tuple[str, Report, Tag]] = deque()
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

    def reports(self, timeout_s: float) -> Sequence[tuple[str, Report]]:
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
            self._taken += [tag for _, _, tag in taken]
        return [(sender, report) for sender, report, _ in taken]

    def strangers(self) -> Sequence[str]:
        return [] if self._seal is None else [party for party in self._parties if self._seal.never_opened(party)]

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
                for party in self._parties:
                    self._greet(party)
            except SlQueueError:
                return  # the link has failed or is closed: the scheduler's thread says so
            self._closed.wait(min(self._patience_s / 4, 5.0))

    def _greet(self, party: str) -> None:
        self._publish(party, Alive(self._incarnation), persistent=False, expires_s=self._patience_s)

    def _on_delivery(self, delivery: Delivery) -> None:
        try:
            opened = None if self._seal is None else self._seal.open(delivery.sender, delivery.body)
            header, message = decode(delivery.body if opened is None else opened.body)
            if header.sender != delivery.sender:
                raise RemoteProtocolError(f"says it is from {header.sender!r}, but came from {delivery.sender!r}")
            if header.kind is not Kind.REPORT or (isinstance(message, StopRequest) != (delivery.sender == OPERATOR)):
                raise RemoteProtocolError(f"a {type(message).__name__} from {delivery.sender!r} to the scheduler")
        except RemoteProtocolError as error:
            log.warning("scheduler: rejected a message: %s", error)
            self._link.reject(delivery.tag, str(error))
            return
        if self._is_late(delivery.sender, message, opened):
            self._link.acknowledge([delivery.tag])
            return
        with self._changed:
            self._inbox.append((delivery.sender, message, delivery.tag))  # type: ignore[arg-type]  # a Report by its kind
            self._changed.notify_all()

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
            self._inbox.clear()  # every report that was not acknowledged comes again
            self._taken.clear()
            self._news.forget()

    def _on_failure(self, error: SlQueueError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    fail = _on_failure

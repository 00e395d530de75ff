"""The scheduler's channel: reports from anyone in, commands out; acknowledged when their effect is on disk."""

import threading
import time
from collections import deque
from collections.abc import Sequence

from sl_queue.errors import RemoteProtocolError, SlQueueError
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import (
    OPERATOR,
    SCHEDULER,
    Alive,
    Command,
    Header,
    Kind,
    MicroBatch,
    Report,
    Status,
    StopRequest,
    kind_of,
)
from sl_queue.transport.link import Delivery, Link, Tag


class LinkSchedulerChannel:
    """ports.SchedulerChannel over a link."""

    def __init__(self, link: Link, parties: tuple[str, ...], incarnation: str, *, patience_s: float) -> None:
        self._link, self._parties, self._incarnation, self._patience_s = link, parties, incarnation, patience_s
        self._changed = threading.Condition()
        self._inbox: deque[tuple[str, Report, Tag]] = deque()
        self._taken: list[Tag] = []
        self._failure: SlQueueError | None = None
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

    def reports(self, timeout_s: float) -> Sequence[tuple[str, Report]]:
        deadline = time.monotonic() + timeout_s
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

    def command(self, party: str, command: Command | Status) -> None:
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
        self._link.publish(receiver, kind, "", body, persistent=persistent, expires_s=expires_s)

    def _beat(self) -> None:
        """A sign of life to every party, so that a worker that waits for an order knows that somebody is there."""
        while not self._closed.is_set():
            try:
                for party in self._parties:
                    alive = Alive(self._incarnation)
                    self._publish(party, alive, persistent=False, expires_s=self._patience_s)
            except SlQueueError:
                return  # the link has failed or is closed: the scheduler's thread says so
            self._closed.wait(min(self._patience_s / 4, 5.0))

    def _on_delivery(self, delivery: Delivery) -> None:
        try:
            header, message = decode(delivery.body)
            if header.sender != delivery.sender:
                raise RemoteProtocolError(f"says it is from {header.sender!r}, but came from {delivery.sender!r}")
            if header.kind is not Kind.REPORT or (isinstance(message, StopRequest) != (delivery.sender == OPERATOR)):
                raise RemoteProtocolError(f"a {type(message).__name__} from {delivery.sender!r} to the scheduler")
        except RemoteProtocolError as error:
            self._link.reject(delivery.tag, str(error))
            return
        with self._changed:
            self._inbox.append((delivery.sender, message, delivery.tag))  # type: ignore[arg-type]  # a Report by its kind
            self._changed.notify_all()

    def _on_reconnect(self) -> None:
        with self._changed:
            self._inbox.clear()  # every report that was not acknowledged comes again
            self._taken.clear()

    def _on_failure(self, error: SlQueueError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    fail = _on_failure

"""A broker in memory: the same queues, acknowledgements and redelivery as RabbitMQ, between threads of one process.

The reference that the RabbitMQ link is tested against, and what `memory://` runs on. Deliveries run on the publisher's
thread; a consumer that holds `prefetch` unacknowledged messages of one sender gets no more of them.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sl_queue.errors import PartyBusy, SlQueueError, TransportError
from sl_queue.protocol.measures import IN_PROCESS, Connectivity
from sl_queue.protocol.messages import OPERATOR, Kind
from sl_queue.protocol.topology import Topology
from sl_queue.transport.link import NO_OUTAGE, Delivery, Outage, Tag

log = logging.getLogger("sl_queue")


@dataclass(slots=True)
class _Message:
    body: bytes = field(repr=False)
    persistent: bool = False
    redelivered: bool = False


@dataclass(slots=True)
class _Queue:
    """The messages that one receiver reads of one sender."""

    receiver: str
    sender: str
    ready: deque[_Message] = field(default_factory=deque)
    unacknowledged: dict[Tag, _Message] = field(default_factory=dict)
    consumer: "MemoryLink | None" = None
    delivering: bool = False  # one thread at a time hands messages over, so that order is kept


class MemoryBroker:
    """All queues of one job; `link` gives a party its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[tuple[str, str], _Queue] = {}
        self._deliveries = itertools.count(1)
        self.dead_letters: list[tuple[str, str, bytes]] = []  # (party, reason, body)

    def link(self, party: str, topology: Topology, prefetch: int = 0) -> "MemoryLink":
        """Return a new end for `party`; `prefetch` messages per sender at most are unacknowledged, 0 for any number."""
        return MemoryLink(self, party, topology.senders_to(party), prefetch)

    def queue(self, receiver: str, sender: str) -> _Queue:
        with self._lock:
            return self._queues.setdefault((receiver, sender), _Queue(receiver, sender))

    def attach(self, link: "MemoryLink") -> None:
        queues = [self.queue(link.party, sender) for sender in link.senders]
        with self._lock:
            if any(queue.consumer is not None for queue in queues):
                raise PartyBusy(f"another worker already serves party {link.party!r}; stop one of the two")
            for queue in queues:
                queue.consumer = link
        for queue in queues:
            self.pump(queue)

    def detach(self, link: "MemoryLink") -> None:
        """Take a consumer away; what it did not acknowledge is at the head of its queue again."""
        with self._lock:
            for sender in link.senders:
                queue = self._queues.get((link.party, sender))
                if queue is None or queue.consumer is not link:
                    continue
                queue.consumer = None
                self._requeue(queue)

    def publish(self, receiver: str, sender: str, body: bytes, *, persistent: bool, expires: bool) -> None:
        """Append to the queue; what expires is dropped when nobody is there to read it."""
        queue = self.queue(receiver, sender)
        with self._lock:
            if expires and queue.consumer is None:
                return
            if receiver == OPERATOR:
                queue.ready.clear()  # only the newest status is worth reading
            queue.ready.append(_Message(body, persistent))
        self.pump(queue)

    def acknowledge(self, link: "MemoryLink", tags: Sequence[Tag]) -> list[tuple[str, _Message]]:
        """Forget these; returns what was known of them."""
        gone, touched = [], []
        with self._lock:
            for sender in link.senders:
                queue = self._queues.get((link.party, sender))
                if queue is None or queue.consumer is not link:
                    continue
                found = [(sender, queue.unacknowledged.pop(tag)) for tag in tags if tag in queue.unacknowledged]
                gone += found
                touched += [queue] if found else []
        for queue in touched:
            self.pump(queue)
        return gone

    def crash(self) -> None:
        """Be killed and start again: only what is persistent is still there, and every connection is a new one."""
        with self._lock:
            links = {queue.consumer for queue in self._queues.values() if queue.consumer is not None}
            for queue in self._queues.values():
                self._requeue(queue)
                queue.ready = deque(message for message in queue.ready if message.persistent)
        for link in links:
            link.reconnect()
        for queue in list(self._queues.values()):
            self.pump(queue)

    @staticmethod
    def _requeue(queue: _Queue) -> None:
        """Put what was delivered and not acknowledged at the head of its queue again."""
        back = [replace(message, redelivered=True) for _, message in sorted(queue.unacknowledged.items())]
        queue.unacknowledged.clear()
        queue.ready.extendleft(reversed(back))

    def pump(self, queue: _Queue) -> None:
        """Hand over what may be handed over, in order, by one thread at a time."""
        while True:
            with self._lock:
                link = queue.consumer
                if queue.delivering or link is None or not queue.ready:
                    return
                if link.prefetch and len(queue.unacknowledged) >= link.prefetch:
                    return
                message = queue.ready.popleft()
                tag = Tag((link.number, 0, next(self._deliveries)))
                queue.unacknowledged[tag] = message
                queue.delivering = True
            try:
                link.deliver(Delivery(queue.sender, message.body, tag, message.redelivered))
            finally:
                with self._lock:
                    queue.delivering = False


class MemoryLink:
    """One party's end of a MemoryBroker."""

    _numbers = itertools.count(1)

    def __init__(self, broker: MemoryBroker, party: str, senders: tuple[str, ...], prefetch: int) -> None:
        self._broker, self.party, self.senders, self.prefetch = broker, party, senders, prefetch
        self.number = next(self._numbers)
        self._on_delivery: Callable[[Delivery], None] | None = None
        self._on_reconnect: Callable[[], None] | None = None
        self._on_failure: Callable[[SlQueueError], None] = lambda _: None
        self._failure: SlQueueError | None = None
        self._closed = False

    def open(
        self,
        on_delivery: Callable[[Delivery], None],
        on_reconnect: Callable[[], None],
        on_failure: Callable[[SlQueueError], None],
    ) -> None:
        self._on_delivery, self._on_reconnect, self._on_failure = on_delivery, on_reconnect, on_failure
        self._broker.attach(self)

    def deliver(self, delivery: Delivery) -> None:
        """Give a delivery to its reader. What the reader fails at, or closes meanwhile, is nothing to the publisher."""
        if self._closed or self._failure is not None or self._on_delivery is None:
            return
        try:
            self._on_delivery(delivery)
        except Exception as error:
            if not self._closed:
                log.exception("%s: a delivery could not be taken", self.party)
                self._failure = SlQueueError(f"{type(error).__name__}: {error}")
                self._on_failure(self._failure)

    def reconnect(self) -> None:
        """Void earlier tags, as after a lost connection."""
        if not self._closed and self._on_reconnect is not None:
            self._on_reconnect()

    def publish(
        self, receiver: str, kind: Kind, run: str, body: bytes, *, persistent: bool, expires_s: float | None = None
    ) -> None:
        self._require_open()
        self._broker.publish(receiver, self.party, body, persistent=persistent, expires=expires_s is not None)

    def outage(self) -> Outage:
        return NO_OUTAGE

    @property
    def connectivity(self) -> Connectivity:
        return IN_PROCESS

    def mark(self) -> int:
        return 0

    def flush(self, timeout_s: float | None = None, mark: int | None = None) -> bool:
        self._require_open()
        return True

    def acknowledge(self, tags: Sequence[Tag], *, later: bool = False) -> None:
        self._broker.acknowledge(self, tags)

    def reject(self, tag: Tag, reason: str) -> None:
        for _, message in self._broker.acknowledge(self, [tag]):
            self._broker.dead_letters.append((self.party, reason, message.body))

    def close(self) -> None:
        self._closed = True
        self._broker.detach(self)

    abort = close  # in memory a lost connection and a closed one are the same: nothing was buffered

    def _require_open(self) -> None:
        if self._closed:
            raise TransportError(f"the link of party {self.party!r} is closed")
        if self._failure is not None:
            raise self._failure

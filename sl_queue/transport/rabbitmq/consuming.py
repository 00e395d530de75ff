"""Consumer of one connection: deliveries of each sender's queue, acknowledged or rejected.

`acknowledge` runs on the thread that has the link's turn, `reject` on any, all else on the link's I/O thread.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile

from sl_queue.errors import PartyBusy, SlQueueError
from sl_queue.protocol.messages import OPERATOR
from sl_queue.transport.link import Delivery, Tag
from sl_queue.transport.rabbitmq.connection import Channel, Connection
from sl_queue.transport.rabbitmq.endpoint import End, Endpoint
from sl_queue.transport.rabbitmq.failures import Denied, Lost, Refused
from sl_queue.transport.rabbitmq.frames import Piece
from sl_queue.transport.rabbitmq.names import ACCESS_REFUSED
from sl_queue.transport.rabbitmq.unconfirmed import Outgoing, Unconfirmed
from sl_queue.transport.retry import LOCKING, persist

HEAD_BYTES = 16 * 1024  # what is kept of a delivery, and shown of a dead letter
MOST_PREFETCH = 65_535  # a 16-bit field; 0 means any number

log = logging.getLogger("sl_queue")


class _Busy(Exception):
    """Another consumer has the queue."""


class Consumer:
    """The queues of a party, one a sender. Mutable: it knows what is delivered and not acknowledged."""

    def __init__(
        self,
        session: int,
        endpoint: Endpoint,
        connection: Connection,
        unconfirmed: Unconfirmed,
        on_delivery: Callable[[Delivery], None],
        end: End,
    ) -> None:
        self._session, self._endpoint, self._connection = session, endpoint, connection
        self._unconfirmed, self._on_delivery, self._end = unconfirmed, on_delivery, end
        self._senders = endpoint.topology.senders_to(endpoint.party)
        self._channels: dict[int, Channel] = {}
        self._held: list[dict[int, tuple[bytes, int]]] = [{} for _ in self._senders]  # tag -> head and size
        self.delivered = False  # whether anything was

    async def take(self, busy_s: float) -> None:
        """Become the one consumer of every queue. Raises Lost, Denied, PartyBusy."""
        for queue in range(len(self._senders)):
            await self._take(queue, busy_s)

    async def _take(self, queue: int, busy_s: float) -> None:
        """Become the one consumer of a queue; the first queue is the lock of the party."""
        who = self._endpoint.who
        try:
            await persist(
                lambda: self._consume(queue),
                on=_Busy,
                limit_s=busy_s,
                pauses=LOCKING,
                say=f"{who}: another worker serves it",
            )
        except _Busy:
            raise PartyBusy(
                f"another worker already serves {who} at {self._endpoint.address}, and did not end within "
                f"{busy_s:.0f} s; stop one of the two"
            ) from None

    async def _consume(self, queue: int) -> None:
        endpoint = self._endpoint
        name = endpoint.topology.queue(endpoint.party, self._senders[queue])
        channel = self._channels[queue] = await self._connection.channel()
        channel.on_closed = lambda why: self._end(str(why))
        await channel.prefetch(endpoint.prefetch if endpoint.prefetch <= MOST_PREFETCH else 0)
        counted = endpoint.queue_type == "quorum" and queue == 0 and endpoint.party != OPERATOR
        if counted:
            await self._require_consumers(channel, name, 0)
        try:
            await channel.consume(
                name,
                lambda tag, redelivered, body: self._deliver(queue, tag, redelivered, body),
                lambda: self._end(f"queue {name!r} was deleted or moved"),
                exclusive=endpoint.queue_type == "classic" and endpoint.party != OPERATOR,
            )
        except Refused as refused:
            if refused.code == ACCESS_REFUSED and "exclusive" in refused.text:
                raise _Busy(refused.text) from None
            if refused.code == ACCESS_REFUSED:
                raise Denied(
                    f"user {endpoint.address.user!r} needs the read right on {name!r} ({refused.text})"
                ) from None
            raise Lost(refused.text) from None
        if counted:
            await self._require_consumers(channel, name, 1)

    async def _require_consumers(self, channel: Channel, queue: str, count: int) -> None:
        """Count the consumers: quorum queues ignore that one is exclusive. Who comes second is inactive and leaves."""
        if await channel.queue(queue, None, passive=True) > count:
            await channel.close()
            self._held[0].clear()
            raise _Busy(f"queue {queue!r} has another consumer")

    def _deliver(self, queue: int, tag: int, redelivered: bool, body: Piece) -> None:
        self.delivered = True
        self._held[queue][tag] = bytes(body[:HEAD_BYTES]), len(body)
        try:
            self._on_delivery(Delivery(self._senders[queue], body, Tag((self._session, queue, tag)), redelivered))
        except Exception as error:
            log.exception("%s: a delivery could not be taken", self._endpoint.who)
            self._end("a delivery could not be taken", SlQueueError(f"{type(error).__name__}: {error}"))

    def acknowledge(self, tags: Sequence[Tag]) -> None:
        """Acknowledge those of this session; as one when they are the oldest of their queue."""
        wanted: dict[int, set[int]] = defaultdict(set)
        for session, queue, tag in tags:
            if session == self._session and tag in self._held[queue]:
                wanted[queue].add(tag)
        with suppress(Lost):  # the session is ending, and all of them will come again
            for queue, chosen in wanted.items():
                self._acknowledge(queue, chosen)

    def _acknowledge(self, queue: int, chosen: set[int]) -> None:
        held, channel = self._held[queue], self._channels[queue]
        oldest = list(takewhile(chosen.__contains__, held))
        if oldest:
            channel.acknowledge(oldest[-1], and_before=True)
        for tag in sorted(chosen.difference(oldest)):
            channel.acknowledge(tag, and_before=False)
        for tag in chosen:
            del held[tag]

    def reject(self, tag: Tag, reason: str) -> None:
        """Send to the dead letters; acknowledged when the broker has it there. May be called by any thread."""
        session, queue, number = tag
        held = self._held[queue].get(number) if session == self._session else None
        if held is None:
            return
        head, size = held
        endpoint = self._endpoint
        name = endpoint.topology.queue(endpoint.party, self._senders[queue])
        letter = Outgoing(
            exchange=endpoint.topology.dead_exchange(endpoint.party),
            routing_key=f"rejected.dead.{endpoint.party}",
            body=head,
            persistent=False,  # it is for people, and must not cost the disk of the broker
            headers={"x-reason": reason[:1000], "x-size": size, "x-queue": name},
            answers=tag,
        )
        with suppress(SlQueueError):  # the link is closed: the delivery comes again
            self._unconfirmed.add(letter)

"""One connection's life: take the lock of the party, consume, publish, acknowledge.

A session is never mended: when anything of it is lost, cancelled or refused, it ends with a reason and the link makes
the next one. Only missing queues are declared again in place. All but `reject` runs on the link's I/O thread.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile

from sl_queue.errors import BrokerUnreachable, JobError, PartyBusy, SlQueueError, TransportError, Unroutable
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.protocol.topology import Topology
from sl_queue.transport.link import Delivery, Tag
from sl_queue.transport.rabbitmq_connection import Address, Channel, Connection, Denied, Lost, Refused
from sl_queue.transport.rabbitmq_names import ACCESS_REFUSED, QueueType, declare
from sl_queue.transport.retry import LOCKING, PUBLISHING, Limits, pause_s, persist
from sl_queue.transport.unconfirmed import Outgoing, Unconfirmed

IN_FLIGHT_BYTES = 64 * 1024 * 1024  # given to pika and not confirmed: pika copies what it is given
HEAD_BYTES = 16 * 1024  # what is kept of a delivery, and shown of a dead letter
MOST_PREFETCH = 65_535  # a 16-bit field; 0 means any number

log = logging.getLogger("sl_queue")


@dataclass(frozen=True, slots=True)
class Place:
    """Whose connection it is, where to, and what may be waiting in it."""

    address: Address
    party: str
    topology: Topology
    prefetch: int  # unacknowledged messages of one sender, 0 for any number
    queue_type: QueueType
    limits: Limits

    @property
    def who(self) -> str:
        """As messages for people name it."""
        return f"the {self.party}" if self.party in (SCHEDULER, OPERATOR) else f"party {self.party!r}"


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a session is over. With an error there is no next one."""

    reason: str
    error: SlQueueError | None = None


class _Busy(Exception):
    """Another consumer has the queue."""


class Session:
    """Mutable: it knows what is delivered and what is sent on its connection; all of that is void afterwards."""

    def __init__(
        self, number: int, place: Place, unconfirmed: Unconfirmed, on_delivery: Callable[[Delivery], None]
    ) -> None:
        self._number, self._place, self._unconfirmed, self._on_delivery = number, place, unconfirmed, on_delivery
        self._connection = Connection(place.address, f"sl_queue {place.party}")
        self.ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self.fruitful = False  # whether anything was delivered or confirmed
        self._senders = place.topology.senders_to(place.party)
        self._inboxes: dict[int, Channel] = {}
        self._held: list[dict[int, tuple[bytes, int]]] = [{} for _ in self._senders]  # tag -> head and size
        self._out: Channel | None = None  # None until publishing may begin
        self._tag = 0
        self._sent: dict[int, tuple[int, Outgoing]] = {}
        self._returned: set[int] = set()
        self._in_flight = 0
        self._mending: asyncio.Task[None] | None = None
        self._blocked: asyncio.TimerHandle | None = None

    # Beginning and end ------------------------------------------------------------------------------------------

    async def begin(self, before_deliveries: Callable[[], None], busy_s: float) -> None:
        """Connect, declare, consume. Raises Lost, Denied, PartyBusy."""
        place = self._place
        await self._connection.open()
        self._connection.lost.add_done_callback(lambda lost: self._end(lost.result()))
        self._connection.on_blocked(self._on_blocked, self._on_unblocked)
        await declare(self._connection, place.topology, place.party, place.queue_type)
        out = await self._publishing()
        before_deliveries()
        for queue in range(len(self._senders)):
            await self._take(queue, busy_s)
        self._out = out
        self.pump()

    async def close(self) -> None:
        """Leave in order; what was published and acknowledged before is processed by the broker."""
        self._end("closed")
        await self._connection.close()

    async def abort(self) -> None:
        """Cut the connection, if there still is one."""
        self._end("cut")
        await self._connection.abort("cut")

    def _end(self, reason: str, error: SlQueueError | None = None) -> None:
        if self._blocked is not None:
            self._blocked.cancel()
        if self._mending is not None:
            self._mending.cancel()
        if not self.ended.done():
            self.ended.set_result(Ended(reason, error))

    # Consuming --------------------------------------------------------------------------------------------------

    async def _take(self, queue: int, busy_s: float) -> None:
        """Become the one consumer of a queue; the first queue is the lock of the party."""
        who = self._place.who
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
                f"another worker already serves {who} at {self._place.address}, and did not end within "
                f"{busy_s:.0f} s; stop one of the two"
            ) from None

    async def _consume(self, queue: int) -> None:
        place = self._place
        name = place.topology.queue(place.party, self._senders[queue])
        channel = self._inboxes[queue] = await self._connection.channel()
        channel.on_closed = lambda why: self._end(str(why))
        await channel.prefetch(place.prefetch if place.prefetch <= MOST_PREFETCH else 0)
        counted = place.queue_type == "quorum" and queue == 0 and place.party != OPERATOR
        if counted:
            await self._require_consumers(channel, name, 0)
        try:
            await channel.consume(
                name,
                lambda tag, redelivered, body: self._deliver(queue, tag, redelivered, body),
                lambda: self._end(f"queue {name!r} was deleted or moved"),
                exclusive=place.queue_type == "classic" and place.party != OPERATOR,
            )
        except Refused as refused:
            if refused.code == ACCESS_REFUSED and "exclusive" in refused.text:
                raise _Busy(refused.text) from None
            if refused.code == ACCESS_REFUSED:
                raise Denied(f"user {place.address.user!r} needs the read right on {name!r} ({refused.text})") from None
            raise Lost(refused.text) from None
        if counted:
            await self._require_consumers(channel, name, 1)

    async def _require_consumers(self, channel: Channel, queue: str, count: int) -> None:
        """Quorum queues ignore that a consumer is exclusive: count them. Who comes second is inactive and leaves."""
        if await channel.queue(queue, None, passive=True) > count:
            await channel.close()
            self._held[0].clear()
            raise _Busy(f"queue {queue!r} has another consumer")

    def _deliver(self, queue: int, tag: int, redelivered: bool, body: bytes) -> None:
        self.fruitful = True
        self._held[queue][tag] = body[:HEAD_BYTES], len(body)
        try:
            self._on_delivery(Delivery(self._senders[queue], body, Tag((self._number, queue, tag)), redelivered))
        except Exception as error:
            log.exception("%s: a delivery could not be taken", self._place.who)
            self._end("a delivery could not be taken", SlQueueError(f"{type(error).__name__}: {error}"))

    def acknowledge(self, tags: Sequence[Tag]) -> None:
        """Acknowledge those of this session; as one when they are the oldest of their queue."""
        wanted: dict[int, set[int]] = defaultdict(set)
        for session, queue, tag in tags:
            if session == self._number and tag in self._held[queue]:
                wanted[queue].add(tag)
        with suppress(Lost):  # the session is ending, and all of them will come again
            for queue, chosen in wanted.items():
                self._acknowledge(queue, chosen)

    def _acknowledge(self, queue: int, chosen: set[int]) -> None:
        held, channel = self._held[queue], self._inboxes[queue]
        oldest = list(takewhile(chosen.__contains__, held))
        if oldest:
            channel.acknowledge(oldest[-1], and_before=True)
        for tag in sorted(chosen.difference(oldest)):
            channel.acknowledge(tag, and_before=False)
        for tag in chosen:
            del held[tag]

    def reject(self, tag: Tag, reason: str) -> None:
        """To the dead letters; acknowledged when the broker has it there. May be called by any thread."""
        session, queue, number = tag
        held = self._held[queue].get(number) if session == self._number else None
        if held is None:
            return
        head, size = held
        place = self._place
        name = place.topology.queue(place.party, self._senders[queue])
        letter = Outgoing(
            exchange=place.topology.dead_exchange(place.party),
            routing_key=f"rejected.dead.{place.party}",
            body=head,
            persistent=True,
            headers={"x-reason": reason[:1000], "x-size": size, "x-queue": name},
            answers=tag,
        )
        with suppress(SlQueueError):  # the link is closed: the delivery comes again
            self._unconfirmed.add(letter)

    # Publishing -------------------------------------------------------------------------------------------------

    async def _publishing(self) -> Channel:
        """A channel to publish on. Raises Lost."""
        out = await self._connection.channel()
        out.on_closed = self._on_publishing_refused
        await out.confirms(self._on_confirm, self._on_return)
        return out

    def pump(self) -> None:
        """Publish what waits, as far as the window allows.

        Nothing after the end: what an ended session takes is taken from the next one.
        """
        out = self._out
        while out is not None and not self.ended.done() and not self._mending and self._in_flight < IN_FLIGHT_BYTES:
            taken = self._unconfirmed.take()
            if taken is None:
                return
            number, message = taken
            try:
                out.publish(
                    number,
                    message.exchange,
                    message.routing_key,
                    message.body,
                    persistent=message.persistent,
                    expires_in_s=message.expires_in_s(),
                    headers=message.headers,
                )
            except Lost:
                self._unconfirmed.again([number])  # the session is ending: it waits for the next one
                return
            self._tag += 1
            self._sent[self._tag] = taken
            self._in_flight += len(message.body)

    def _on_return(self, number: int) -> None:
        self._returned.add(number)

    def _on_confirm(self, tag: int, and_before: bool, accepted: bool) -> None:
        self.fruitful = True
        tags = list(takewhile(lambda sent: sent <= tag, self._sent)) if and_before else [tag]
        answered = [self._sent.pop(each) for each in tags if each in self._sent]
        self._in_flight -= sum(len(message.body) for _, message in answered)
        here = [number for number, _ in answered if accepted and number not in self._returned]
        self.acknowledge([message.answers for message in self._unconfirmed.confirm(here) if message.answers])
        for number, message in answered:
            if not accepted or number in self._returned:
                self._publish_later(number, message)
        self.pump()

    def _publish_later(self, number: int, message: Outgoing) -> None:
        """The broker has no queue for a message, or its queue is full: try again after a pause."""
        unroutable = number in self._returned
        self._returned.discard(number)
        limits = self._place.limits
        now = time.monotonic()
        message.troubles += 1
        message.troubled_since = message.troubled_since or now
        since_s = now - message.troubled_since
        where = f"exchange {message.exchange!r} with the key {message.routing_key!r}"
        if unroutable and since_s > limits.unroutable_s:
            error = Unroutable(f"no queue is bound to {where}, also after declaring it again for {since_s:.0f} s")
            self._end("unroutable", error)
        elif not unroutable and since_s > limits.lost_s:
            full = TransportError(f"the broker refused a message to {where} for {since_s:.0f} s: its queue is full")
            self._end("full", full)
        self._unconfirmed.again([number])
        if self._mending is None:
            wait_s = pause_s(message.troubles, PUBLISHING)
            why = "no queue is bound; declaring it again" if unroutable else "the queue is full"
            log.warning("%s: %s: %s; publishing again in %.1f s", self._place.who, where, why, wait_s)
            self._mending = asyncio.create_task(self._mend(wait_s))

    async def _mend(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        place = self._place
        try:
            await declare(self._connection, place.topology, place.party, place.queue_type)
            if place.queue_type == "quorum":
                await self._publish_anew()
        except Lost as lost:
            self._end(str(lost))
        self._mending = None
        self.pump()

    async def _publish_anew(self) -> None:
        """A channel that met a quorum queue while its leader was lost may refuse for ever; a new one does not."""
        if self._out is not None:
            await self._out.close()
        self._unconfirmed.again([number for number, _ in self._sent.values()])
        self._sent.clear()
        self._tag, self._in_flight = 0, 0
        self._out = await self._publishing()

    def _on_publishing_refused(self, why: Refused | Lost) -> None:
        error: SlQueueError | None = None
        if isinstance(why, Refused) and "larger than" in why.text:
            error = JobError(
                f"a message is larger than the broker accepts ({why.text}); raise micro_batches in the job, or "
                "max_message_size at the broker"
            )
        elif isinstance(why, Refused) and why.code == ACCESS_REFUSED:
            exchange = self._place.topology.exchange(self._place.party)
            user = self._place.address.user
            error = BrokerUnreachable(f"user {user!r} needs the write right on {exchange!r} ({why.text})")
        self._end(str(why), error)

    def _on_blocked(self, reason: str) -> None:
        limit_s = self._place.limits.lost_s
        log.warning("%s: the broker takes no messages (%s); waiting %.0f s", self._place.who, reason, limit_s)
        text = f"the broker at {self._place.address} took no messages for {limit_s:.0f} s ({reason})"
        error = TransportError(f"{text}; free memory or disk there")
        self._blocked = asyncio.get_running_loop().call_later(limit_s, lambda: self._end("blocked", error))

    def _on_unblocked(self) -> None:
        log.info("%s: the broker takes messages again", self._place.who)
        if self._blocked is not None:
            self._blocked.cancel()
            self._blocked = None

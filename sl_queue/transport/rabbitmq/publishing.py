"""Publisher of one connection: messages go out within a window, are confirmed, returned, and tried again."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from math import inf

from sl_queue.errors import JobError, SlQueueError, TransportError, Unroutable
from sl_queue.transport.link import Tag
from sl_queue.transport.rabbitmq.connection import Channel, Connection, way
from sl_queue.transport.rabbitmq.endpoint import BRIEF_S, End, Endpoint
from sl_queue.transport.rabbitmq.failures import Lost, Refused
from sl_queue.transport.rabbitmq.names import ACCESS_REFUSED, declare
from sl_queue.transport.rabbitmq.unconfirmed import Outgoing, Unconfirmed
from sl_queue.transport.retry import PUBLISHING, pause_s

IN_FLIGHT_BYTES = 64 * 1024 * 1024  # given to the connection and not confirmed
UNCONFIRMED_BYTES = 4 * 1024 * 1024  # given to a socket that does not take them, without confirms; what waits expires
_ANY = ""  # queue that is declared again; nothing is paused for it

log = logging.getLogger("sl_queue")


class Publisher:
    """The way out. Mutable: it knows what is sent and not confirmed on its channel.

    A queue that is full or missing pauses what is for that queue, and nothing else.

    `acknowledge`: what is done with the deliveries that a confirmed message answers.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        connection: Connection,
        unconfirmed: Unconfirmed,
        acknowledge: Callable[[Sequence[Tag]], None],
        end: End,
    ) -> None:
        self._endpoint, self._connection, self._unconfirmed = endpoint, connection, unconfirmed
        self._acknowledge, self._end = acknowledge, end
        self._out: Channel | None = None
        self._open = False  # whether publishing may begin
        self.blocked = False  # by the broker, which says so
        self._tag = 0
        self._sent: dict[int, tuple[int, Outgoing]] = {}
        self._returned: set[int] = set()
        self._in_flight = 0
        self._paused: dict[str, asyncio.Task[None]] = {}  # by what `Outgoing.to` says
        self._repairing = asyncio.Lock()
        self._confirmed, self._handed_at = False, inf  # whether anything was; the first one without confirms

    async def begin(self) -> None:
        """Have a channel; nothing is published on it yet. Raises Lost."""
        self._out = await self._publishing()
        if not self._endpoint.confirms:
            self._connection.on_drained(self.pump)

    @property
    def confirmed(self) -> bool:
        """True if anything was; without confirms, if the broker has taken it for so long that it has not refused it."""
        return self._confirmed or time.monotonic() - self._handed_at > BRIEF_S

    def open(self) -> None:
        """Publish what waits, from now on."""
        self._open = True
        self.pump()

    def close(self) -> None:
        """Publish nothing more: what an ended session takes is taken from the next one."""
        self._open = False
        for pause in self._paused.values():
            pause.cancel()

    async def _publishing(self) -> Channel:
        """Open a channel to publish on. Raises Lost."""
        out = await self._connection.channel()
        out.on_closed = self._on_publishing_refused
        out.returns(self._on_return)
        if self._endpoint.confirms:
            await out.confirms(self._on_confirm)
        return out

    def pump(self) -> bool:
        """Publish what waits, as far as the window allows; False if something is left."""
        out, confirms = self._out, self._endpoint.confirms
        while out is not None and self._open and self._has_room():
            taken = self._unconfirmed.take(self._paused)
            if taken is None:
                return True
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
                return False
            if not confirms:
                self._handed_at = min(self._handed_at, time.monotonic())
                self._have([number])
                continue
            self._tag += 1
            self._sent[self._tag] = taken
            self._in_flight += len(message.body)
        return False

    def _has_room(self) -> bool:
        """Tell whether another message may be given to the connection now."""
        if self._endpoint.confirms:
            return self._in_flight < IN_FLIGHT_BYTES
        return not self.blocked and self._connection.waiting_bytes <= UNCONFIRMED_BYTES

    def _have(self, numbers: Sequence[int]) -> None:
        """Forget these messages, and acknowledge the deliveries that they answer."""
        self._acknowledge([message.answers for message in self._unconfirmed.confirm(numbers) if message.answers])

    def _on_return(self, number: int, where: str) -> None:
        if self._endpoint.confirms:
            self._returned.add(number)
        elif _ANY not in self._paused and self._open:
            log.warning("%s: %s: no queue is bound, a message is lost; declaring it again", self._endpoint.who, where)
            self._paused[_ANY] = asyncio.create_task(self._declare_again(_ANY, pause_s(1, PUBLISHING)))

    def _on_confirm(self, tag: int, and_before: bool, accepted: bool) -> None:
        self._confirmed = True
        tags = list(takewhile(lambda sent: sent <= tag, self._sent)) if and_before else [tag]
        answered = [self._sent.pop(each) for each in tags if each in self._sent]
        self._in_flight -= sum(len(message.body) for _, message in answered)
        here = [number for number, _ in answered if accepted and number not in self._returned]
        self._have(here)
        for number, message in answered:
            if not accepted or number in self._returned:
                self._publish_later(number, message)
        self.pump()

    def _publish_later(self, number: int, message: Outgoing) -> None:
        """Publish a message again after a pause: the broker has no queue for it, or its queue is full."""
        unroutable = number in self._returned
        self._returned.discard(number)
        limits = self._endpoint.limits
        now = time.monotonic()
        message.troubles += 1
        message.troubled_since = message.troubled_since or now
        since_s = now - message.troubled_since
        where = way(message.exchange, message.routing_key)
        if unroutable and since_s > limits.unroutable_s:
            error = Unroutable(f"no queue is bound to {where}, also after declaring it again for {since_s:.0f} s")
            self._end("unroutable", error)
        elif not unroutable and since_s > limits.lost_s:
            full = TransportError(f"the broker refused a message to {where} for {since_s:.0f} s: its queue is full")
            self._end("full", full)
        self._unconfirmed.again([number])
        if message.to not in self._paused and self._open:
            wait_s = pause_s(message.troubles, PUBLISHING)
            why = "no queue is bound; declaring it again" if unroutable else "the queue is full"
            log.warning("%s: %s: %s; publishing again in %.1f s", self._endpoint.who, where, why, wait_s)
            self._paused[message.to] = asyncio.create_task(self._declare_again(message.to, wait_s))

    async def _declare_again(self, to: str, wait_s: float) -> None:
        """Have what is for that queue published again, after a pause and with the queue declared."""
        await asyncio.sleep(wait_s)
        endpoint = self._endpoint
        try:
            async with self._repairing:  # one at a time: there is one channel for it
                await declare(self._connection, endpoint.topology, endpoint.party, endpoint.queue_type)
                if endpoint.queue_type == "quorum":
                    await self._publish_on_another_channel()
        except Lost as lost:
            self._end(str(lost))
        del self._paused[to]
        self.pump()

    async def _publish_on_another_channel(self) -> None:
        """Publish on a new channel: one that met a quorum queue while its leader was lost may refuse for ever."""
        out, self._out = self._out, None  # nothing is published meanwhile
        if out is not None:
            await out.close()
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
            exchange = self._endpoint.topology.exchange(self._endpoint.party)
            user = self._endpoint.address.user
            self._end(f"user {user!r} needs the write right on {exchange!r} ({why.text})", denied=True)
        self._end(str(why), error)

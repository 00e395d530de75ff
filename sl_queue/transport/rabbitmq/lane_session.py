"""One connection's life of a lane between a lead and its hands: declare, consume, publish in pieces, until it ends.

Tickets are acknowledged once all that was sent before is confirmed: a hand that is killed meanwhile loses no work.
Used by the lane's I/O thread alone.
"""

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, takewhile

from sl_queue.hand_ports import LaneSide
from sl_queue.protocol.hands import HANDS, LEAD, TASKS
from sl_queue.protocol.pieces import Assembly, pieces
from sl_queue.transport.rabbitmq.connection import Connection
from sl_queue.transport.rabbitmq.failures import Lost, Refused
from sl_queue.transport.rabbitmq.frames import Piece

PREFETCH = 2  # tickets that a hand has and has not done: the next is there when it has done one
LOCKED = 405
NOT_FOUND = 404
CLOSE_S = 5.0


class Locked(Exception):
    """Another lead has the queue."""


@dataclass(slots=True)
class _Sent:
    to: str
    size: int


class LaneSession:
    """One connection's life. Mutable: it knows what is sent and not confirmed."""

    def __init__(self, connection: Connection, prefix: str, side: LaneSide) -> None:
        self.connection, self._prefix, self._side = connection, prefix, side
        self.refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.name, self.in_flight = "", 0
        self._sender, self._messages, self._numbers = secrets.token_bytes(8), count(), count(1)
        self._sent: dict[int, _Sent] = {}  # by number: what the broker has not confirmed
        self._after: deque[tuple[int, int]] = deque()  # tickets to acknowledge when this number is confirmed
        self._assembly, self._early = Assembly(), list[tuple[bytes, int | None]]()
        self._delivering = self._taking = False
        self._next: Callable[[], None] = lambda: None

    async def begin(self, name: str) -> None:
        """Connect and declare. Raises Lost, Denied, Refused, Locked."""
        self.name = name
        await self.connection.open()
        self._out, self._in, self._work = [await self.connection.channel() for _ in range(3)]
        for channel in (self._out, self._in, self._work):
            channel.on_closed = self._on_closed
        own = self._prefix + name
        try:
            await self._in.private_queue(own)
        except Refused as refused:
            raise (Locked() if refused.code == LOCKED else refused) from None
        if name == LEAD:
            await self._in.fanout(self._prefix + HANDS)
            await self._in.queue(self._prefix + TASKS, None, passive=False)
            await self._in.purge(self._prefix + TASKS)
        else:
            await self._join(own)
        self._out.returns(self._on_return)
        await self._out.confirms(self._on_confirm)
        await self._work.prefetch(PREFETCH)
        await self._in.consume(own, lambda tag, _, body: self._on_piece(tag, body), self._on_cancel, exclusive=True)

    async def _join(self, own: str) -> None:
        """Be one of the hands. Raises Lost before a lead has ever been here."""
        try:
            await self._in.queue(self._prefix + TASKS, None, passive=True)
            await self._in.bind(own, self._prefix + HANDS, "")
        except Refused as refused:
            if refused.code == NOT_FOUND:
                raise Lost("no lead has been here yet") from None
            raise

    def _on_closed(self, why: object) -> None:
        if not self.refused.done():
            self.refused.set_result(str(why))

    def _on_cancel(self) -> None:
        self._on_closed("a queue was deleted")

    def deliver(self) -> None:
        """Give the side what has come, and what comes."""
        self._delivering = True
        for body, ticket in self._early:
            self._side.on_body(body, ticket)

    def take_tickets(self) -> None:
        if not self._taking:
            self._taking = True
            asyncio.get_running_loop().create_task(self._consume_tickets())

    async def _consume_tickets(self) -> None:
        try:
            queue = self._prefix + TASKS
            await self._work.consume(
                queue, lambda tag, _, body: self._on_ticket(tag, body), self._on_cancel, exclusive=False
            )
        except (Refused, Lost) as error:
            self._on_closed(error)

    def _on_piece(self, tag: int, body: Piece) -> None:
        with contextlib.suppress(Lost):
            self._in.acknowledge(tag, and_before=False)
        whole = self._assembly.add(body)
        if whole is None:
            return
        if self._delivering:
            self._side.on_body(whole, None)
        else:
            self._early.append((whole, None))

    def _on_ticket(self, tag: int, body: Piece) -> None:
        self._side.on_body(Assembly().add(body) or b"", tag)

    def done(self, tickets: list[int]) -> None:
        """Acknowledge tickets when all that was sent before is confirmed."""
        last = max(self._sent, default=0)
        self._after.extend((last, ticket) for ticket in tickets)
        self._acknowledge()

    def publish(self, to: str, body: bytes, go_on: Callable[[], None]) -> None:
        self._next = go_on
        exchange, key = (self._prefix + HANDS, "") if to == HANDS else ("", self._prefix + to)
        for piece in pieces(self._sender, next(self._messages), body):
            number = next(self._numbers)
            self._sent[number] = _Sent(to, len(piece))
            self.in_flight += len(piece)
            try:
                self._out.publish(number, exchange, key, piece, persistent=False, expires_in_s=None, headers=None)
            except Lost:
                return  # the session is ending

    def _on_return(self, number: int, _: str) -> None:
        sent = self._sent.get(number)
        if sent is not None and sent.to not in (HANDS, TASKS):
            self._side.on_gone(sent.to)

    def _on_confirm(self, tag: int, and_before: bool, accepted: bool) -> None:
        for number in list(takewhile(lambda sent: sent <= tag, self._sent)) if and_before else [tag]:
            sent = self._sent.pop(number, None)
            self.in_flight -= 0 if sent is None else sent.size
        self._acknowledge()
        self._next()

    def _acknowledge(self) -> None:
        oldest = min(self._sent, default=None)
        with contextlib.suppress(Lost):
            while self._after and (oldest is None or self._after[0][0] < oldest):
                self._work.acknowledge(self._after.popleft()[1], and_before=False)

    async def leave(self) -> None:
        """Wait for the broker to have what was sent, and close."""
        deadline = asyncio.get_running_loop().time() + CLOSE_S
        while self._sent and not self.connection.lost.done() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        await self.connection.close()

"""The lane between a party's lead and its hands over RabbitMQ, in a virtual host that the party trusts.

    PREFIXtasks      a work queue: competing consumers, a few tickets to each
    PREFIXhand.ID    a hand's own, gone with its connection: a message that is returned says that the hand is gone
    PREFIXlead       the lead's own, and its lock
    PREFIXhands      an exchange to all hands

Nothing here lasts: after a lost connection both sides begin a new session, in which nothing that was under way counts.
"""

import asyncio
import contextlib
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, takewhile

from sl_queue.errors import BrokerUnreachable, PartyBusy, SlQueueError
from sl_queue.hand_ports import LaneSide
from sl_queue.protocol.hands import HANDS, LEAD, TASKS
from sl_queue.protocol.pieces import Assembly, pieces
from sl_queue.transport.rabbitmq.connection import Connection
from sl_queue.transport.rabbitmq.failures import Denied, Lost, Refused
from sl_queue.transport.rabbitmq.nodes import Nodes
from sl_queue.transport.retry import CONNECTING, LOCKING, Limits, persist

PREFETCH = 2  # tickets that a hand has and has not done: the next is there when it has done one
IN_FLIGHT_BYTES = 64 * 1024 * 1024  # given to the driver and not confirmed
LOCKED = 405
NOT_FOUND = 404
CLOSE_S = 5.0

log = logging.getLogger("sl_queue")


class RabbitLane:
    """hand_ports.Lane at `amqp(s)://USER:PASSWORD@HOST:PORT/VHOST`. Thread-safe.

    One I/O thread runs an asyncio loop; `again` gives the URL as it is now, before each attempt to connect.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        *,
        lead: bool = False,
        limits: Limits = Limits(),
        again: Callable[[], str] | None = None,
    ) -> None:
        self._nodes, self._prefix, self._lead, self._limits = Nodes(url, again), prefix, lead, limits
        self._lock = threading.Lock()
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._done: list[int] = []
        self._willing = self._closed = False
        self._session: _Session | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._life: asyncio.Task[None] | None = None
        self._opened = threading.Event()
        self._error: SlQueueError | None = None
        self._thread = threading.Thread(target=self._run, name=f"{prefix}lane", daemon=True)

    # What any thread calls --------------------------------------------------------------------------------------

    def open(self, side: LaneSide) -> None:
        self._side = side
        self._thread.start()
        self._opened.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error

    def send(self, to: str, body: bytes) -> None:
        with self._lock:
            self._waiting.append((to, body))
        self._wake()

    def take_tickets(self) -> None:
        self._willing = True
        self._wake()

    def done(self, ticket: int) -> None:
        with self._lock:
            self._done.append(ticket)
        self._wake()

    def close(self) -> None:
        if self._thread.ident is None or self._closed:
            return
        self._closed = True
        if self._loop is not None and self._life is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._life.cancel)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._pump)

    # What the I/O thread does -----------------------------------------------------------------------------------

    def _run(self) -> None:
        with (
            contextlib.suppress(asyncio.CancelledError),
            asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner,
        ):
            runner.run(self._live())

    async def _live(self) -> None:
        self._loop, self._life = asyncio.get_running_loop(), asyncio.current_task()
        try:
            await self._serve()
        except asyncio.CancelledError:
            if self._session is not None:
                self._pump()
                await self._session.leave()
        except SlQueueError as error:
            self._fail(error)
        except Exception as error:
            log.exception("%slane: the lane failed", self._prefix)
            self._fail(SlQueueError(f"{type(error).__name__}: {error}"))
        finally:
            if self._session is not None:
                await self._session.connection.abort("cut")

    def _fail(self, error: SlQueueError) -> None:
        if self._opened.is_set():
            self._side.on_failure(error)
        else:
            self._error = error
            self._opened.set()

    async def _serve(self) -> None:
        session = await self._connect(self._limits.first_s)
        self._opened.set()
        while True:
            await asyncio.wait([session.connection.lost, session.refused], return_when=asyncio.FIRST_COMPLETED)
            lost = session.connection.lost
            reason = str(lost.result() if lost.done() else session.refused.result())
            await session.connection.abort("cut")
            log.warning("%slane: lost the hands' broker (%s); connecting again", self._prefix, reason)
            await asyncio.sleep(0.2)  # a broker that refuses at once is not asked at once
            session = await self._connect(self._limits.lost_s)

    async def _connect(self, limit_s: float) -> "_Session":
        async def attempt() -> _Session:
            session = _Session(
                Connection(self._nodes.next(), f"sl_queue {self._prefix}hands"), self._prefix, self._side
            )
            try:
                await session.begin(LEAD if self._lead else f"hand.{secrets.token_hex(6)}")
            except BaseException:
                await session.connection.abort("cut")
                raise
            return session

        async def locked() -> _Session:
            say = f"{self._prefix}lane: another lead serves it"
            return await persist(attempt, on=_Locked, limit_s=self._limits.busy_s, pauses=LOCKING, say=say)

        say = f"{self._prefix}lane: no connection to the hands' broker at {self._nodes}"
        try:
            on = (Lost, Denied) if self._session is not None else Lost  # a broker that starts refuses at first
            session = await persist(locked, on=on, limit_s=limit_s, pauses=CONNECTING, say=say)
        except _Locked:
            raise PartyBusy(f"another lead already serves {self._prefix}hands; stop one of the two") from None
        except (Denied, Refused) as denied:
            raise BrokerUnreachable(
                f"the hands' broker at {self._nodes} refuses this login: {denied}; a virtual host of its own is needed "
                "there ([hands] broker), with the rights that `sl-queue provision --hands PARTY` writes"
            ) from None
        except Lost as lost:
            raise BrokerUnreachable(f"no connection to the hands' broker at {self._nodes}: {lost}") from None
        with self._lock:
            self._waiting.clear()
            self._done.clear()
        self._willing = False
        self._side.on_session(session.name)
        self._session = session
        session.deliver()
        self._pump()
        return session

    def _pump(self) -> None:
        session = self._session
        if session is None or session.connection.lost.done():
            return
        if self._willing:
            session.take_tickets()
        with self._lock:
            done, self._done = self._done, []
        session.done(done)
        while session.in_flight < IN_FLIGHT_BYTES:
            with self._lock:
                if not self._waiting:
                    return
                to, body = self._waiting.popleft()
            session.publish(to, body, self._pump)


class _Locked(Exception):
    """Another lead has the queue."""


@dataclass(slots=True)
class _Sent:
    to: str
    size: int


class _Session:
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
        """Connect and declare. Raises Lost, Denied, Refused, _Locked."""
        self.name = name
        await self.connection.open()
        self._out, self._in, self._work = [await self.connection.channel() for _ in range(3)]
        for channel in (self._out, self._in, self._work):
            channel.on_closed = self._on_closed
        own = self._prefix + name
        try:
            await self._in.private_queue(own)
        except Refused as refused:
            raise (_Locked() if refused.code == LOCKED else refused) from None
        if name == LEAD:
            await self._in.fanout(self._prefix + HANDS)
            await self._in.queue(self._prefix + TASKS, None, passive=False)
            await self._in.purge(self._prefix + TASKS)
        else:
            await self._join(own)
        await self._out.confirms(self._on_confirm, self._on_return)
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

    def _on_piece(self, tag: int, body: bytes) -> None:
        with contextlib.suppress(Lost):
            self._in.acknowledge(tag, and_before=False)
        whole = self._assembly.add(body)
        if whole is None:
            return
        if self._delivering:
            self._side.on_body(whole, None)
        else:
            self._early.append((whole, None))

    def _on_ticket(self, tag: int, body: bytes) -> None:
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

    def _on_return(self, number: int) -> None:
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

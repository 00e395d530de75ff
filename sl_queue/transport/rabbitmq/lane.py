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

from sl_queue.errors import BrokerUnreachable, PartyBusy, SlQueueError
from sl_queue.hand_ports import LaneSide
from sl_queue.protocol.hands import LEAD
from sl_queue.transport.rabbitmq.connection import Connection
from sl_queue.transport.rabbitmq.failures import Denied, Lost, Refused
from sl_queue.transport.rabbitmq.lane_session import LaneSession, Locked
from sl_queue.transport.rabbitmq.nodes import Nodes
from sl_queue.transport.rabbitmq.publishing import IN_FLIGHT_BYTES
from sl_queue.transport.retry import CONNECTING, LOCKING, Limits, persist

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
        self._session: LaneSession | None = None
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
            self._side.on_lost()
            log.warning("%slane: lost the hands' broker (%s); connecting again", self._prefix, reason)
            await asyncio.sleep(0.2)  # a broker that refuses at once is not asked at once
            session = await self._connect(self._limits.lost_s)

    async def _connect(self, limit_s: float) -> LaneSession:
        async def attempt() -> LaneSession:
            session = LaneSession(
                Connection(self._nodes.next(), f"sl_queue {self._prefix}hands"), self._prefix, self._side
            )
            try:
                await session.begin(LEAD if self._lead else f"hand.{secrets.token_hex(6)}")
            except BaseException:
                await session.connection.abort("cut")
                raise
            return session

        async def locked() -> LaneSession:
            say = f"{self._prefix}lane: another lead serves it"
            return await persist(attempt, on=Locked, limit_s=self._limits.busy_s, pauses=LOCKING, say=say)

        say = f"{self._prefix}lane: no connection to the hands' broker at {self._nodes}"
        try:
            on = (Lost, Denied) if self._session is not None else Lost  # a broker that starts refuses at first
            session = await persist(locked, on=on, limit_s=limit_s, pauses=CONNECTING, say=say)
        except Locked:
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

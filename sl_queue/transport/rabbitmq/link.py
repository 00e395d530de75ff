"""A party's link to RabbitMQ: survives lost connections and broker restarts. `Link`'s contract is in link.py.

One I/O thread runs an asyncio loop; the worker computes in another one, so heartbeats go on whatever it does. Other
threads leave what they want done and wake the loop, once for many. An acknowledgement, or a message of at most
SMALL_BYTES, is sent by the thread that has it, if the I/O thread sleeps: to wake that one, and to pass Python's lock
to and fro, takes longer. A larger one is copied beside the computation. Whoever has the turn drives (turns.py).
"""

import asyncio
import concurrent.futures
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from sl_queue.errors import BrokerUnreachable, ResourceShortage, SlQueueError, TransportError
from sl_queue.protocol.measures import Connectivity
from sl_queue.protocol.messages import Kind
from sl_queue.protocol.topology import Topology
from sl_queue.transport.link import Delivery, Outage, Tag
from sl_queue.transport.outages import Outages
from sl_queue.transport.rabbitmq.acknowledging import LATER_S, Acknowledgements
from sl_queue.transport.rabbitmq.address import HEARTBEAT_S
from sl_queue.transport.rabbitmq.endpoint import BRIEF_S, Denials, Ended, Endpoint
from sl_queue.transport.rabbitmq.failures import Denied, Lost
from sl_queue.transport.rabbitmq.names import QueueType
from sl_queue.transport.rabbitmq.nodes import Nodes
from sl_queue.transport.rabbitmq.session import Session
from sl_queue.transport.rabbitmq.turns import Turns
from sl_queue.transport.rabbitmq.unconfirmed import Outgoing, Unconfirmed
from sl_queue.transport.retry import CONNECTING, Limits, pause_s, persist

SMALL_BYTES = 1024 * 1024  # a message that its publisher sends itself
FRUITLESS_SESSIONS = 20  # in a row, and the link gives up: connecting works, but nothing else does

log = logging.getLogger("sl_queue")


class RabbitLink:
    """One party's end of RabbitMQ, at `amqp(s)://USER:PASSWORD@HOST:PORT/VHOST`. Thread-safe.

    Of a cluster the URL names several nodes, `HOST:PORT,HOST:PORT`; who loses one goes to the next. `prefetch` messages
    of each sender at most are unacknowledged, 0 for any number. `again` gives the URL as it is now, before each attempt
    to connect: a password may have been changed meanwhile. Without `confirms` a message that was handed to the network
    may be lost with the connection, and its sender has to ask again. Raises JobError for a bad URL.
    """

    _numbers = itertools.count(1)  # of sessions, so that no tag means anything to another one

    def __init__(
        self,
        url: str,
        party: str,
        topology: Topology,
        prefetch: int = 0,
        *,
        queue_type: QueueType = "classic",
        limits: Limits = Limits(),
        again: Callable[[], str] | None = None,
        confirms: bool = True,
    ) -> None:
        self._nodes = Nodes(url, again)
        where = self._nodes.first  # the node that it is connected to, or was
        self._endpoint = Endpoint(where, party, topology, prefetch, queue_type, limits, confirms)
        self._unconfirmed, self._outages, self._acknowledged = Unconfirmed(), Outages(), Acknowledgements(prefetch)
        self._lock, self._woken = threading.Lock(), False
        self._turns = Turns()
        self._session: Session | None = None
        self._changed_at: float | None = None  # when the newest connection was made or lost; None before the first
        self._certificates: Mapping[str, float] = {}
        self._closed = False
        self._cut = False  # leave without a word
        self._loop: asyncio.AbstractEventLoop | None = None
        self._life: asyncio.Task[None] | None = None
        self._opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name=f"{party}-io", daemon=True)

    # What any thread calls --------------------------------------------------------------------------------------

    def open(
        self,
        on_delivery: Callable[[Delivery], None],
        on_reconnect: Callable[[], None],
        on_failure: Callable[[SlQueueError], None],
    ) -> None:
        self._on_delivery, self._on_reconnect, self._on_failure = on_delivery, on_reconnect, on_failure
        with self._lock:
            if self._closed:
                raise self._closing()
            self._thread.start()
        try:
            self._opened.result()
        except BaseException:
            self.close()
            raise

    def publish(
        self, receiver: str, kind: Kind, run: str, body: bytes, *, persistent: bool, expires_s: float | None = None
    ) -> None:
        where = self._endpoint.way_to(receiver, kind, run)
        expires_at = None if expires_s is None else time.monotonic() + expires_s
        self._unconfirmed.add(Outgoing(*where, body, persistent, expires_at))
        self._wake(may_send=len(body) <= SMALL_BYTES)

    def outage(self) -> Outage:
        return self._outages.read()

    @property
    def connectivity(self) -> Connectivity:
        session, changed_at = self._session, self._changed_at
        connected = session is not None and session.is_open
        changed_s = float("inf") if changed_at is None else time.monotonic() - changed_at
        return Connectivity(connected, changed_s, self._certificates)

    def mark(self) -> int:
        return self._unconfirmed.last

    def flush(self, timeout_s: float | None = None, mark: int | None = None) -> bool:
        return self._unconfirmed.flush(timeout_s, mark)

    def acknowledge(self, tags: Sequence[Tag], *, later: bool = False) -> None:
        when = self._acknowledged.add(tags, later=later)
        if when == "now":
            self._wake(may_send=True)
        elif when == "in a while" and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._loop.call_later, LATER_S, self._after_a_while)

    def reject(self, tag: Tag, reason: str) -> None:
        session = self._session
        if session is not None:
            session.reject(tag, reason)
            self._wake()

    def close(self) -> None:
        self._unconfirmed.fail(self._closing())
        with self._lock:
            again, self._closed = self._closed, True
            if self._thread.ident is None:
                return
            if self._loop is not None and self._life is not None and not again:
                with suppress(RuntimeError):  # the loop has ended by itself
                    self._loop.call_soon_threadsafe(self._life.cancel)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def abort(self) -> None:
        """Lose the connection as a killed process does, and never come back."""
        self._cut = True
        self.close()

    def _closing(self) -> TransportError:
        return TransportError(f"the link of {self._endpoint.who} is closed")

    def _wake(self, *, may_send: bool = False) -> None:
        """Run pending I/O inline if it is small and the I/O thread is idle, else wake it."""
        mine = threading.current_thread() is self._thread
        if may_send and not mine and self._turns.turn.acquire(blocking=False):
            try:
                self._work()
            finally:
                self._turns.turn.release()
            return
        with self._lock:
            if self._woken or self._loop is None:
                return
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: nothing is sent any more
                (self._loop.call_soon if mine else self._loop.call_soon_threadsafe)(self._work)

    # What the I/O thread does -----------------------------------------------------------------------------------

    def _run(self) -> None:
        self._turns.turn.acquire()
        try:
            with (
                suppress(asyncio.CancelledError),  # closed while it was ending by itself
                asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(self._turns)) as runner,
            ):
                runner.run(self._live())
        except OSError as error:  # no descriptor for the loop itself: whoever opens must not wait for ever
            self._fail(ResourceShortage(f"{self._endpoint.who} cannot connect: {error.strerror}; start it again"))

    def _work(self) -> None:
        """Hand, with the turn, what other threads left to the session; without one, acknowledgements are void."""
        with self._lock:
            self._woken = False
        tags = self._acknowledged.take()
        if self._session is not None:
            self._session.exchange(tags)

    def _after_a_while(self) -> None:
        self._acknowledged.the_while_is_over()
        self._work()

    async def _live(self) -> None:
        """Serve from the first connection to the last."""
        with self._lock:
            self._loop, self._life = asyncio.get_running_loop(), asyncio.current_task()
            closed = self._closed
        try:
            if not closed:
                await self._serve()
        except asyncio.CancelledError:
            if self._session is not None and not self._cut:
                self._work()
                await self._session.close()
        except SlQueueError as error:
            self._fail(error)
        except Exception as error:
            log.exception("%s: the link failed", self._endpoint.who)
            self._fail(SlQueueError(f"{type(error).__name__}: {error}"))
        finally:
            if self._session is not None:
                await self._session.abort()
            if not self._opened.done():
                self._opened.set_exception(self._closing())

    async def _serve(self) -> None:
        limits, fruitless = self._endpoint.limits, 0
        denied = Denials(limits.lost_s)
        session = await self._connect(limits.first_s, limits.busy_s, on=Lost, before_deliveries=lambda: None)
        self._opened.set_result(None)
        while True:
            began = time.monotonic()
            ended = await asyncio.shield(session.ended)
            self._outages.begin(ended.reason)
            self._changed_at = time.monotonic()
            await session.abort()
            self._unconfirmed.restart()
            if ended.error is not None:
                raise ended.error
            fruitless = 0 if session.fruitful else fruitless + 1
            denied.note(ended, began, self._changed_at, published=session.published)
            what = "lost the broker (%s); connecting again"
            if ended.denied:
                what = f"the broker refuses a message (%s); publishing again for {limits.lost_s:.0f} s at most"
            log.warning(f"%s: {what}", self._endpoint.who, ended.reason)
            times = denied.count if ended.denied else fruitless
            await self._pause(ended, times, brief=time.monotonic() - began < BRIEF_S)
            busy_s = limits.busy_s + 2 * HEARTBEAT_S  # until the broker has noticed that our last connection is lost
            session = await self._connect(
                limits.lost_s, busy_s, on=(Lost, Denied), before_deliveries=self._on_reconnect
            )
            log.info("%s: connected again", self._endpoint.who)

    async def _pause(self, ended: Ended, times: int, *, brief: bool) -> None:
        """Pause between two sessions; longer and longer while they confirm and deliver nothing."""
        if times >= FRUITLESS_SESSIONS and not ended.denied:
            raise BrokerUnreachable(
                f"lost the broker at {self._endpoint.address} {times} times as soon as it was reached; "
                f"the last time: {ended.reason}"
            )
        if brief:
            await asyncio.sleep(pause_s(max(1, times), CONNECTING))

    async def _connect(
        self,
        limit_s: float,
        busy_s: float,
        *,
        on: type[Exception] | tuple[type[Exception], ...],
        before_deliveries: Callable[[], None],
    ) -> Session:
        async def attempt() -> Session:
            self._endpoint = replace(self._endpoint, address=self._nodes.next())
            number = next(self._numbers)
            session = Session(number, self._endpoint, self._unconfirmed, self._on_delivery, self._outages)
            self._session = session
            try:
                await session.begin(before_deliveries, busy_s)
            except Exception as error:
                self._outages.begin(str(error))
                await session.abort()
                raise
            self._changed_at, self._certificates = time.monotonic(), session.certificates
            return session

        who = self._endpoint.who
        say = f"{who}: no connection to the broker at {self._nodes}"
        try:
            return await persist(attempt, on=on, limit_s=limit_s, pauses=CONNECTING, say=say)
        except Denied as denied:
            raise BrokerUnreachable(f"the broker at {self._endpoint.address} refuses {who}: {denied}") from None
        except Lost as lost:
            raise BrokerUnreachable(
                f"{who} cannot use the broker at {self._nodes}: {lost}; tried for {limit_s:.0f} s, "
                "start the broker or correct its URL"
            ) from None

    def _fail(self, error: SlQueueError) -> None:
        """Give up: whoever opens, publishes or flushes from now on raises `error`, and the owner is notified."""
        self._unconfirmed.fail(error)
        if self._opened.done():
            self._on_failure(error)
        else:
            self._opened.set_exception(error)

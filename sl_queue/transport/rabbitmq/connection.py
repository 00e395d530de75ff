"""pika made awaitable: a connection and its channels on one asyncio loop. Driver exceptions end here.

Used by one thread at a time, whichever has the link's turn (turns.py).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pika
from pika.channel import MAX_CHANNELS
from pika.exceptions import AMQPError, ChannelClosedByBroker

from sl_queue.transport.rabbitmq.address import CONNECT_S, Address
from sl_queue.transport.rabbitmq.certificates import expiry
from sl_queue.transport.rabbitmq.failures import Denied, Lost, Refused, said, unusable, why_not
from sl_queue.transport.rabbitmq.frames import Confirmed, Delivered, Piece
from sl_queue.transport.rabbitmq.sent_frames import (
    CONTENT_TYPE,
    acknowledgement,
    delivery_mode,
    expiration_of,
    publication,
)
from sl_queue.transport.rabbitmq.socket import SocketConnection, dial

CLOSE_S = 3.0


class Connection:
    """One connection to a broker. Mutable: it is open, and then it is lost."""

    def __init__(self, address: Address, name: str) -> None:
        self._address, self._name = address, name
        loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[Lost | Denied | None] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()  # with the reason
        self._pika: Any = None
        self.certificates: Mapping[str, float] = {}

    async def open(self) -> None:
        """Connect. Raises Lost or Denied."""
        logger = logging.getLogger("pika")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)  # what matters of it is said in our own words
        try:
            parameters = self._address.parameters(self._name)
        except (ValueError, OSError) as error:  # a certificate is being changed, perhaps
            raise unusable(error) from None
        silence = TimeoutError(f"no answer within {CONNECT_S:.0f} s")
        try:
            async with asyncio.timeout(CONNECT_S):
                here = await dial(parameters)
        except OSError as error:
            raise why_not(silence if isinstance(error, TimeoutError) else error, self._address) from None
        self.certificates = expiry(here, self._address)
        self._pika = SocketConnection(
            here,
            parameters,
            on_open_callback=lambda _: _resolve(self._opened, None),
            on_open_error_callback=lambda _, error: _resolve(self._opened, why_not(self._caused(error), self._address)),
            on_close_callback=lambda _, error: _resolve(self.lost, said(self._caused(error))),
        )
        try:
            await asyncio.wait([self._opened], timeout=CONNECT_S)
        finally:
            if not self._opened.done():
                self._pika._terminate_stream(silence)
                await asyncio.wait([self._opened])
        failure = self._opened.result()
        if failure is not None:
            raise failure

    def _caused(self, error: BaseException) -> BaseException:
        """Return pika's error, with what happened to the socket as its cause."""
        error.__cause__ = self._pika.cause
        return error

    async def channel(self) -> "Channel":
        """Open a new channel. Raises Lost."""
        channel = Channel(self)
        await channel.open(self._pika)
        return channel

    @property
    def most_channels(self) -> int:
        """Number of channels that the broker allows in this connection."""
        return int(self._pika.params.channel_max) or MAX_CHANNELS

    @property
    def _is_open(self) -> bool:
        return self._opened.done() and self._opened.result() is None and not self.lost.done()

    async def close(self) -> None:
        """Close in order: what was sent before is processed. Cuts the connection when the broker does not answer."""
        if self._is_open:
            if self._pika.is_open:
                self._pika.close(200, "done")
            await asyncio.wait([self.lost], timeout=CLOSE_S)
            await self.abort("the broker did not answer the closing of the connection")

    async def abort(self, reason: str) -> None:
        """Cut the connection without a word, as the kernel does for a killed process."""
        if self._is_open:
            self._pika._terminate_stream(Lost(reason))  # there is no public way to leave without saying so
            await asyncio.wait([self.lost])

    @property
    def waiting_bytes(self) -> int:
        """Count what is given to the connection and not to the kernel."""
        return int(self._pika.waiting_bytes)

    def on_drained(self, drained: Callable[[], object]) -> None:
        """Call this when the kernel has taken all, after it did not."""
        self._pika.on_drained = drained

    def together(self) -> AbstractContextManager[None]:
        """Send what the body sends as one."""
        together: AbstractContextManager[None] = nullcontext() if self._pika is None else self._pika.together()
        return together

    def on_blocked(self, blocked: Callable[[str], None], unblocked: Callable[[], None]) -> None:
        """Call these when the broker stops and starts to take what is published."""
        self._pika.add_on_connection_blocked_callback(lambda _, frame: blocked(str(frame.method.reason)))
        self._pika.add_on_connection_unblocked_callback(lambda _, __: unblocked())


class Channel:
    """One channel: methods that await the broker's answer, and raise Refused or Lost. Mutable like its connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pika: Any = None
        self._answer: asyncio.Future[Any] | None = None
        self.on_closed: Callable[[Refused | Lost], None] = lambda _: None  # when nobody awaits an answer

    async def open(self, driver: Any) -> None:
        self._driver = driver
        self._pika = await self._call(driver.channel, answer="on_open_callback")
        self._pika.add_on_close_callback(self._on_close)

    async def exchange(self, name: str, *, passive: bool) -> None:
        """Declare a durable topic exchange, or look it up."""
        await self._call(self._pika.exchange_declare, name, "topic", passive=passive, durable=True)

    async def queue(self, name: str, arguments: Mapping[str, str | int] | None, *, passive: bool) -> int:
        """Declare a durable queue, or look it up; returns its number of consumers."""
        frame = await self._call(
            self._pika.queue_declare, name, passive=passive, durable=True, arguments=dict(arguments or {})
        )
        return int(frame.method.consumer_count)

    async def fanout(self, name: str) -> None:
        """Declare a durable exchange that gives each queue all it is given."""
        await self._call(self._pika.exchange_declare, name, "fanout", durable=True)

    async def private_queue(self, name: str) -> None:
        """Declare a queue that is this connection's alone, and goes with it."""
        await self._call(self._pika.queue_declare, name, exclusive=True, auto_delete=True)

    async def purge(self, queue: str) -> None:
        """Drop what waits in a queue."""
        await self._call(self._pika.queue_purge, queue)

    async def bind(self, queue: str, exchange: str, key: str) -> None:
        await self._call(self._pika.queue_bind, queue, exchange, key)

    async def prefetch(self, count: int) -> None:
        await self._call(self._pika.basic_qos, prefetch_count=count)

    async def consume(
        self, queue: str, on_message: Callable[[int, bool, Piece], None], on_cancel: Callable[[], None], exclusive: bool
    ) -> None:
        """Have (tag, redelivered, body) called for each message; `on_cancel` when the broker takes the queue away.

        Of one queue: a channel has one consumer.
        """

        def deliver(found: Delivered) -> None:
            if self._pika.is_open:  # what comes while it is being closed goes back to the queue
                on_message(found.tag, found.redelivered, found.body)

        self._take(Delivered, deliver)
        self._pika.add_on_cancel_callback(lambda _: on_cancel())
        await self._call(self._pika.basic_consume, queue, _never, exclusive=exclusive)

    async def confirms(self, on_confirm: Callable[[int, bool, bool], None]) -> None:
        """Have each publish answered: (tag, and all before, accepted)."""
        self._take(Confirmed, lambda found: on_confirm(found.tag, found.and_before, found.accepted))
        await self._call(self._pika.confirm_delivery, ack_nack_callback=_never)

    def _take(self, what: type, take: Callable[[Any], None]) -> None:
        """Have this called for what comes on the channel; pika does not see it."""
        self._driver.takers[what, self._pika.channel_number] = take

    def returns(self, on_return: Callable[[int, str], None]) -> None:
        """Have (number, where to) of each unroutable message called, before it is confirmed."""

        def returned(_: Any, method: Any, properties: Any, ___: bytes) -> None:
            on_return(int(properties.message_id), way(method.exchange, method.routing_key))

        self._pika.add_on_return_callback(returned)

    @property
    def _is_open(self) -> bool:
        return bool(self._pika.is_open and self._driver.is_open)

    def publish(
        self,
        number: int,
        exchange: str,
        routing_key: str,
        body: bytes,
        *,
        persistent: bool,
        expires_in_s: float | None,
        headers: Mapping[str, str | int] | None,
    ) -> None:
        """Publish, mandatory. Raises Lost."""
        channel = self._pika.channel_number
        try:
            if headers is None and self._is_open:
                about = publication(channel, exchange, routing_key, len(body), number, persistent, expires_in_s)
                self._driver.send_content(channel, about, body)
                return
            properties = pika.BasicProperties(
                content_type=CONTENT_TYPE,
                delivery_mode=delivery_mode(persistent),
                message_id=str(number),
                expiration=None if expires_in_s is None else expiration_of(expires_in_s),
                headers=dict(headers or {}),
                timestamp=int(time.time()),  # of a dead letter: for people
            )
            self._pika.basic_publish(exchange, routing_key, body, properties, mandatory=True)
        except AMQPError as error:
            raise Lost(said(error)) from None

    def acknowledge(self, tag: int, *, and_before: bool) -> None:
        """Acknowledge a delivery, or all up to it. Raises Lost."""
        if self._is_open:
            self._driver.send_frames([acknowledgement(self._pika.channel_number, tag, and_before)])
            return
        try:
            self._pika.basic_ack(tag, multiple=and_before)
        except AMQPError as error:
            raise Lost(said(error)) from None

    async def close(self) -> None:
        closed = asyncio.get_running_loop().create_future()
        self.on_closed = lambda _: _resolve(closed, None)
        if self._pika.is_open:
            self._pika.close()
            await closed

    async def _call(self, method: Callable[..., Any], *arguments: Any, answer: str = "callback", **named: Any) -> Any:
        """Send a method and await its answer. One at a time."""
        waiting = self._answer = asyncio.get_running_loop().create_future()
        lost = self._connection.lost
        try:
            if lost.done():
                raise Lost(lost.result())
            method(*arguments, **named, **{answer: lambda frame: _resolve(waiting, frame)})
            await asyncio.wait([waiting, lost], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise Lost(lost.result())
            return waiting.result()
        except AMQPError as error:
            raise Lost(said(error)) from None
        finally:
            self._answer = None

    def _on_close(self, _: Any, reason: BaseException) -> None:
        error = (
            Refused(reason.reply_code, reason.reply_text)
            if isinstance(reason, ChannelClosedByBroker)
            else Lost(said(reason))
        )
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        else:
            self.on_closed(error)


def _never(*_: Any) -> None:
    """Stand where pika wants a callback for what it does not see."""


def way(exchange: str, routing_key: str) -> str:
    """Say where a message goes."""
    return f"exchange {exchange!r} with the key {routing_key!r}"


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)

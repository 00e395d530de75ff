"""pika made awaitable: a connection and its channels on one asyncio loop. Driver exceptions end here.

pika is used by one thread only, the one that runs the loop.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlencode, urlsplit

import pika
from pika.exceptions import (
    AMQPError,
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from sl_queue.errors import JobError
from sl_queue.transport.rabbitmq_socket import SocketConnection, dial

HEARTBEAT_S = 15  # a half-open connection is noticed after 20 s here, after 30 s at the broker
CONNECT_S = 10.0
CLOSE_S = 3.0


class Lost(Exception):
    """There is no connection, or no longer: trying again may help."""


class Denied(Exception):
    """The broker will not have us: wrong password, missing virtual host, missing rights. Says what to do."""


class Refused(Exception):
    """The broker closed a channel because of what was asked there."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


@dataclass(frozen=True, slots=True)
class Address:
    """Where a node of a broker is and who asks; its text never shows a password."""

    url: str = field(repr=False)
    host: str
    port: int
    vhost: str
    user: str

    @classmethod
    def parse(cls, url: str) -> "tuple[Address, ...]":
        """The nodes of a broker: `amqp://USER:PASSWORD@HOST:PORT,HOST:PORT/VHOST`. Raises JobError for another text."""
        try:
            parts = urlsplit(url)
            login, at, hosts = parts.netloc.rpartition("@")
            return tuple(cls._of(parts._replace(netloc=f"{login}{at}{host}")) for host in hosts.split(","))
        except (ValueError, TypeError, SyntaxError, OSError) as error:
            raise JobError(f"the broker's URL cannot be used: {error}") from None

    @classmethod
    def _of(cls, parts: SplitResult) -> "Address":
        host, port = parts.hostname, parts.port or (5671 if parts.scheme == "amqps" else 5672)
        if parts.scheme not in ("amqp", "amqps") or not host:
            raise ValueError("amqp://USER:PASSWORD@HOST:PORT/VHOST expected, or amqps://")
        if parts.username is not None and parts.password is None:  # pika wants one
            parts = parts._replace(netloc=f"{parts.username}:@{parts.netloc.rpartition('@')[2]}")
        vhost, user = unquote(parts.path[1:]) or "/", unquote(parts.username or "guest")
        address = cls(parts.geturl(), host, port, vhost, user)
        address.parameters("")
        return address

    def parameters(self, name: str) -> pika.URLParameters:
        """What pika is told; options in the URL's query are the user's own."""
        parts = urlsplit(self.url)
        own = parse_qs(parts.query)
        tls = {name: own.pop(name)[-1] for name in _TLS_OPTIONS if name in own}  # pika does not know them
        parameters = pika.URLParameters(parts._replace(query=urlencode(own, doseq=True)).geturl())
        if tls:
            _secure(parameters, self.host, tls)
        if "heartbeat" not in own:
            parameters.heartbeat = HEARTBEAT_S
        if parameters.ssl_options is not None and parameters.ssl_options.server_hostname is None:
            parameters.ssl_options.server_hostname = self.host
        parameters.socket_timeout = parameters.stack_timeout = CONNECT_S
        parameters.connection_attempts = 1
        parameters.client_properties = {"connection_name": name}
        return parameters

    def __str__(self) -> str:
        return f"{self.host}:{self.port}, virtual host {self.vhost!r}"


_TLS_OPTIONS = ("cacertfile", "certfile", "keyfile", "auth_mechanism")  # as in RabbitMQ's own URIs


def _secure(parameters: pika.URLParameters, host: str, options: Mapping[str, str]) -> None:
    """Whom to trust, and how to log in with a certificate. Raises ValueError, OSError."""
    for name in ("cacertfile", "certfile", "keyfile"):
        if name in options and not Path(options[name]).is_file():
            raise ValueError(f"{name} = {options[name]!r}: there is no such file")
    mechanism = options.get("auth_mechanism", "plain")
    if mechanism not in ("plain", "external"):
        raise ValueError(f"auth_mechanism = {mechanism!r}: it is plain or external")
    context = ssl.create_default_context(cafile=options.get("cacertfile"))
    if "certfile" in options:
        context.load_cert_chain(options["certfile"], options.get("keyfile"))
    if mechanism == "external":
        parameters.credentials = pika.credentials.ExternalCredentials()
    parameters.ssl_options = pika.SSLOptions(context, host)


class Connection:
    """One connection to a broker. Mutable: it is open, and then it is lost."""

    def __init__(self, address: Address, name: str) -> None:
        self._address, self._name = address, name
        loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[Lost | Denied | None] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()  # with the reason
        self._pika: Any = None

    async def open(self) -> None:
        """Raises Lost or Denied."""
        logger = logging.getLogger("pika")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)  # what matters of it is said in our own words
        parameters = self._address.parameters(self._name)
        silence = TimeoutError(f"no answer within {CONNECT_S:.0f} s")
        try:
            async with asyncio.timeout(CONNECT_S):
                here = await dial(parameters)
        except OSError as error:
            raise why_not(silence if isinstance(error, TimeoutError) else error, self._address) from None
        self._pika = SocketConnection(
            here,
            parameters,
            on_open_callback=lambda _: _resolve(self._opened, None),
            on_open_error_callback=lambda _, error: _resolve(self._opened, why_not(self._caused(error), self._address)),
            on_close_callback=lambda _, error: _resolve(self.lost, _said(self._caused(error))),
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
        """pika's error, with what happened to the socket."""
        error.__cause__ = self._pika.cause
        return error

    async def channel(self) -> "Channel":
        """A new channel. Raises Lost."""
        channel = Channel(self)
        await channel.open(self._pika)
        return channel

    @property
    def _is_open(self) -> bool:
        return self._opened.done() and self._opened.result() is None and not self.lost.done()

    async def close(self) -> None:
        """Close in order: what was sent before is processed. Cuts the connection when the broker does not answer."""
        if self._is_open:
            if self._pika.is_open:
                self._pika.close(200, "done")
            await asyncio.wait([self.lost], timeout=CLOSE_S)
            await self.abort("the broker did not answer when it was told that we leave")

    async def abort(self, reason: str) -> None:
        """Cut the connection without a word, as the kernel does for a killed process."""
        if self._is_open:
            self._pika._terminate_stream(Lost(reason))  # there is no public way to leave without saying so
            await asyncio.wait([self.lost])

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

    async def bind(self, queue: str, exchange: str, key: str) -> None:
        await self._call(self._pika.queue_bind, queue, exchange, key)

    async def prefetch(self, count: int) -> None:
        await self._call(self._pika.basic_qos, prefetch_count=count)

    async def consume(
        self, queue: str, on_message: Callable[[int, bool, bytes], None], on_cancel: Callable[[], None], exclusive: bool
    ) -> None:
        """Have (tag, redelivered, body) called for each message; `on_cancel` when the broker takes the queue away."""

        def deliver(_: Any, method: Any, __: Any, body: bytes) -> None:
            on_message(method.delivery_tag, method.redelivered, body)

        self._pika.add_on_cancel_callback(lambda _: on_cancel())
        await self._call(self._pika.basic_consume, queue, deliver, exclusive=exclusive)

    async def confirms(self, on_confirm: Callable[[int, bool, bool], None], on_return: Callable[[int], None]) -> None:
        """Have each publish answered: (tag, and all before, accepted); before that the number of an unroutable one."""

        def confirmed(frame: Any) -> None:
            on_confirm(frame.method.delivery_tag, frame.method.multiple, isinstance(frame.method, pika.spec.Basic.Ack))

        def returned(_: Any, __: Any, properties: Any, ___: bytes) -> None:
            on_return(int(properties.message_id))

        self._pika.add_on_return_callback(returned)
        await self._call(self._pika.confirm_delivery, ack_nack_callback=confirmed)

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
        properties = pika.BasicProperties(
            content_type="application/msgpack",
            delivery_mode=2 if persistent else 1,
            message_id=str(number),
            expiration=None if expires_in_s is None else str(max(1, int(1000 * expires_in_s))),
            headers=None if headers is None else dict(headers),
        )
        try:
            self._pika.basic_publish(exchange, routing_key, body, properties, mandatory=True)
        except AMQPError as error:
            raise Lost(_said(error)) from None

    def acknowledge(self, tag: int, *, and_before: bool) -> None:
        """Raises Lost."""
        try:
            self._pika.basic_ack(tag, multiple=and_before)
        except AMQPError as error:
            raise Lost(_said(error)) from None

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
            raise Lost(_said(error)) from None
        finally:
            self._answer = None

    def _on_close(self, _: Any, reason: BaseException) -> None:
        error = (
            Refused(reason.reply_code, reason.reply_text)
            if isinstance(reason, ChannelClosedByBroker)
            else Lost(_said(reason))
        )
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        else:
            self.on_closed(error)


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _said(error: BaseException) -> str:
    """A driver's exception in words."""
    if isinstance(error, ConnectionClosedByBroker | ChannelClosedByBroker):
        return str(error.reply_text)
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {cause.reason or cause}"
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused: nothing listens there"
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
    return str(causes[-1]) or type(causes[-1]).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and those that it wraps, outermost first; pika has three ways to wrap one."""
    yield error
    inner = [*error.args, getattr(error, "exception", None), *getattr(error, "exceptions", ()), error.__cause__]
    for each in reversed(inner):  # of several attempts the last
        if isinstance(each, BaseException):
            yield from _causes(each)
            return


def why_not(error: BaseException, address: Address) -> Lost | Denied:
    """Why a connection could not be opened, and whether another attempt may help."""
    causes = list(_causes(error))
    text = " ".join(str(cause) for cause in causes)
    if any(isinstance(cause, ProbableAuthenticationError) for cause in causes) and "ACCESS_REFUSED" in text:
        return Denied(f"user {address.user!r} was refused: wrong user name or password in the broker's URL")
    if any(isinstance(cause, ProbableAccessDeniedError) for cause in causes) and "is down" not in text:
        if "not found" in text:
            return Denied(f"there is no virtual host {address.vhost!r}: rabbitmqctl add_vhost {address.vhost}")
        if "refused for user" in text:
            return Denied(
                f"user {address.user!r} has no rights on virtual host {address.vhost!r}: "
                f"rabbitmqctl set_permissions -p {address.vhost} {address.user} CONFIGURE WRITE READ"
            )
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return Denied(f"{_said(error)}; check the port, the certificates, and amqp:// or amqps:// in the broker's URL")
    return Lost(_said(error))

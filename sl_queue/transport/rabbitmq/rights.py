"""Rights of a login at a broker, tried out: those a role needs and those it must not have. Leaves nothing behind.

A message that is read here goes back to its place; one that is published has no queue to go to.
"""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker, UnroutableError

from sl_queue.errors import BrokerUnreachable
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.protocol.topology import Topology
from sl_queue.transport.rabbitmq.address import Address
from sl_queue.transport.rabbitmq.blocking import connect
from sl_queue.transport.rabbitmq.failures import why_not
from sl_queue.transport.rabbitmq.names import ACCESS_REFUSED

NOT_FOUND = 404
NOBODY = "check.check.nobody"  # a routing key that no queue is bound with

_Try = Callable[[BlockingChannel], None]


@dataclass(frozen=True, slots=True)
class Rights:
    """Rights that a login lacks and needs, and those it has and does not; names that are not there yet.

    `channels`: how many the broker allows in a connection, 0 for any number; `heartbeat_s` 0: none.
    """

    missing: tuple[str, ...]
    too_wide: tuple[str, ...]
    absent: tuple[str, ...]
    channels: int
    heartbeat_s: int


def try_rights(url: str, role: str, names: Topology) -> Rights:
    """Log in and try. Raises BrokerUnreachable, JobError for a bad URL."""
    nodes = Address.parse(url)
    try:
        with connect(nodes, f"sl_queue check {role}", f" as {role!r}") as connection:
            agreed = connection._impl.params
            needed = {what: _became(connection, attempt) for what, attempt in _needed(role, names)}
            others = {what: _became(connection, attempt) for what, attempt in _others(role, names)}
    except (AMQPError, OSError) as error:
        raise BrokerUnreachable(
            f"the broker at {nodes[-1]} cannot be used as {role!r}: {why_not(error, nodes[-1])}"
        ) from None
    return Rights(
        missing=tuple(what for what, became in needed.items() if became == ACCESS_REFUSED),
        too_wide=tuple(what for what, became in others.items() if became is None),
        absent=tuple(what for what, became in needed.items() if became == NOT_FOUND),
        channels=int(agreed.channel_max),
        heartbeat_s=int(agreed.heartbeat),
    )


def _needed(role: str, names: Topology) -> Iterator[tuple[str, _Try]]:
    for sender in names.senders_to(role):
        yield _reading(names.queue(role, sender))
    yield _writing(names.exchange(role))


def _others(role: str, names: Topology) -> Iterator[tuple[str, _Try]]:
    passing = f"sl_queue.check.{secrets.token_hex(4)}"
    yield "declare queues", partial(_declare, queue=passing)
    yield "write into any queue (the default exchange)", partial(_publish, exchange="", key=passing)
    yield "publish with any routing key", partial(_publish, exchange=names.exchange(role))
    for other in (*names.parties, SCHEDULER, OPERATOR):
        if other != role:
            yield _reading(names.queue(other, names.senders_to(other)[0]))
            yield _writing(names.exchange(other))


def _reading(queue: str) -> tuple[str, _Try]:
    return f"read queue {queue}", partial(_get, queue=queue)


def _writing(exchange: str) -> tuple[str, _Try]:
    return f"write to exchange {exchange}", partial(_publish, exchange=exchange, topic=True)


def _became(connection: pika.BlockingConnection, attempt: _Try) -> int | None:
    """Return the broker's code if it refused, else None."""
    channel = connection.channel()
    try:
        attempt(channel)
    except ChannelClosedByBroker as closed:
        return int(closed.reply_code)
    if channel.is_open:
        channel.close()  # what was read goes back
    return None


def _get(channel: BlockingChannel, queue: str) -> None:
    try:
        channel.basic_get(queue)
    except ChannelClosedByBroker as closed:
        if "exclusive" not in closed.reply_text:  # a worker is reading it, so it may be read
            raise


def _declare(channel: BlockingChannel, queue: str) -> None:
    channel.queue_declare(queue, exclusive=True)
    channel.queue_delete(queue)


def _publish(channel: BlockingChannel, exchange: str, key: str = NOBODY, *, topic: bool = False) -> None:
    """Publish what nobody gets. `topic`: being refused for the routing key alone means that the exchange is open."""
    channel.confirm_delivery()
    try:
        channel.basic_publish(exchange, key, b"", mandatory=True)
    except UnroutableError:
        pass
    except ChannelClosedByBroker as closed:
        if not (topic and "topic" in closed.reply_text):
            raise

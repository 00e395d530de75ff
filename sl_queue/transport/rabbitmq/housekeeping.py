"""Contents that a job left at a broker: its dead letters, its queues and its exchanges.

Done by a person with a login that may, beside workers that run. What is read goes back to its place. A dead letter is
written by the party that refused it, so its headers are a peer's text: it goes back only into a queue of that party.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker, NackError, UnroutableError

from sl_queue.errors import BrokerUnreachable, PartyBusy
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.protocol.topology import Topology
from sl_queue.transport.rabbitmq.address import Address
from sl_queue.transport.rabbitmq.blocking import connect
from sl_queue.transport.rabbitmq.failures import why_not
from sl_queue.transport.rabbitmq.names import ACCESS_REFUSED, PRECONDITION_FAILED
from sl_queue.transport.rabbitmq.rights import NOT_FOUND

DEFAULT_EXCHANGE = ""  # through which a queue is reached by its name


class NotAllowed(BrokerUnreachable):
    """Missing right of this login; another one, for instance the broker administrator's, may have it."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A refused message. `reason`, `queue` and `size` are as its headers say; `kept` bytes of it are here."""

    reason: str
    queue: str
    size: int
    kept: int
    at: float | None  # Unix time

    @property
    def is_whole(self) -> bool:
        """True if nothing of it was cut off."""
        return self.kept >= self.size


@dataclass(frozen=True, slots=True)
class Back:
    """Dead letters that were put back, and those that stay, by why."""

    count: int = 0
    left: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue that is there."""

    name: str
    messages: int
    consumers: int


@dataclass(frozen=True, slots=True)
class Remains:
    """Everything of a job that is there."""

    queues: tuple[Queue, ...]
    exchanges: tuple[str, ...]


def roles(names: Topology) -> tuple[str, ...]:
    """List everybody who has queues."""
    return (*names.parties, SCHEDULER, OPERATOR)


class Housekeeping:
    """One connection for it; use it in a `with` statement. Raises BrokerUnreachable, JobError for a bad URL."""

    def __init__(self, url: str, names: Topology) -> None:
        self._nodes, self._names = Address.parse(url), names
        self._user = self._nodes[-1].user
        self._connection = connect(self._nodes, "sl_queue operator")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection.is_open:
            self._connection.close()

    # Dead letters -----------------------------------------------------------------------------------------------

    def dead_letters(self, party: str) -> list[DeadLetter]:
        """Read what `party` refused, the oldest first; it stays where it is."""
        name = self._names.dead_letters(party)
        with self._channel(f"the read right on {name!r}") as channel:
            return [_letter(properties, body) for _, properties, body in _all_of(channel, name)]

    def put_back(self, party: str) -> Back:
        """Publish what `party` refused into the queues that it came from. What cannot go back stays where it is."""
        name, own = self._names.dead_letters(party), self._consumer(party)
        count, left = 0, dict[str, int]()
        rights = f"the read right on {name!r}, and the write right on the default exchange"
        with self._channel(rights) as channel, self._channel(rights) as out:
            out.confirm_delivery()
            for method, properties, body in _all_of(channel, name):
                why = _unfit(_letter(properties, body), own) or _publish(out, properties, body)
                if why is None:
                    channel.basic_ack(method.delivery_tag)
                    count += 1
                else:
                    left[why] = left.get(why, 0) + 1
        return Back(count, left)

    def purge(self, party: str) -> int:
        """Remove what `party` refused; returns how many."""
        name = self._names.dead_letters(party)
        with self._channel(f"the read right on {name!r}") as channel:
            return int(channel.queue_purge(name).method.message_count) if _look_up(channel, name) else 0

    def _consumer(self, party: str) -> frozenset[str]:
        return frozenset(self._names.queue(party, sender) for sender in self._names.senders_to(party))

    # What is left -----------------------------------------------------------------------------------------------

    def remains(self) -> Remains:
        """List everything of the job that is there."""
        everybody = roles(self._names)
        inboxes = [self._names.queue(role, sender) for role in everybody for sender in self._names.senders_to(role)]
        found = [self._found(name) for name in (*inboxes, *map(self._names.dead_letters, everybody))]
        exchanges = [name for name in map(self._names.exchange, everybody) if self._has_exchange(name)]
        return Remains(tuple(queue for queue in found if queue is not None), tuple(exchanges))

    def _found(self, name: str) -> Queue | None:
        with self._channel(f"a right on {name!r}") as channel:
            return _look_up(channel, name)

    def _has_exchange(self, name: str) -> bool:
        with self._channel(f"a right on {name!r}") as channel:
            return _is_there(lambda: channel.exchange_declare(name, passive=True))

    def remove(self, remains: Remains, *, in_use: bool) -> None:
        """Delete all of it; queues that somebody reads only if `in_use`. Raises PartyBusy, NotAllowed."""
        for queue in remains.queues:
            with self._channel(f"the configure right on {queue.name!r}") as channel:
                try:
                    channel.queue_delete(queue.name, if_unused=not in_use)
                except ChannelClosedByBroker as closed:
                    if closed.reply_code != PRECONDITION_FAILED:
                        raise
                    raise PartyBusy(f"a worker reads {queue.name!r}: stop it first, or give --force") from None
        for exchange in remains.exchanges:
            with self._channel(f"the configure right on {exchange!r}") as channel:
                channel.exchange_delete(exchange)

    @contextmanager
    def _channel(self, right: str) -> Iterator[BlockingChannel]:
        """Open a channel; what was read and not acknowledged goes back when it closes. `right`: needed in the body."""
        try:
            channel = self._connection.channel()
            yield channel
            if channel.is_open:
                channel.close()
        except ChannelClosedByBroker as closed:
            text = f"user {self._user!r} needs {right} ({closed.reply_text})"
            raise (NotAllowed if closed.reply_code == ACCESS_REFUSED else BrokerUnreachable)(text) from None
        except (AMQPError, OSError) as error:
            raise BrokerUnreachable(
                f"lost the broker at {self._nodes[-1]}: {why_not(error, self._nodes[-1])}; try again"
            ) from None


def _is_there(look_up: Callable[[], object]) -> bool:
    try:
        look_up()
    except ChannelClosedByBroker as closed:
        if closed.reply_code != NOT_FOUND:
            raise
        return False
    return True


def _look_up(channel: BlockingChannel, name: str) -> Queue | None:
    answers: list[Any] = []
    if not _is_there(lambda: answers.append(channel.queue_declare(name, passive=True).method)):
        return None
    return Queue(name, answers[0].message_count, answers[0].consumer_count)


def _all_of(channel: BlockingChannel, name: str) -> Iterator[tuple[Any, Any, bytes]]:
    """Yield the messages that are ready in a queue now; what comes meanwhile is not waited for."""
    queue = _look_up(channel, name)
    for _ in range(0 if queue is None else queue.messages):
        method, properties, body = channel.basic_get(name)
        if method is None:
            return
        yield method, properties, body


def _letter(properties: Any, body: bytes) -> DeadLetter:
    headers = properties.headers or {}
    size = headers.get("x-size")
    return DeadLetter(
        reason=str(headers.get("x-reason", "no reason is given")),
        queue=str(headers.get("x-queue", "")),
        size=size if isinstance(size, int) else len(body),
        kept=len(body),
        at=None if properties.timestamp is None else float(properties.timestamp),
    )


def _unfit(letter: DeadLetter, own: frozenset[str]) -> str | None:
    """Say why a letter cannot go back, or return None."""
    if letter.queue not in own:
        return "do not say from which queue of this party they came"
    if not letter.is_whole:
        return "are larger than what is kept of a dead letter, so that only their beginning is here"
    return None


def _publish(out: BlockingChannel, properties: Any, body: bytes) -> str | None:
    """Publish into the queue that a letter names; returns why not, if that queue does not take it."""
    queue = properties.headers["x-queue"]
    message = pika.BasicProperties(content_type=properties.content_type, delivery_mode=2)
    try:
        out.basic_publish(DEFAULT_EXCHANGE, queue, body, message, mandatory=True)
    except UnroutableError:
        return "came from a queue that is not there any more"
    except NackError:
        return "came from a queue that is full"
    return None


def senders(names: Topology, party: str) -> Mapping[str, str]:
    """Map each queue of a party to the sender of its messages."""
    return {names.queue(party, sender): sender for sender in names.senders_to(party)}


def readers(names: Topology, queues: Sequence[Queue]) -> list[str]:
    """List the roles of which a worker, or a command of the operator, is connected."""
    read = {queue.name for queue in queues if queue.consumers}
    return [role for role in roles(names) if read.intersection(senders(names, role))]

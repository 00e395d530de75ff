"""Exchanges, queues and bindings at the broker: declared where that is allowed, looked up where it is not."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sl_queue.protocol.messages import OPERATOR
from sl_queue.protocol.topology import Topology
from sl_queue.transport.rabbitmq.connection import Channel, Connection
from sl_queue.transport.rabbitmq.failures import Lost, Refused

QueueType = Literal["classic", "quorum"]
Arguments = Mapping[str, str | int]

ACCESS_REFUSED = 403
PRECONDITION_FAILED = 406  # it is there with other arguments: the operator's choice
NEVER = 1_000_000_000  # redeliveries before a quorum queue drops a message; RabbitMQ 4 says 20 by default


def inbox_arguments(receiver: str, queue_type: QueueType) -> Arguments:
    """Return how a queue that `receiver` reads is declared: what was confirmed is never dropped."""
    newest: Arguments = {"x-max-length": 1, "x-overflow": "drop-head"}  # only that status is worth reading
    full: Arguments = {"x-overflow": "reject-publish"}  # where a policy limits its length
    kept = newest if receiver == OPERATOR else full
    if queue_type == "classic":
        return kept
    replicated: Arguments = {"x-queue-type": "quorum", "x-delivery-limit": NEVER, **kept}
    return replicated if receiver == OPERATOR else {"x-single-active-consumer": True, **replicated}


def dead_letter_arguments(queue_type: QueueType) -> Arguments:
    """Return how dead letters are kept, the newest only: nobody may fill the broker with refused messages."""
    limits: Arguments = {"x-max-length": 1000, "x-max-length-bytes": 16 * 1024 * 1024}
    return limits if queue_type == "classic" else {"x-queue-type": "quorum", "x-delivery-limit": NEVER, **limits}


def channels_needed(topology: Topology, party: str) -> int:
    """Count the channels that a party has open at once: one a sender, one to publish, one to declare queues."""
    return len(topology.senders_to(party)) + 2


async def declare(connection: Connection, topology: Topology, party: str, queue_type: QueueType) -> None:
    """Declare everything that the party touches. Raises Lost, also for what is not there and may not be declared."""
    declaring = _Declaring(await connection.channel(), connection, topology, queue_type)
    await declaring.exchange(topology.exchange(party))
    await declaring.queue(topology.dead_letters(party), dead_letter_arguments(queue_type))
    await declaring.bind(topology.dead_letters(party), topology.dead_exchange(party), f"*.dead.{party}")
    for sender in topology.senders_to(party):
        await declaring.exchange(topology.exchange(sender))
        await declaring.inbox(party, sender)
    for receiver in topology.receivers_of(party):
        await declaring.inbox(receiver, party)
    await declaring.channel.close()


@dataclass(slots=True)
class _Declaring:  # mutable: a refusal closes the channel, and what follows needs a new one
    channel: Channel
    connection: Connection
    topology: Topology
    queue_type: QueueType

    async def exchange(self, name: str) -> None:
        refused = await self._try(lambda: self.channel.exchange(name, passive=False))
        if refused is not None:
            await self._look_up(f"exchange {name!r}", lambda: self.channel.exchange(name, passive=True), refused)

    async def queue(self, name: str, arguments: Arguments) -> None:
        refused = await self._try(lambda: self.channel.queue(name, arguments, passive=False))
        if refused is not None:
            await self._look_up(f"queue {name!r}", lambda: self.channel.queue(name, None, passive=True), refused)

    async def bind(self, queue: str, exchange: str, key: str) -> None:
        await self._try(lambda: self.channel.bind(queue, exchange, key))  # if not: who declared it has bound it

    async def inbox(self, receiver: str, sender: str) -> None:
        queue = self.topology.queue(receiver, sender)
        await self.queue(queue, inbox_arguments(receiver, self.queue_type))
        await self.bind(queue, self.topology.exchange(sender), self.topology.binding_key(receiver))

    async def _try(self, declare: Callable[[], Awaitable[object]]) -> str | None:
        """Do it; returns why not, where this user may not or it is there in another form."""
        try:
            await declare()
        except Refused as refused:
            self.channel = await self.connection.channel()
            if refused.code not in (ACCESS_REFUSED, PRECONDITION_FAILED):
                raise Lost(refused.text) from None
            return refused.text
        return None

    async def _look_up(self, what: str, look_up: Callable[[], Awaitable[object]], refused: str) -> None:
        try:
            await look_up()
        except Refused:
            advice = "import the job's definitions at the broker, or let this user configure it"
            raise Lost(f"{what} is not there and could not be declared ({refused}); {advice}") from None

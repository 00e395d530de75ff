"""Channels of parties and of the scheduler at a broker in memory, and what others publish there."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sl_queue.errors import SlQueueError
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.control import (
    Command,
    Message,
    Start,
    kind_of,
)
from sl_queue.protocol.messages import SCHEDULER, Activation, Gradient, Header, MicroBatch, Payload
from sl_queue.protocol.topology import Topology
from sl_queue.transport.link import Delivery
from sl_queue.transport.memory import MemoryBroker
from sl_queue.transport.party_channel import PartyChannel
from sl_queue.transport.scheduler_channel import LinkSchedulerChannel
from tests.support.waiting import await_that

TOPOLOGY = Topology("label", ("a", "b"))
PATIENCE_S = 60.0  # no test waits for it


def tensor(*values: int) -> Payload:
    return Payload("int8", (len(values),), bytes(values))


def activation(step: int, index: int = 0) -> Activation:
    return Activation(MicroBatch(step, index), tensor(step, index))


def body(message: Message, sender: str, receiver: str, **changes: Any) -> bytes:
    """Encode the message as its sender would publish it in run r, generation 1, unless something is changed."""
    where = message.micro_batch if isinstance(message, Activation | Gradient) else MicroBatch(0, 0)
    header = Header("r", 1, kind_of(message), sender, receiver, where)
    return encode(replace(header, **changes), message)


@dataclass
class Post:
    """A broker, the channels that are open at it, and what the scheduler and the operator have been sent."""

    broker: MemoryBroker = field(default_factory=MemoryBroker)
    channels: list[Any] = field(default_factory=list)
    told: list[tuple[str, Message]] = field(default_factory=list)
    failures: list[SlQueueError] = field(default_factory=list)  # of those who listen

    def channel(
        self, party: str, patience_s: float = PATIENCE_S, depth: int = 2, adopt: bool = True, **more: Any
    ) -> PartyChannel:
        link = self.broker.link(party, TOPOLOGY, 100)
        me = f"{party}1"
        channel = PartyChannel(link, party, TOPOLOGY, me, patience_s=patience_s, persistent=False, depth=depth, **more)
        channel.open()
        self.channels.append(channel)
        if adopt:
            channel.enter(Start(me, "r", (-1,)), -1)
        return channel

    def listen(self, who: str = SCHEDULER) -> None:
        """Collect what is sent to the scheduler, or to the operator."""
        link = self.broker.link(who, TOPOLOGY)

        def on_delivery(delivery: Delivery) -> None:
            self.told.append((delivery.sender, decode(delivery.body)[1]))
            link.acknowledge([delivery.tag])

        link.open(on_delivery, lambda: None, self.failures.append)
        self.channels.append(link)

    def publish(self, receiver: str, sender: str, *bodies: bytes) -> None:
        for published in bodies:
            self.broker.publish(receiver, sender, published, persistent=False, expires=False)

    def command(self, party: str, command: Command) -> None:
        self.publish(party, SCHEDULER, body(command, SCHEDULER, party))

    def when(self, true: Callable[[], object], party: str, command: Command) -> None:
        """Have the scheduler give an order once that is so, in a thread of its own."""

        def give() -> None:
            await_that(true)
            self.command(party, command)

        threading.Thread(target=give, daemon=True).start()

    def left(self, receiver: str, sender: str) -> int:
        """Count the messages that the broker still holds for that queue."""
        queue = self.broker.queue(receiver, sender)
        return len(queue.ready) + len(queue.unacknowledged)

    def reported(self, kind: type[Any]) -> list[Any]:
        return [message for _, message in list(self.told) if isinstance(message, kind)]


def nothing() -> None:
    """Save no checkpoint."""


def scheduler(post: Post) -> LinkSchedulerChannel:
    channel = LinkSchedulerChannel(post.broker.link(SCHEDULER, TOPOLOGY), TOPOLOGY, "s1", patience_s=PATIENCE_S)
    channel.open()
    post.channels.append(channel)
    return channel

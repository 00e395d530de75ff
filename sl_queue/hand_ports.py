"""The seams of hands: between a party's stages and its lead, between a hand and its computing, and the lane between."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from sl_queue.errors import SlQueueError
from sl_queue.protocol.hands import Call, Result
from sl_queue.protocol.messages import MicroBatch, Payload


class Hands(Protocol):
    """Those who compute a party's micro-batches: any number of processes that come and go. Used by one thread.

    A task is a micro-batch at one hand; should that hand be lost, another one does the same calls. A call is a function
    of its arguments, so no result depends on who computed it, on how many there are, or on when.
    """

    def equip(self, tensors: Mapping[str, Payload]) -> None:
        """Give the weights with which everything is computed that begins from now on."""

    def begin(self, what: str, micro_batch: MicroBatch, tensors: Mapping[str, Payload] = MappingProxyType({})) -> int:
        """Begin a task with its first call; returns its number, at once."""

    def go_on(self, task: int, what: str, tensors: Mapping[str, Payload] = MappingProxyType({})) -> None:
        """Add the next call of a task, for whoever has it."""

    def is_done(self, task: int, what: str) -> bool:
        """Return True if the result of a call is here."""

    def result(self, task: int, what: str) -> Result:
        """Block until a call is done. Raises what the model did, and what ends or redirects the worker meanwhile."""

    def end(self, task: int) -> None:
        """Forget a task that is done with."""

    def clear(self) -> None:
        """Forget all tasks: another timeline begins."""


class Workshop(Protocol):
    """The computing of a hand; used by one thread."""

    def equip(self, version: int, tensors: Mapping[str, Payload], oldest: int, oldest_task: int) -> None:
        """Have another version of the weights; older ones than `oldest`, and older tasks, may be forgotten."""

    def has(self, version: int) -> bool:
        """Return True if these weights are here."""

    def forget(self) -> None:
        """Forget everything: another lead will say it again."""

    def key_draws(self, secret: bytes) -> None:
        """Let what the models draw follow from the party's secret."""

    def do(self, call: Call) -> tuple[dict[str, Any], dict[str, Payload]] | None:
        """Do one call, and return its values and tensors; None if what came before it is not here."""


class LaneSide(Protocol):
    """The owner of an end of a lane; called on the lane's thread."""

    def on_session(self, me: str) -> None:
        """Begin: nothing that was under way counts any more. A hand has another name in each session."""

    def on_lost(self) -> None:
        """Note that nothing comes and goes until the next session begins."""

    def on_body(self, body: bytes, ticket: int | None) -> None:
        """Take a message; `ticket` is its number if it is one of the tasks."""

    def on_gone(self, to: str) -> None:
        """Note that a message has found nobody there."""

    def on_failure(self, error: SlQueueError) -> None:
        """Note that the lane has given up."""


class Lane(Protocol):
    """One end of the way between a party's lead and its hands. Thread-safe; callbacks must not block."""

    def open(self, side: LaneSide) -> None:
        """Connect; blocks until messages can flow. Raises BrokerUnreachable, and PartyBusy for a second lead."""

    def send(self, to: str, body: bytes) -> None:
        """Queue for sending and return: to LEAD, TASKS, HANDS, or a hand by its name."""

    def take_tickets(self) -> None:
        """Of a hand: have tickets from now on, a few at a time."""

    def done(self, ticket: int) -> None:
        """Acknowledge a ticket, when the broker has confirmed what was sent before."""

    def close(self) -> None:
        """Send what is queued, and leave. Idempotent."""

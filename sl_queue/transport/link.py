"""One worker's connection to a broker: bytes in, bytes out, confirms, acknowledgements. No recovery law in here.

`memory.MemoryLink` and `rabbitmq.RabbitLink` pass one contract suite (tests/contract/test_link_contract.py).
Callbacks run on the link's own thread (over memory: on the publisher's); they must not block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NewType, Protocol

from sl_queue.errors import SlQueueError
from sl_queue.protocol.measures import Connectivity
from sl_queue.protocol.messages import Kind

Tag = NewType("Tag", tuple[int, int, int])  # (connection, channel or queue, delivery): void after a reconnect


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message from the queue of (this party, `sender`)."""

    sender: str
    body: bytes | memoryview = field(repr=False)  # of its receiver alone, where it can be written to
    tag: Tag
    redelivered: bool


@dataclass(frozen=True, slots=True)
class Outage:
    """The time in which a link could carry nothing since it was opened, and why it cannot now."""

    total_s: float = 0.0
    now_s: float = 0.0  # of that, since it was of use last
    reason: str = ""


NO_OUTAGE = Outage()


class Link(Protocol):
    """Thread-safe. Everything published and not yet confirmed is published again after a reconnect, in order.

    A link may be made without confirms: what it has handed to the network counts as confirmed, and may be lost.
    """

    def open(
        self,
        on_delivery: Callable[[Delivery], None],
        on_reconnect: Callable[[], None],
        on_failure: Callable[[SlQueueError], None],
    ) -> None:
        """Connect, declare or look up the topology, and consume; blocks until deliveries can flow.

        `on_reconnect` is called after every later reconnect (all earlier tags are void, what was unacknowledged will
        be delivered again); `on_failure` once, when the link gives up. Raises BrokerUnreachable, PartyBusy.
        """

    def publish(
        self, receiver: str, kind: Kind, run: str, body: bytes, *, persistent: bool, expires_s: float | None = None
    ) -> None:
        """Queue for publishing and return; mandatory, confirmed in the background. Raises what on_failure was given."""

    def mark(self) -> int:
        """Return how far publishing has come, for `flush`."""

    def flush(self, timeout_s: float | None = None, mark: int | None = None) -> bool:
        """Block until everything published so far, or up to `mark`, is confirmed; False if it took `timeout_s`."""

    def acknowledge(self, tags: Sequence[Tag], *, later: bool = False) -> None:
        """Acknowledge; tags of an earlier connection are ignored (those messages come again).

        `later`: with the next message that is published, or when many wait, or after a second.
        """

    def reject(self, tag: Tag, reason: str) -> None:
        """Refuse for good: to the dead-letter queue `q.<party>.dead`, with the reason in the header `x-reason`."""

    def outage(self) -> Outage:
        """Return the time without a connection, or with a broker that takes no messages."""

    @property
    def connectivity(self) -> Connectivity:
        """The connection to the broker, now."""

    def close(self) -> None:
        """Close in order, without waiting for confirms; unacknowledged messages go back to their queues. Idempotent."""

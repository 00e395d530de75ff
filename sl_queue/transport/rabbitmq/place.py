"""Who talks to which node of a broker about what, and how that ends."""

from dataclasses import dataclass
from typing import Protocol

from sl_queue.errors import SlQueueError
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.protocol.topology import Topology
from sl_queue.transport.rabbitmq.address import Address
from sl_queue.transport.rabbitmq.names import QueueType
from sl_queue.transport.retry import Limits


@dataclass(frozen=True, slots=True)
class Place:
    """Whose connection it is, where to, and what may be waiting in it."""

    address: Address
    party: str
    topology: Topology
    prefetch: int  # unacknowledged messages of one sender, 0 for any number
    queue_type: QueueType
    limits: Limits

    @property
    def who(self) -> str:
        """As messages for people name it."""
        return f"the {self.party}" if self.party in (SCHEDULER, OPERATOR) else f"party {self.party!r}"


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a session is over. With an error there is no next one."""

    reason: str
    error: SlQueueError | None = None


class End(Protocol):
    """End a session, with a reason; the first one counts."""

    def __call__(self, reason: str, error: SlQueueError | None = None) -> None: ...

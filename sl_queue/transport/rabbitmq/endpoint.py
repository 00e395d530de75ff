"""Connection settings of one broker node, and how a session there ends."""

from dataclasses import dataclass
from typing import Protocol

from sl_queue.errors import BrokerUnreachable, SlQueueError
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Kind
from sl_queue.protocol.topology import Topology
from sl_queue.transport.rabbitmq.address import Address
from sl_queue.transport.rabbitmq.names import QueueType
from sl_queue.transport.retry import Limits


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Owner and address of a connection, and what may be waiting in it."""

    address: Address
    party: str
    topology: Topology
    prefetch: int  # unacknowledged messages of one sender, 0 for any number
    queue_type: QueueType
    limits: Limits
    confirms: bool = True  # of the broker, for each message; without them one may be lost with the connection

    @property
    def who(self) -> str:
        """As messages for people name it."""
        return f"the {self.party}" if self.party in (SCHEDULER, OPERATOR) else f"party {self.party!r}"

    def way_to(self, receiver: str, kind: Kind, run: str) -> tuple[str, str]:
        """Return the exchange and the routing key of a message."""
        return self.topology.exchange(self.party), self.topology.routing_key(run, kind, receiver)


@dataclass(frozen=True, slots=True)
class Ended:
    """Reason why a session is over. With an error it is the last; `denied`: the broker refused what was published."""

    reason: str
    error: SlQueueError | None = None
    denied: bool = False


class End(Protocol):
    """End a session, with a reason; the first one counts."""

    def __call__(self, reason: str, error: SlQueueError | None = None, *, denied: bool = False) -> None: ...


BRIEF_S = 5.0  # a session that ends sooner is followed by a pause, and belongs to the ones before


class Denials:
    """Sessions that ended because the broker refused what was published. Mutable: it counts those in a row.

    A right that was revoked may be there again a moment later, as a login may that is refused: all are tried for the
    same time. One that was never there is not waited for.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._ever_published = limit_s, False
        self._since = 0.0
        self.count = 0

    def note(self, ended: Ended, began: float, now: float, *, published: bool) -> None:
        """Note that a session has ended; `published`: whether the broker confirmed anything in it.

        Raises BrokerUnreachable to give up.
        """
        self._ever_published = self._ever_published or published
        if not ended.denied:
            return
        if not self.count or now - began >= BRIEF_S:
            self._since, self.count = now, 0
        self.count += 1
        if not self._ever_published:
            raise BrokerUnreachable(ended.reason)
        if now - self._since > self._limit_s:
            raise BrokerUnreachable(f"{ended.reason}; tried for {self._limit_s:.0f} s")

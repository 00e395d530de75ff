"""Observers and inboxes of link tests: who is there, and an inbox that can be waited for."""

import threading
from collections.abc import Callable

from sl_queue.errors import SlQueueError
from sl_queue.protocol.messages import Kind
from sl_queue.protocol.topology import Topology
from sl_queue.transport.link import Delivery, Link

WAIT_S = 90.0


def two_parties(prefix: str = "") -> Topology:
    return Topology("insurer", ("bank",), prefix)


class Inbox:  # mutable: it collects what a link says
    """Opens a link and keeps what comes."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.deliveries: list[Delivery] = []
        self.reconnects = 0
        self.failure: SlQueueError | None = None
        self._changed = threading.Condition()

    def open(self) -> "Inbox":
        self.link.open(self._on_delivery, self._on_reconnect, self._on_failure)
        return self

    def bodies(self) -> list[bytes]:
        with self._changed:
            return [bytes(delivery.body) for delivery in self.deliveries]

    def await_that(self, what: Callable[["Inbox"], object], timeout_s: float = WAIT_S) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: what(self), timeout_s), f"{self.failure}, {len(self.deliveries)} here"

    def take(self, count: int, timeout_s: float = WAIT_S) -> list[Delivery]:
        """Take the first `count` deliveries that were not taken yet."""
        self.await_that(lambda inbox: len(inbox.deliveries) >= count, timeout_s)
        with self._changed:
            taken, self.deliveries = self.deliveries[:count], self.deliveries[count:]
            return taken

    def take_until(self, body: bytes) -> list[Delivery]:
        """All deliveries up to the one that says `body`: nothing can be behind it that was published before."""
        self.await_that(lambda inbox: any(delivery.body == body for delivery in inbox.deliveries))
        with self._changed:
            return self.take(1 + [delivery.body for delivery in self.deliveries].index(body))

    def _on_delivery(self, delivery: Delivery) -> None:
        with self._changed:
            self.deliveries.append(delivery)
            self._changed.notify_all()

    def _on_reconnect(self) -> None:
        with self._changed:
            self.reconnects += 1
            self._changed.notify_all()

    def _on_failure(self, error: SlQueueError) -> None:
        with self._changed:
            self.failure = error
            self._changed.notify_all()


def send(link: Link, receiver: str, *bodies: bytes, persistent: bool = False) -> None:
    for body in bodies:
        link.publish(receiver, Kind.ACTIVATION, "r1", body, persistent=persistent)


def numbered(count: int) -> list[bytes]:
    return [str(number).encode() for number in range(count)]

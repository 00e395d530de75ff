"""One connection's life: take the lock of the party, consume, publish, until it ends.

A session is never repaired: when anything of it is lost, cancelled or refused, it ends with a reason and the link makes
the next one. Only missing queues are declared again in place. `exchange` and `acknowledge` run on the thread that has
the link's turn, `reject` on any, all else on the link's I/O thread.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from sl_queue.errors import SlQueueError, TransportError
from sl_queue.transport.link import Delivery, Tag
from sl_queue.transport.outages import Outages
from sl_queue.transport.rabbitmq.connection import Connection
from sl_queue.transport.rabbitmq.consuming import Consumer
from sl_queue.transport.rabbitmq.endpoint import Ended, Endpoint
from sl_queue.transport.rabbitmq.failures import Denied
from sl_queue.transport.rabbitmq.names import channels_needed, declare
from sl_queue.transport.rabbitmq.publishing import Publisher
from sl_queue.transport.rabbitmq.unconfirmed import Unconfirmed

log = logging.getLogger("sl_queue")


class Session:
    """Mutable: what is delivered and what is sent on its connection is void afterwards."""

    def __init__(
        self,
        number: int,
        endpoint: Endpoint,
        unconfirmed: Unconfirmed,
        on_delivery: Callable[[Delivery], None],
        outages: Outages,
    ) -> None:
        self._endpoint, self._outages = endpoint, outages
        self._connection = Connection(endpoint.address, f"sl_queue {endpoint.party}")
        self.ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._consumer = Consumer(number, endpoint, self._connection, unconfirmed, on_delivery, self._end)
        self._publisher = Publisher(endpoint, self._connection, unconfirmed, self.acknowledge, self._end)
        self._blocked: asyncio.TimerHandle | None = None
        self._begun = False

    async def begin(self, before_deliveries: Callable[[], None], busy_s: float) -> None:
        """Connect, declare, consume. Raises Lost, Denied, PartyBusy."""
        endpoint = self._endpoint
        await self._connection.open()
        self._connection.lost.add_done_callback(lambda lost: self._end(lost.result()))
        self._connection.on_blocked(self._on_blocked, self._on_unblocked)
        self._require_channels()
        await declare(self._connection, endpoint.topology, endpoint.party, endpoint.queue_type)
        await self._publisher.begin()
        self._outages.end()
        before_deliveries()
        await self._consumer.take(busy_s)
        self._begun = True
        if not self.ended.done():
            self._publisher.open()

    def _require_channels(self) -> None:
        """Raise Denied if the broker allows fewer channels in a connection than there will be at once."""
        needed, allowed = channels_needed(self._endpoint.topology, self._endpoint.party), self._connection.most_channels
        if needed > allowed:
            raise Denied(
                f"{self._endpoint.who} needs {needed} channels in its connection, the broker allows {allowed}: set "
                f"channel_max = {needed} or more in its rabbitmq.conf"
            )

    @property
    def is_open(self) -> bool:
        """True while messages go to and fro."""
        return self._begun and not self.ended.done()

    @property
    def certificates(self) -> Mapping[str, float]:
        """Unix time at which the broker's certificate ends, and the own one if there is one."""
        return self._connection.certificates

    @property
    def published(self) -> bool:
        """True if the broker took anything that was published."""
        return self._publisher.confirmed

    @property
    def fruitful(self) -> bool:
        """True if anything was delivered or confirmed."""
        return self._consumer.delivered or self._publisher.confirmed

    def exchange(self, tags: Sequence[Tag]) -> None:
        """Acknowledge those of this session, and publish what waits: as one, where the kernel takes it."""
        if not tags:
            self._publisher.pump()
            return
        with self._connection.together():
            self._consumer.acknowledge(tags)
            done = self._publisher.pump()
        if not done:  # there may be room again in what was held
            self._publisher.pump()

    def acknowledge(self, tags: Sequence[Tag]) -> None:
        """Acknowledge those of this session."""
        self._consumer.acknowledge(tags)

    def reject(self, tag: Tag, reason: str) -> None:
        """Send to the dead letters; acknowledged when the broker has it there. May be called by any thread."""
        self._consumer.reject(tag, reason)

    async def close(self) -> None:
        """Leave in order; what was published and acknowledged before is processed by the broker."""
        self._end("closed")
        await self._connection.close()

    async def abort(self) -> None:
        """Cut the connection, if there still is one."""
        self._end("cut")
        await self._connection.abort("cut")

    def _end(self, reason: str, error: SlQueueError | None = None, *, denied: bool = False) -> None:
        if self._blocked is not None:
            self._blocked.cancel()
        self._publisher.close()
        if not self.ended.done():
            self.ended.set_result(Ended(reason, error, denied))

    def _on_blocked(self, reason: str) -> None:
        limit_s = self._endpoint.limits.lost_s
        log.warning("%s: the broker takes no messages (%s); waiting %.0f s", self._endpoint.who, reason, limit_s)
        self._outages.begin(f"the broker takes no messages ({reason})")
        self._publisher.blocked = True
        text = f"the broker at {self._endpoint.address} took no messages for {limit_s:.0f} s ({reason})"
        error = TransportError(f"{text}; free memory or disk there")
        self._blocked = asyncio.get_running_loop().call_later(limit_s, lambda: self._end("blocked", error))

    def _on_unblocked(self) -> None:
        log.info("%s: the broker takes messages again", self._endpoint.who)
        self._outages.end()
        self._publisher.blocked = False
        self._publisher.pump()
        if self._blocked is not None:
            self._blocked.cancel()
            self._blocked = None

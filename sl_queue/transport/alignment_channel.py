"""A role's channel while rows are aligned: messages in and out over a link, opened and decoded, and nothing kept.

No recovery law in here: whoever needs something asks for it again, so a message is acknowledged when it was dealt with.
Messages of a run that lie in the queues from before are dropped.
"""

import logging
import queue
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from sl_queue.errors import RemoteProtocolError, SlQueueError
from sl_queue.protocol.alignment import MESSAGE_BYTES
from sl_queue.protocol.codec import AnotherVersion, decode, encode
from sl_queue.protocol.messages import (
    SCHEDULER,
    Align,
    Aligned,
    Aligning,
    Alive,
    Command,
    Failed,
    Header,
    Joined,
    Masked,
    Message,
    MicroBatch,
    Offer,
    Report,
    Status,
    Stop,
    Stopped,
    StopRequest,
    kind_of,
)
from sl_queue.protocol.party.bounds import control_bytes
from sl_queue.security.sealing import OVERHEAD_BYTES, Seal
from sl_queue.transport.link import Delivery, Link, Tag
from sl_queue.transport.refusals import Refusals
from sl_queue.transport.versions import Versions

PREFETCH = 32  # messages of one sender that are here and not dealt with
_CONCERNED = (Masked, Offer, Aligning, Aligned, Alive, Align, Stop, Failed, Stopped, StopRequest, Joined)

log = logging.getLogger("sl_queue")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that was opened and decoded; `session` is that of masked ids."""

    sender: str
    session: str
    message: Message = field(repr=False)
    tag: Tag


class LinkAlignmentChannel:
    """ports.AlignmentChannel over a link; `seal` keeps messages from the broker. Used by one thread."""

    def __init__(self, link: Link, role: str, *, patience_s: float, seal: Seal | None = None) -> None:
        self._link, self._role, self._patience_s, self._seal = link, role, patience_s, seal
        self._inbox: queue.Queue[Arrival | None] = queue.Queue()
        self._refusals, self._versions = Refusals(role, patience_s), Versions(patience_s)
        self._heard: dict[str, float] = {}
        self._failure: SlQueueError | None = None
        self.reconnects = 0

    def open(self) -> None:
        """Connect and consume. Raises BrokerUnreachable, PartyBusy."""
        self._link.open(self._on_delivery, self._on_reconnect, self._on_failure)

    def close(self) -> None:
        """Flush what was published, then leave."""
        try:
            if self._failure is None:
                with suppress(SlQueueError):
                    self._link.flush(timeout_s=5.0)
        finally:
            self._link.close()
            self._refusals.tell(time.monotonic(), all_of_it=True)

    def send(self, receiver: str, message: Masked, session: str) -> None:
        """Publish masked ids; a broker that restarts may lose them."""
        self._publish(receiver, message, session, message.micro_batch, persistent=False, expires_s=None)

    def tell(self, receiver: str, message: Report | Command | Status, *, lasting: bool = False) -> None:
        """Publish a statement about the present, which is worth nothing later unless it is `lasting`."""
        expires_s = None if lasting else self._patience_s
        self._publish(receiver, message, "", MicroBatch(0, 0), persistent=lasting, expires_s=expires_s)

    def next(self, timeout_s: float) -> Arrival | None:
        """Return the next message; None if none came in time. Raises what ended the link."""
        if self._failure is not None:
            raise self._failure
        try:
            arrival = self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get_nowait()
        except queue.Empty:
            self._refusals.tell(time.monotonic())
            return None
        if self._failure is not None:
            raise self._failure
        return arrival

    def done(self, arrival: Arrival) -> None:
        """Acknowledge a message: it was dealt with."""
        self._link.acknowledge([arrival.tag])

    def refuse(self, arrival: Arrival, reason: str) -> None:
        """Refuse a message for good, with the reason."""
        self._reject(arrival.sender, arrival.tag, reason)

    def flush(self) -> None:
        """Block until the broker has everything that was published."""
        while not self._link.flush(timeout_s=1.0):
            if self._failure is not None:
                raise self._failure

    def silent_s(self, sender: str) -> float:
        """Seconds since that role was heard of last; since the first question if it never was."""
        now = time.monotonic()
        return max(0.0, now - self._heard.setdefault(sender, now) - self._link.outage().now_s)

    def foreign(self) -> Mapping[str, str]:
        """Name roles of which nothing came for a patience but messages of another version, with what to do."""
        return self._versions.named(time.monotonic())

    def fail(self, error: SlQueueError) -> None:
        """Whoever waits here raises `error`."""
        self._failure = error
        self._inbox.put(None)

    _on_failure = fail

    def _publish(
        self,
        receiver: str,
        message: Message,
        session: str,
        where: MicroBatch,
        *,
        persistent: bool,
        expires_s: float | None,
    ) -> None:
        kind = kind_of(message)
        body = encode(Header(session, 0, kind, self._role, receiver, where), message)
        body = body if self._seal is None else self._seal.seal(receiver, body)
        self._link.publish(receiver, kind, session, body, persistent=persistent, expires_s=expires_s)

    def _on_delivery(self, delivery: Delivery) -> None:
        sender = delivery.sender
        try:
            header, message = self._read(delivery)
        except RemoteProtocolError as error:
            if isinstance(error, AnotherVersion):
                self._versions.foreign(sender, error.speaks, time.monotonic())
            self._reject(sender, delivery.tag, str(error))
            return
        self._versions.understood(sender)
        if not delivery.redelivered:
            self._heard[sender] = time.monotonic()
        if not isinstance(message, _CONCERNED):  # of a run, or of a worker that is through already
            self._link.acknowledge([delivery.tag])
            return
        self._inbox.put(Arrival(sender, header.run, message, delivery.tag))

    def _read(self, delivery: Delivery) -> tuple[Header, Message]:
        sender, size = delivery.sender, len(delivery.body)
        most = max(MESSAGE_BYTES, control_bytes(SCHEDULER)) + OVERHEAD_BYTES
        if size > most:
            raise RemoteProtocolError(f"a message of {size} bytes; while rows are aligned they have at most {most}")
        body = delivery.body if self._seal is None else self._seal.open(sender, delivery.body).body
        header, message = decode(body)
        if header.sender != sender:
            raise RemoteProtocolError(f"says it is from {header.sender!r:.100}, but came from {sender!r}")
        return header, message

    def _reject(self, sender: str, tag: Tag, reason: str) -> None:
        if self._refusals.note(sender, reason, time.monotonic()):
            self._link.reject(tag, reason)
        else:
            self._link.acknowledge([tag])

    def _on_reconnect(self) -> None:
        self.reconnects += 1

"""A role's channel while rows are aligned: messages in and out over its mail, and nothing kept.

No recovery law in here: whoever needs something asks for it again, so a message is acknowledged when it was dealt with.
Messages of a run that lie in the queues from before are dropped.
"""

import queue
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from sl_queue.errors import SlQueueError
from sl_queue.protocol.alignment import MESSAGE_BYTES
from sl_queue.protocol.codec import Terms
from sl_queue.protocol.control import (
    Align,
    Aligned,
    Aligning,
    Alive,
    Command,
    Failed,
    Join,
    Message,
    Offer,
    Report,
    Status,
    Stop,
    Stopped,
    StopRequest,
    kind_of,
)
from sl_queue.protocol.events import Observer, Sent, ignore
from sl_queue.protocol.messages import SCHEDULER, Header, Masked, MicroBatch
from sl_queue.protocol.party.bounds import control_bytes
from sl_queue.protocol.topology import Topology
from sl_queue.security.sealing import Seal
from sl_queue.transport.link import Link, Tag
from sl_queue.transport.mail import Letter, Mail, Spoilt
from sl_queue.transport.pulse import Pulse
from sl_queue.transport.reporting import alive_every_s

PREFETCH = 32  # messages of one sender that are here and not dealt with
_CONCERNED = (Masked, Offer, Aligning, Aligned, Alive, Align, Stop, Failed, Stopped, StopRequest, Join)
_LARGEST = max(MESSAGE_BYTES, control_bytes(SCHEDULER))


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that was read; `session` is that of masked ids."""

    sender: str
    session: str
    message: Message = field(repr=False)
    tag: Tag


class LinkAlignmentChannel:
    """loops.alignment_ports.Channel over a link; `seal` keeps messages from the broker. Used by one thread."""

    def __init__(
        self,
        link: Link,
        role: str,
        topology: Topology,
        incarnation: str,
        *,
        patience_s: float,
        seal: Seal | None = None,
        observe: Observer = ignore,
    ) -> None:
        senders = topology.senders_to(role)
        terms = {sender: Terms.between(topology, sender, role) for sender in senders}
        largest = dict.fromkeys(senders, _LARGEST)
        self._link, self._role, self._observe = link, role, observe
        self._mail = Mail(
            link, role, terms, incarnation, patience_s=patience_s, largest=largest, seal=seal, observe=observe
        )
        self._inbox: queue.Queue[Arrival | None] = queue.Queue()
        self._pulse = Pulse(role, alive_every_s(patience_s))
        self._heard: dict[str, float] = {}  # by `present_s`
        self._failure: SlQueueError | None = None
        self.reconnects = 0

    def open(self) -> None:
        """Connect and consume. Raises BrokerUnreachable, PartyBusy."""
        self._mail.open(self)
        self._pulse.start()

    def close(self) -> None:
        """Flush what was published, then leave."""
        self._pulse.end()
        try:
            self._mail.close(failed=self._failure is not None)
        finally:
            self._pulse.join()

    def send(self, receiver: str, message: Masked, session: str, *, lasting: bool = False) -> None:
        """Publish masked ids; a broker that restarts may lose them unless they are `lasting`."""
        header = Header(session, 0, message.kind, self._role, receiver, message.micro_batch)
        body = self._mail.sealed(receiver, header, message)
        self._observe(Sent(self._role, receiver, message.kind, len(body)))
        self._link.publish(receiver, message.kind, session, body, persistent=lasting)

    def tell(
        self, receiver: str, message: Report | Command | Status, *, lasting: bool = False, session: str = ""
    ) -> None:
        """Publish a statement about the present, which is worth nothing later unless it is `lasting`."""
        header = Header(session, 0, kind_of(message), self._role, receiver, MicroBatch(0, 0))
        self._mail.send(receiver, header, message, lasting=lasting)

    def next(self, timeout_s: float) -> Arrival | None:
        """Return the next message; None if none came in time. Raises what ended the link, after what came before."""
        try:
            arrival = self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get_nowait()
        except queue.Empty:
            arrival = None
            self._mail.log_refusals()
        if arrival is None:
            self._check()
        return arrival

    def done(self, arrival: Arrival) -> None:
        """Acknowledge a message: it was dealt with."""
        self._link.acknowledge([arrival.tag])

    def flush(self) -> None:
        """Block until the broker has everything that was published."""
        while not self._link.flush(timeout_s=1.0):
            self._check()

    def silent_s(self, sender: str) -> float:
        """Return the seconds since that role was heard of last; since the first question if it never was."""
        now = self.present_s()
        return max(0.0, now - self._heard.setdefault(sender, now) - self._link.outage().now_s)

    def present_s(self) -> float:
        """Return the seconds of a clock that stands still while this process does not run."""
        return time.monotonic() - self._pulse.absent_s()

    def foreign(self) -> Mapping[str, str]:
        """Name roles of which nothing came for a patience but messages of another version, with what to do."""
        return self._mail.foreign()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    # What the mail and its link call ----------------------------------------------------------------------------

    def on_letter(self, letter: Letter) -> None:
        sender, delivery = letter.header.sender, letter.delivery
        if not delivery.redelivered:
            self._heard[sender] = self.present_s()
        if isinstance(letter.message, _CONCERNED):
            self._inbox.put(Arrival(sender, letter.header.run, letter.message, delivery.tag))
        else:  # of a run, or of a worker that is through already
            self._link.acknowledge([delivery.tag])

    def on_late(self, letter: Letter) -> None:
        """Take no note: who was not heard is called again and again."""

    def on_spoilt(self, spoilt: Spoilt) -> None:
        self._mail.refuse(spoilt.delivery.sender, spoilt.delivery.tag, str(spoilt.reason))

    def on_reconnect(self) -> None:
        self.reconnects += 1
        self._mail.take_again()

    def on_failure(self, error: SlQueueError) -> None:
        self._failure = error
        self._inbox.put(None)

    fail = on_failure

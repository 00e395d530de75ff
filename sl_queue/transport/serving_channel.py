"""Requests and answers of a service over a link: loops.requests.Post.

Its link does without confirms, and acknowledges with the next message: together a fifth of an answer's time. What is
lost with a connection is asked for again; what was answered a moment before comes again, and its answer is nobody's.
"""

from collections.abc import Callable
from functools import partial

from sl_queue.errors import SlQueueError
from sl_queue.protocol.codec import Terms
from sl_queue.protocol.events import Observer, ignore
from sl_queue.protocol.messages import Activation, Gradient, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.serving import Came
from sl_queue.protocol.topology import Topology
from sl_queue.security.sealing import Seal
from sl_queue.transport.link import Link
from sl_queue.transport.mail import Letter, Mail, Spoilt


class ServingChannel:
    """One role's requests and answers. Thread-safe; `take` is called on the link's thread, and must not block long."""

    def __init__(
        self,
        link: Link,
        role: str,
        topology: Topology,
        incarnation: str,
        take: Callable[[Came], None],
        *,
        deadline_s: float,
        patience_s: float,
        seal: Seal | None = None,
        observe: Observer = ignore,
    ) -> None:
        senders = topology.senders_to(role)
        terms = {sender: Terms.between(topology, sender, role) for sender in senders}
        self._link, self._role, self._label, self._take = link, role, topology.label_holder, take
        self._deadline_s = deadline_s
        self._mail = Mail(link, role, terms, incarnation, patience_s=patience_s, seal=seal, observe=observe)
        self.failure: SlQueueError | None = None

    def open(self) -> None:
        """Connect and consume. Raises BrokerUnreachable, PartyBusy."""
        self._mail.open(self)

    def close(self) -> None:
        """Flush what was published, then leave."""
        self._mail.close(failed=self.failure is not None)

    def ask(self, party: str, run: str, number: MicroBatch, request: Payload) -> None:
        """Send a request, which the broker forgets after the deadline."""
        self._send(party, Kind.GRADIENT, run, number, Gradient(number, request))

    def answer(self, run: str, number: MicroBatch, answer: Payload) -> None:
        """Send an answer, which the broker forgets after the deadline."""
        self._send(self._label, Kind.HOLDOUT, run, number, Activation(number, answer, holdout=True))

    def _send(self, receiver: str, kind: Kind, run: str, number: MicroBatch, message: Activation | Gradient) -> None:
        header = Header(run, 0, kind, self._role, receiver, number)
        body = self._mail.sealed(receiver, header, message)
        self._link.publish(receiver, kind, run, body, persistent=False, expires_s=self._deadline_s)

    def fail(self, error: SlQueueError) -> None:
        """Note what ends the service."""
        self.failure = self.failure or error

    # What the mail calls ----------------------------------------------------------------------------------------

    def on_letter(self, letter: Letter) -> None:
        """Hand on a request or an answer; anything else is left over from training, and acknowledged."""
        header, message, tag = letter.header, letter.message, letter.delivery.tag
        done = partial(self._link.acknowledge, [tag], later=True)
        if isinstance(message, Gradient) or (isinstance(message, Activation) and message.holdout):
            self._take(Came(header.sender, header.run, header.micro_batch, message.payload, done))
        else:
            done()

    def on_late(self, letter: Letter) -> None:
        """Do nothing: it is acknowledged already."""

    def on_spoilt(self, spoilt: Spoilt) -> None:
        """Refuse what cannot be read."""
        self._mail.refuse(spoilt.delivery.sender, spoilt.delivery.tag, str(spoilt.reason))

    def on_reconnect(self) -> None:
        """Do nothing: requests come again, and answers to those that have ended are forgotten."""

    def on_failure(self, error: SlQueueError) -> None:
        """Note that the link has given up."""
        self.fail(error)

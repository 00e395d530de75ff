"""Mail over a link: what is delivered, what is late, and what is refused, with sealed messages and without."""

from dataclasses import dataclass, field, replace

import pytest

from sl_queue.errors import SlQueueError
from sl_queue.protocol.codec import Terms, encode
from sl_queue.protocol.control import Alive, Join, Message, Open, Start, Status, Waiting, kind_of
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Header, Kind, MicroBatch
from sl_queue.protocol.topology import Topology
from sl_queue.security.hpke import Cipher
from sl_queue.security.keys import PrivateKey
from sl_queue.security.sealing import Seal
from sl_queue.transport.mail import Letter, Mail, Spoilt
from sl_queue.transport.memory import MemoryBroker

TOPOLOGY = Topology("label", ("a", "b"))
OWN = {name: PrivateKey.generate(signs=name == SCHEDULER) for name in (*TOPOLOGY.parties, SCHEDULER, OPERATOR)}
PUBLIC = {name: key.public for name, key in OWN.items()}
START, JOIN = Start("label1", "r", (-1,)), Join("a1", {}, 1, "", "", None, 0, (), to="scheduler1")


def seal(role: str) -> Seal:
    return Seal(role, OWN[role], PUBLIC, Cipher.AES_256_GCM)


@dataclass
class Collector:
    """One role with its mail, and what came of it."""

    broker: MemoryBroker
    role: str
    sealed: bool = True
    fresh_only: bool = False
    letters: list[Message] = field(default_factory=list)
    late: list[Message] = field(default_factory=list)
    spoilt: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.link = self.broker.link(self.role, TOPOLOGY)
        terms = {s: Terms.between(TOPOLOGY, s, self.role) for s in TOPOLOGY.senders_to(self.role)}
        own = seal(self.role) if self.sealed else None
        name = f"{self.role}1"
        self.mail = Mail(self.link, self.role, terms, name, patience_s=60.0, seal=own, fresh_only=self.fresh_only)

    def open(self) -> "Collector":
        self.mail.open(self)
        return self

    def send(self, receiver: str, message: Message) -> bytes:
        """Send a message, and return how it travelled."""
        header = Header("r", 1, kind_of(message), self.role, receiver, MicroBatch(0, 0))
        self.mail.send(receiver, header, message, lasting=True)
        return self.broker.queue(receiver, self.role).ready[-1].body

    def on_letter(self, letter: Letter) -> None:
        self.letters.append(letter.message)
        self.link.acknowledge([letter.delivery.tag])

    def on_late(self, letter: Letter) -> None:
        self.late.append(letter.message)

    def on_spoilt(self, spoilt: Spoilt) -> None:
        self.spoilt.append(str(spoilt.reason))
        self.mail.refuse(spoilt.delivery.sender, spoilt.delivery.tag, str(spoilt.reason))

    def on_reconnect(self) -> None:
        self.mail.take_again()

    def on_failure(self, error: SlQueueError) -> None:
        raise error


def left(broker: MemoryBroker, receiver: str, sender: str) -> int:
    queue = broker.queue(receiver, sender)
    return len(queue.ready) + len(queue.unacknowledged)


@pytest.mark.parametrize("message", [START, Open("label1", 3)], ids=["start", "open"])
def test_a_command_that_the_broker_brings_again_is_late_and_acknowledged(message: Message) -> None:
    broker = MemoryBroker()
    scheduler, label = Collector(broker, SCHEDULER), Collector(broker, "label")
    body = scheduler.send("label", message)
    label.open()
    for _ in range(3):
        broker.publish("label", SCHEDULER, body, persistent=False, expires=False)
    assert (label.letters, label.late, label.spoilt) == ([message], [message] * 3, [])
    assert left(broker, "label", SCHEDULER) == 0


def test_a_sign_of_life_that_the_broker_brings_again_is_none() -> None:
    broker = MemoryBroker()
    bank, label = Collector(broker, "a"), Collector(broker, "label")
    body = bank.send("label", Alive("a1"))
    label.open()
    broker.publish("label", "a", body, persistent=False, expires=False)
    assert (label.letters, label.late) == ([Alive("a1")], [Alive("a1")])


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
def test_what_was_meant_for_an_earlier_process_is_late(sealed: bool) -> None:
    broker = MemoryBroker()
    scheduler, label = Collector(broker, SCHEDULER, sealed), Collector(broker, "label", sealed)
    scheduler.send("label", replace(START, incarnation="label0"))
    label.open()
    assert (label.letters, len(label.late)) == ([], 1)


def test_the_scheduler_believes_of_the_moment_only_who_has_heard_of_it_and_facts_of_anyone() -> None:
    broker = MemoryBroker()
    bank, scheduler = Collector(broker, "a"), Collector(broker, SCHEDULER, fresh_only=True)
    bank.send(SCHEDULER, JOIN)
    scheduler.open()
    assert (scheduler.letters, scheduler.late) == ([], [JOIN])
    bank.open()
    header = Header("", 0, Kind.REPORT, SCHEDULER, "a", MicroBatch(0, 0))
    scheduler.mail.send("a", header, Alive("scheduler1"), lasting=True)
    header = Header("r", 1, Kind.REPORT, "a", SCHEDULER, MicroBatch(0, 0))
    bank.mail.send(SCHEDULER, header, JOIN, lasting=True)
    assert (scheduler.letters, scheduler.late) == ([JOIN], [JOIN])


def test_what_was_not_acknowledged_before_a_reconnect_is_taken_again() -> None:
    broker = MemoryBroker()
    bank, label = Collector(broker, "a"), Collector(broker, "label")
    question = Waiting("a1", 1, "label", Kind.GRADIENT, 0, 0, 1.0, 0.0)
    label.on_letter = lambda letter: label.letters.append(letter.message)  # type: ignore[method-assign]
    bank.send("label", question)
    label.open()
    broker.crash()
    assert label.letters == [question, question] and label.late == []


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
def test_what_is_not_for_its_sender_to_say_is_refused_with_a_dead_letter(sealed: bool) -> None:
    broker = MemoryBroker()
    bank, label = Collector(broker, "a", sealed), Collector(broker, "label", sealed)
    bank.send("label", START)
    bank.send("label", JOIN)
    label.open()
    assert label.letters == []
    assert label.spoilt == [
        "a command from 'a'; only the scheduler commands",
        "a Join of the feature party is not meant for a party",
    ]
    assert [party for party, _, _ in broker.dead_letters] == ["label", "label"]


def test_a_plain_message_where_all_is_sealed_is_refused_and_its_sender_unreadable() -> None:
    broker = MemoryBroker()
    label = Collector(broker, "label").open()
    header = Header("r", 1, Kind.REPORT, "a", "label", MicroBatch(0, 0))
    broker.publish("label", "a", encode(header, Alive("a1")), persistent=False, expires=False)
    assert "it is not sealed" in label.spoilt[0]
    assert label.mail.is_unreadable("a") and not label.mail.is_unreadable("b")


def test_a_status_is_never_late() -> None:
    broker = MemoryBroker()
    scheduler, operator = Collector(broker, SCHEDULER), Collector(broker, OPERATOR)
    body = scheduler.send(OPERATOR, Status({"phase": "running"}))
    operator.open()
    broker.publish(OPERATOR, SCHEDULER, body, persistent=False, expires=False)
    assert operator.letters == [Status({"phase": "running"})] * 2

"""A queue that is full or missing pauses what is for it, in its order, and nothing that is for others."""

import time
from collections.abc import Callable, Iterator

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.protocol.messages import SCHEDULER, Kind
from sl_queue.protocol.topology import Topology
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.rabbitmq.unconfirmed import Outgoing, Unconfirmed
from sl_queue.transport.retry import Limits
from tests.support.links import Inbox, numbered, send, two_parties

LIMITS = Limits(first_s=60.0, lost_s=60.0, busy_s=2.0, unroutable_s=30.0)
RECEIVERS = ("insurer", "scheduler", "telco")


@pytest.fixture
def connect(broker_url: str, unique: str) -> Iterator[Callable[[str], Inbox]]:
    links: list[RabbitLink] = []

    def connect(party: str) -> Inbox:
        links.append(RabbitLink(broker_url, party, two_parties(f"{unique}."), limits=LIMITS))
        return Inbox(links[-1]).open()

    yield connect
    for link in links:
        link.close()


def full(url: str, names: Topology, room: int) -> None:
    """Have the insurer's queue of the bank take that many messages."""
    arguments = {"x-max-length": room, "x-overflow": "reject-publish"}
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        connection.channel().queue_declare(names.queue("insurer", "bank"), durable=True, arguments=arguments)


def test_a_full_queue_does_not_hold_up_what_is_for_others(
    connect: Callable[[str], Inbox], broker_url: str, unique: str
) -> None:
    full(broker_url, two_parties(f"{unique}."), 3)
    bank, scheduler = connect("bank"), connect(SCHEDULER)
    send(bank.link, "insurer", *numbered(20))
    assert not bank.link.flush(0.5), "the queue is full"
    began = time.monotonic()
    for body in numbered(60):  # one after the other: each would wait for a pause of seconds
        bank.link.publish(SCHEDULER, Kind.REPORT, "r1", body, persistent=False)
        assert [delivery.body for delivery in scheduler.take(1)] == [body]
    assert time.monotonic() - began < 60.0
    insurer = connect("insurer")
    taken = []
    for _ in range(20):
        (delivery,) = insurer.take(1)
        insurer.link.acknowledge([delivery.tag])
        taken.append(delivery.body)
    assert sorted(taken) == sorted(numbered(20))
    assert bank.link.flush(90.0) and bank.failure is None


def test_a_missing_queue_does_not_hold_up_what_is_for_others(
    connect: Callable[[str], Inbox], broker_url: str, unique: str
) -> None:
    names = two_parties(f"{unique}.")
    bank, scheduler = connect("bank"), connect(SCHEDULER)
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        connection.channel().queue_delete(names.queue("insurer", "bank"))
    send(bank.link, "insurer", *numbered(5))
    for body in numbered(50):
        bank.link.publish(SCHEDULER, Kind.REPORT, "r1", body, persistent=False)
    assert [delivery.body for delivery in scheduler.take(50)] == numbered(50)
    assert bank.link.flush(20.0)
    assert sorted(delivery.body for delivery in connect("insurer").take(5)) == numbered(5)


@given(
    st.lists(st.sampled_from(RECEIVERS), min_size=1, max_size=40),
    st.lists(st.tuples(st.sampled_from(["take", "again", "pause", "resume"]), st.sampled_from(RECEIVERS)), max_size=80),
)
def test_what_is_for_one_queue_keeps_its_order_and_nothing_is_forgotten(
    receivers: list[str], events: list[tuple[str, str]]
) -> None:
    unconfirmed, paused, taken = Unconfirmed(), set[str](), list[tuple[int, str]]()
    for receiver in receivers:
        unconfirmed.add(Outgoing("x.bank", f"r1.report.{receiver}", b"", persistent=False))
    for what, receiver in events:
        to = f"x.bank {receiver}"
        match what:
            case "pause":
                paused.add(to)
            case "resume":
                paused.discard(to)
            case "again":
                unconfirmed.again([number for number, taken_to in taken if taken_to == to])
                taken = [each for each in taken if each[1] != to]
            case _ if (found := unconfirmed.take(paused)) is not None:
                assert found[1].to not in paused
                taken.append((found[0], found[1].to))
    while (found := unconfirmed.take()) is not None:
        taken.append((found[0], found[1].to))
    assert sorted(number for number, _ in taken) == list(range(1, len(receivers) + 1))
    for receiver in RECEIVERS:
        own = [number for number, to in taken if to == f"x.bank {receiver}"]
        assert own == sorted(own)

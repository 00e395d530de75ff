"""The contract of Link, which memory and RabbitMQ keep alike."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pytest

from sl_queue.errors import PartyBusy, SlQueueError, TransportError
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Kind
from sl_queue.protocol.topology import Topology
from sl_queue.transport.link import Delivery
from sl_queue.transport.memory import MemoryBroker
from sl_queue.transport.rabbitmq import link as rabbit_link
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.retry import Limits
from tests.support.links import WAIT_S, Inbox, numbered, send, two_parties

LIMITS = Limits(first_s=60.0, lost_s=60.0, busy_s=0.5, unroutable_s=60.0)


class Bench:  # mutable: it closes what it opened
    """One broker with links of any party, however it is made."""

    def __init__(self, connect: Callable[[str, int], Any], dead: Callable[[str], list[tuple[str, bytes]]]) -> None:
        self._connect, self.dead_letters = connect, dead
        self._links: list[Any] = []

    def link(self, party: str, prefetch: int = 0) -> Any:
        self._links.append(self._connect(party, prefetch))
        return self._links[-1]

    def open(self, party: str, prefetch: int = 0) -> Inbox:
        return Inbox(self.link(party, prefetch)).open()

    def close(self) -> None:
        for link in self._links:
            link.close()


@pytest.fixture(params=["memory", "classic", "classic without confirms", "quorum"])
def bench(request: pytest.FixtureRequest, unique: str) -> Iterator[Bench]:
    topology = two_parties(f"{unique}.")
    if request.param == "memory":
        memory = MemoryBroker()
        bench = Bench(
            lambda party, prefetch: memory.link(party, topology, prefetch),
            lambda party: [(reason, body) for whose, reason, body in memory.dead_letters if whose == party],
        )
    else:
        url = request.getfixturevalue("broker_url")
        kind, confirms = request.param.split()[0], not request.param.endswith("confirms")
        about: dict[str, Any] = {"queue_type": kind, "limits": LIMITS, "confirms": confirms}
        bench = Bench(
            lambda party, prefetch: RabbitLink(url, party, topology, prefetch, **about),
            lambda party: read_dead_letters(url, topology, party),
        )
    yield bench
    bench.close()


# Without them `flush` does not say that the broker has anything.
with_confirms = pytest.mark.parametrize("bench", ["memory", "classic", "quorum"], indirect=True)


def read_dead_letters(url: str, topology: Topology, party: str) -> list[tuple[str, bytes]]:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        letters = []
        while (found := channel.basic_get(topology.dead_letters(party), auto_ack=True))[0] is not None:
            letters.append((found[1].headers["x-reason"], found[2]))
        return letters


def test_messages_of_one_sender_arrive_in_order(bench: Bench) -> None:
    insurer, bank = bench.open("insurer"), bench.open("bank")
    send(bank.link, "insurer", *numbered(500))
    assert [delivery.body for delivery in insurer.take(500)] == numbered(500)


def test_a_delivery_says_whose_it_is_and_that_it_is_new(bench: Bench) -> None:
    insurer, bank, scheduler = bench.open("insurer"), bench.open("bank"), bench.open(SCHEDULER)
    send(bank.link, "insurer", b"from the bank")
    (first,) = insurer.take(1)
    send(scheduler.link, "insurer", b"from the scheduler")
    (second,) = insurer.take(1)
    assert [(first.sender, first.redelivered), (second.sender, second.redelivered)] == [
        ("bank", False),
        (SCHEDULER, False),
    ]


def test_everybody_gets_only_their_own(bench: Bench) -> None:
    insurer, bank, scheduler = bench.open("insurer"), bench.open("bank"), bench.open(SCHEDULER)
    send(bank.link, SCHEDULER, b"report")
    send(bank.link, "insurer", b"activation")
    send(insurer.link, "bank", b"gradient")
    assert [inbox.take(1)[0].body for inbox in (scheduler, insurer, bank)] == [b"report", b"activation", b"gradient"]
    assert [inbox.bodies() for inbox in (scheduler, insurer, bank)] == [[], [], []]


def test_messages_to_a_party_that_was_never_there_wait_for_it(bench: Bench) -> None:
    bank = bench.open("bank")
    send(bank.link, "insurer", *numbered(10))
    assert bank.link.flush(90.0)
    assert [delivery.body for delivery in bench.open("insurer").take(10)] == numbered(10)


def test_what_was_not_acknowledged_comes_again_after_a_crash_before_anything_newer(bench: Bench) -> None:
    insurer, bank = bench.open("insurer"), bench.open("bank")
    send(bank.link, "insurer", *numbered(20))
    insurer.take(20)
    insurer.link.abort()
    send(bank.link, "insurer", b"newer")
    again = bench.open("insurer").take(21)
    assert [delivery.body for delivery in again] == [*numbered(20), b"newer"]
    assert all(delivery.redelivered for delivery in again[:20])


def test_what_was_acknowledged_before_a_close_never_comes_again(bench: Bench) -> None:
    insurer, bank = bench.open("insurer"), bench.open("bank")
    send(bank.link, "insurer", *numbered(300))
    taken = insurer.take(300)
    insurer.link.acknowledge([delivery.tag for delivery in taken if int(delivery.body) % 3])
    insurer.link.close()
    send(bank.link, "insurer", b"last")
    left = bench.open("insurer").take_until(b"last")
    assert [delivery.body for delivery in left] == [*(body for body in numbered(300) if int(body) % 3 == 0), b"last"]


@with_confirms
def test_what_was_flushed_survives_its_sender(bench: Bench) -> None:
    bank = bench.open("bank")
    send(bank.link, "insurer", *numbered(200))
    assert bank.link.flush(90.0)
    bank.link.abort()
    assert [delivery.body for delivery in bench.open("insurer").take(200)] == numbered(200)


def test_tags_of_an_earlier_connection_are_ignored(bench: Bench) -> None:
    insurer, bank = bench.open("insurer"), bench.open("bank")
    send(bank.link, "insurer", b"old")
    (old,) = insurer.take(1)
    insurer.link.abort()
    again = bench.open("insurer")
    again.take(1)
    again.link.acknowledge([old.tag])
    again.link.close()
    assert bench.open("insurer").take(1)[0].body == b"old"


def test_a_closed_link_says_so(bench: Bench) -> None:
    bank = bench.open("bank")
    bank.link.close()
    bank.link.close()
    with pytest.raises(TransportError, match="party 'bank' is closed"):
        send(bank.link, "insurer", b"late")
    with pytest.raises(TransportError, match="party 'bank' is closed"):
        bank.link.flush(1.0)
    bank.link.acknowledge([])


def test_a_slow_consumer_holds_no_more_than_its_prefetch_of_each_sender(bench: Bench) -> None:
    insurer, bank, scheduler = bench.open("insurer", prefetch=3), bench.open("bank"), bench.open(SCHEDULER)
    send(bank.link, "insurer", *numbered(10))
    assert bank.link.flush(90.0)
    held = insurer.take(3)
    send(scheduler.link, "insurer", b"order")
    assert insurer.take(1)[0].body == b"order"  # another sender is not held up, and nothing more of the bank came
    time.sleep(0.2)  # for a fourth one that must not come
    assert insurer.bodies() == []
    insurer.link.acknowledge([delivery.tag for delivery in held[:2]])
    assert [delivery.body for delivery in insurer.take(2)] == [b"3", b"4"]


@pytest.mark.parametrize("prefetch", [1, 4, 40])
def test_what_is_acknowledged_later_never_fills_the_window(
    bench: Bench, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbit_link, "LATER_S", 1000.0)
    insurer, bank = bench.open("insurer", prefetch=prefetch), bench.open("bank")
    send(bank.link, "insurer", *numbered(200))
    for number in range(200):
        (delivery,) = insurer.take(1)
        assert delivery.body == str(number).encode()
        insurer.link.acknowledge([delivery.tag], later=True)


def test_what_is_acknowledged_later_before_a_close_never_comes_again(bench: Bench) -> None:
    insurer, bank = bench.open("insurer"), bench.open("bank")
    send(bank.link, "insurer", b"one")
    insurer.link.acknowledge([insurer.take(1)[0].tag], later=True)
    insurer.link.close()
    send(bank.link, "insurer", b"two")
    assert [delivery.body for delivery in bench.open("insurer").take(1)] == [b"two"]


def test_ten_mebibytes_arrive_as_they_were_sent(bench: Bench) -> None:
    insurer, bank = bench.open("insurer"), bench.open("bank")
    large = [bytes([number]) * (10 * 1024 * 1024 + number) for number in range(3)]
    send(bank.link, "insurer", *large)
    assert [delivery.body for delivery in insurer.take(3)] == large


def test_an_empty_message_arrives(bench: Bench) -> None:
    insurer, bank = bench.open("insurer"), bench.open("bank")
    send(bank.link, "insurer", b"")
    assert insurer.take(1)[0].body == b""


def test_a_rejected_message_lies_with_the_dead_letters_and_its_reason(bench: Bench) -> None:
    insurer, bank = bench.open("insurer"), bench.open("bank")
    send(bank.link, "insurer", b"bad", b"good")
    bad, good = insurer.take(2)
    insurer.link.reject(bad.tag, "is of run 'r0', this is run 'r1'")
    insurer.link.acknowledge([good.tag])
    assert insurer.link.flush(90.0)
    insurer.link.close()
    assert bench.dead_letters("insurer") == [("is of run 'r0', this is run 'r1'", b"bad")]
    send(bank.link, "insurer", b"last")
    assert [delivery.body for delivery in bench.open("insurer").take_until(b"last")] == [b"last"]


def test_a_second_worker_of_a_party_is_refused_and_the_first_goes_on(bench: Bench) -> None:
    insurer, bank = bench.open("insurer"), bench.open("bank")
    with pytest.raises(PartyBusy, match="another worker already serves party 'insurer'"):
        bench.open("insurer")
    send(bank.link, "insurer", *numbered(5))
    assert [delivery.body for delivery in insurer.take(5)] == numbered(5)


def test_the_next_worker_gets_in_when_the_first_is_killed(bench: Bench) -> None:
    bench.open("insurer").link.abort()
    bank = bench.open("bank")
    insurer = bench.open("insurer")
    send(bank.link, "insurer", b"hello")
    assert insurer.take(1)[0].body == b"hello"


@with_confirms
def test_the_operator_reads_only_the_newest_status_and_leaves_it_there(bench: Bench) -> None:
    scheduler = bench.open(SCHEDULER)
    for status in numbered(3):
        scheduler.link.publish(OPERATOR, Kind.COMMAND, "", status, persistent=True)
    assert scheduler.link.flush(90.0)
    for _ in range(2):
        operator = bench.open(OPERATOR, prefetch=1)
        assert operator.take(1)[0].body == b"2"
        operator.link.close()


def test_what_a_reader_fails_at_ends_its_own_link_and_not_the_one_of_the_sender(bench: Bench) -> None:
    failed: queue.Queue[SlQueueError] = queue.Queue()

    def read(delivery: Delivery) -> None:
        raise TransportError("no room")

    insurer = bench.link("insurer")
    insurer.open(read, lambda: None, failed.put)
    bank = bench.open("bank")
    send(bank.link, "insurer", b"1")
    assert "no room" in str(failed.get(timeout=WAIT_S))
    with pytest.raises(SlQueueError, match="no room"):
        send(insurer, "bank", b"an answer")
    send(bank.link, "insurer", b"2")
    send(bank.link, SCHEDULER, b"behind it")
    assert bench.open(SCHEDULER).take(1)
    assert failed.empty() and bank.failure is None


def test_a_reader_may_close_its_link_while_something_is_delivered_to_it(bench: Bench) -> None:
    insurer, closed = bench.link("insurer"), threading.Event()

    def read(delivery: Delivery) -> None:
        if not closed.is_set():
            insurer.close()
            closed.set()
            insurer.publish("bank", Kind.REPORT, "run", b"an answer", persistent=False)

    insurer.open(read, lambda: None, lambda error: None)
    bank = bench.open("bank")
    send(bank.link, "insurer", b"1")
    assert closed.wait(WAIT_S)
    insurer.close()  # and by another thread: now it has left
    assert bytes(bench.open("insurer").take(1)[0].body) == b"1"
    assert bank.failure is None


def test_many_threads_may_publish_at_once(bench: Bench) -> None:
    insurer, bank = bench.open("insurer"), bench.open("bank")
    threads = [
        threading.Thread(target=send, args=(bank.link, "insurer", *(b"%d.%d" % (who, n) for n in range(100))))
        for who in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    arrived = [delivery.body for delivery in insurer.take(400)]
    for who in range(4):
        assert [body for body in arrived if body.startswith(b"%d." % who)] == [b"%d.%d" % (who, n) for n in range(100)]

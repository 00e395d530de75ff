"""A link without confirms goes on through all that one with them goes on through, and loses what was on its way."""

from collections.abc import Iterator
from dataclasses import replace

import pika
import pytest

from sl_queue.protocol.messages import Kind
from sl_queue.testing.proxy import Proxy
from sl_queue.transport.rabbitmq.link import RabbitLink
from tests.support.broker import Broker
from tests.support.links import Inbox, numbered, send, two_parties
from tests.support.rabbit import LIMITS, Connect, at_the_broker
from tests.support.waiting import await_that


@pytest.fixture
def bank(url: str) -> Iterator[RabbitLink]:
    link = RabbitLink(url, "bank", two_parties(), 0, limits=LIMITS, confirms=False)
    Inbox(link).open()
    yield link
    link.close()


def is_there(url: str, queue: str) -> bool:
    with at_the_broker(url) as channel:
        try:
            channel.queue_declare(queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        return True


def await_one_of_many(bank: RabbitLink, insurer: Inbox, body: bytes) -> None:
    """Send until one arrives, as who asks again does."""

    def arrived() -> bool:
        send(bank, "insurer", body)
        return body in insurer.bodies()

    await_that(arrived)


def test_messages_arrive_in_order_and_nothing_of_them_is_kept(bank: RabbitLink, connect: Connect) -> None:
    insurer = connect("insurer")
    send(bank, "insurer", *numbered(500))
    assert [delivery.body for delivery in insurer.take(500)] == numbered(500)
    assert bank.flush(timeout_s=5.0)


def test_it_goes_on_when_the_broker_was_killed_and_started_again(
    bank: RabbitLink, connect: Connect, private_broker: Broker
) -> None:
    insurer = connect("insurer")
    private_broker.kill()
    await_that(lambda: not bank.connectivity.connected)
    send(bank, "insurer", b"while it was away")
    private_broker.start()
    await_one_of_many(bank, insurer, b"later")
    assert b"while it was away" in insurer.bodies(), "it was not handed to the network, so it waited"


def test_a_queue_that_is_gone_is_declared_again(
    bank: RabbitLink, connect: Connect, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    connect("insurer").link.close()
    with at_the_broker(url) as channel:
        channel.queue_delete(two_parties().queue("insurer", "bank"))
    send(bank, "insurer", b"lost")
    await_that(lambda: "no queue is bound, a message is lost" in caplog.text)
    await_that(lambda: is_there(url, two_parties().queue("insurer", "bank")))
    send(bank, "insurer", b"later")
    assert connect("insurer").take(1)[0].body == b"later"


def test_a_broker_that_takes_no_messages_fills_no_memory(
    bank: RabbitLink, connect: Connect, private_broker: Broker
) -> None:
    insurer = connect("insurer")
    private_broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.0)")  # as if its memory were used up
    try:
        await_that(lambda: send(bank, "insurer", b"the broker blocks who publishes") or bank.outage().reason)
        send(bank, "insurer", *numbered(10))
        assert not bank.flush(timeout_s=0.3), "they are handed to a network that takes nothing"
    finally:
        private_broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.4)")
    assert [delivery.body for delivery in insurer.take_until(b"9")][-10:] == numbered(10)


def test_what_is_acknowledged_later_is_so_after_a_while(bank: RabbitLink, connect: Connect) -> None:
    insurer = connect("insurer")
    send(bank, "insurer", b"one", b"two")
    one, two = insurer.take(2)
    for delivery in (one, two):
        insurer.link.acknowledge([delivery.tag], later=True)
    assert isinstance(insurer.link, RabbitLink)
    await_that(lambda: insurer.link._acknowledged.add([], later=True) == "in a while")  # the while is over
    insurer.link.abort()
    again = connect("insurer", limits=replace(LIMITS, busy_s=60.0))
    send(bank, "insurer", b"three")
    assert [delivery.body for delivery in again.take(1)] == [b"three"]


def test_a_network_that_takes_nothing_holds_what_expires(url: str, connect: Connect, proxy: Proxy) -> None:
    insurer = connect("insurer")
    bank = RabbitLink(proxy.url(url), "bank", two_parties(), 0, limits=LIMITS, confirms=False)
    Inbox(bank).open()
    try:
        proxy.stall()
        for _ in range(40):
            bank.publish("insurer", Kind.ACTIVATION, "r1", bytes(1024 * 1024), persistent=False, expires_s=0.2)
        assert not bank.flush(timeout_s=0.5), "more than the kernel and 4 MiB are held back"
        proxy.resume()
        send(bank, "insurer", b"after")
        arrived = insurer.take_until(b"after")
        assert len(arrived) < 40, "what had expired was sent all the same"
    finally:
        bank.close()

"""Behaviour special to RabbitMQ: lost connections and brokers, and what a link says about them."""

import asyncio
import socket
import threading
import time
from contextlib import suppress

import pytest

from sl_queue.errors import BrokerUnreachable, TransportError
from sl_queue.observe.log import to_log
from sl_queue.protocol.control import Stopped
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.state import GIVE_UP
from sl_queue.testing.broker_contents import binary
from sl_queue.testing.proxy import Proxy
from sl_queue.transport.party_channel import PartyChannel
from sl_queue.transport.rabbitmq.connection import Connection
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.rabbitmq.nodes import Nodes
from sl_queue.transport.retry import Limits
from tests.support.broker import Broker
from tests.support.links import Inbox, numbered, send, two_parties
from tests.support.rabbit import LIMITS, Connect, in_order
from tests.support.waiting import await_that


def opened(url: str, connect: Connect, patience_s: float) -> PartyChannel:
    """Open the channel of the bank beside those to whom it speaks."""
    for other in (SCHEDULER, "insurer"):
        connect(other)
    topology, link = two_parties(), RabbitLink(url, "bank", two_parties(), 0, limits=LIMITS)
    channel = PartyChannel(
        link, "bank", topology, "b1", patience_s=patience_s, persistent=False, depth=1, observe=to_log
    )
    channel.open()
    return channel


# Losing the broker ------------------------------------------------------------------------------------------------


def test_a_commit_that_waits_for_confirms_says_so_and_gives_up_at_last(
    private_broker: Broker, url: str, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    channel = opened(url, connect, patience_s=0.2)
    private_broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.0)")  # as if its memory were used up
    try:
        # The alarm reaches the connections a moment after the command returns, with the next message of the pulse.
        await_that(lambda: "the broker takes no messages" in caplog.text)
        channel.report(Stopped("b1", 0))
        with pytest.raises(
            BrokerUnreachable, match=r"party 'bank' waited \d+ s for the broker to confirm what was sent"
        ):
            channel.flush()
    finally:
        private_broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.4)")
        channel.close()
    assert "s for the broker to confirm what was sent" in caplog.text


def test_a_commit_outlasts_a_broker_that_is_away_for_longer_than_ten_patiences(
    private_broker: Broker, url: str, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    channel = opened(url, connect, patience_s=0.1)
    private_broker.kill()
    began, starting = time.monotonic(), threading.Thread(target=private_broker.start)
    channel.report(Stopped("b1", 0))
    starting.start()
    try:
        channel.flush()
        assert time.monotonic() - began > GIVE_UP * 0.1, "a broker takes seconds to start"
    finally:
        starting.join()
        channel.close()
    assert "s for the broker to confirm what was sent" in caplog.text


def test_a_consumer_gets_nothing_of_a_channel_that_is_being_closed(broker_url: str, unique: str) -> None:
    async def run() -> list[bool]:
        connection = Connection(Nodes(broker_url).first, unique)
        await connection.open()
        channel, closing, came = await connection.channel(), False, list[bool]()
        await channel.private_queue(unique)
        for number in range(2000):
            channel.publish(number, "", unique, bytes(1000), persistent=False, expires_in_s=None, headers=None)
        here = asyncio.Event()

        def take(tag: int, redelivered: bool, body: bytes | memoryview) -> None:
            came.append(closing)
            here.set()

        await channel.consume(unique, take, lambda: None, exclusive=True)
        await here.wait()
        closing = True
        await channel.close()
        await connection.close()
        return came

    came = asyncio.run(run())
    assert came and not any(came)


def test_what_is_published_while_the_broker_is_killed_and_started_again_arrives(
    private_broker: Broker, connect: Connect
) -> None:
    insurer, bank = connect("insurer"), connect("bank")
    send(bank.link, "insurer", *numbered(50), persistent=True)
    private_broker.kill()
    later = [f"later {n}".encode() for n in range(50)]
    send(bank.link, "insurer", *later, persistent=True)
    assert not bank.link.flush(0.2)
    private_broker.start()
    assert bank.link.flush(90.0)
    insurer.await_that(lambda inbox: later[-1] in inbox.bodies())
    assert in_order(insurer.bodies()) == [*numbered(50), *later]
    assert (bank.reconnects, insurer.reconnects) == (1, 1)


def test_a_broker_that_comes_back_empty_has_its_queues_again(private_broker: Broker, connect: Connect) -> None:
    insurer, bank = connect("insurer"), connect("bank")
    private_broker.kill()
    private_broker.wipe()
    private_broker.start()
    send(bank.link, "insurer", b"after")
    assert insurer.take(1)[0].body == b"after"


def test_a_broker_that_stays_away_is_named_at_last(private_broker: Broker, connect: Connect) -> None:
    bank = connect("bank", limits=Limits(lost_s=1.0))
    private_broker.kill()
    try:
        bank.await_that(lambda inbox: inbox.failure)
        assert isinstance(bank.failure, BrokerUnreachable)
        assert "connection refused" in str(bank.failure)
        assert f":{private_broker.port}" in str(bank.failure)
        with pytest.raises(BrokerUnreachable):
            send(bank.link, "insurer", b"late")
        with pytest.raises(BrokerUnreachable):
            bank.link.flush()
    finally:
        private_broker.start()


# Losing the connection --------------------------------------------------------------------------------------------


def test_a_cut_in_the_middle_of_a_large_message_costs_nothing(connect: Connect, url: str, proxy: Proxy) -> None:
    insurer, bank = connect("insurer"), connect("bank", proxy.url(url))
    large = [bytes([n]) * 4_000_000 for n in range(4)]
    proxy.cut_after_bytes = 6_000_000
    send(bank.link, "insurer", *large)
    assert bank.link.flush(90.0)
    insurer.await_that(lambda inbox: large[-1] in inbox.bodies())
    assert in_order(insurer.bodies()) == large
    assert bank.reconnects == 1


def test_what_is_published_between_two_connections_goes_out_with_the_next(
    connect: Connect, url: str, proxy: Proxy
) -> None:
    insurer, bank = connect("insurer"), connect("bank", proxy.url(url))
    proxy.refusing = True
    proxy.cut()
    attempts = proxy.accepted + 2
    sent: list[bytes] = []
    while proxy.accepted < attempts:  # all the time from before the loss is noticed until well after
        sent.append(b"%d" % len(sent))
        send(bank.link, "insurer", sent[-1])
        time.sleep(0.002)
    proxy.refusing = False
    assert bank.link.flush(90.0)
    insurer.await_that(lambda inbox: sent[-1] in inbox.bodies())
    assert in_order(insurer.bodies()) == sent


def test_after_a_cut_everything_unacknowledged_comes_again_and_earlier_tags_are_void(
    private_broker: Broker, vhost: str, url: str, connect: Connect, proxy: Proxy
) -> None:
    insurer, bank = connect("insurer", proxy.url(url)), connect("bank")
    send(bank.link, "insurer", *numbered(10))
    first = insurer.take(10)
    insurer.link.acknowledge([delivery.tag for delivery in first[:4]])
    send(bank.link, "insurer", b"eleventh")
    insurer.take(1)
    await_messages(private_broker, vhost, "q.insurer.bank", 7)
    proxy.cut()
    insurer.await_that(lambda inbox: inbox.reconnects)
    insurer.link.acknowledge([delivery.tag for delivery in first])
    again = insurer.take(7)
    assert [delivery.body for delivery in again] == [*numbered(10)[4:], b"eleventh"]
    assert all(delivery.redelivered for delivery in again)
    insurer.link.acknowledge([delivery.tag for delivery in again])
    insurer.link.close()
    send(bank.link, "insurer", b"last")
    assert connect("insurer").take(1)[0].body == b"last"


def await_messages(broker: Broker, vhost: str, queue: str, count: int) -> None:
    """Until a queue holds that many messages, those delivered and not acknowledged included."""
    name = f"rabbit_misc:r({binary(vhost)}, queue, {binary(queue)})"
    expression = f"{{ok, Q}} = rabbit_amqqueue:lookup({name}), rabbit_amqqueue:info(Q, [messages])"
    await_that(lambda: f"{{messages,{count}}}" in broker.evaluate(expression).replace(" ", ""), f"{count} messages")


def test_many_cuts_at_any_byte_lose_nothing(connect: Connect, url: str, proxy: Proxy) -> None:
    insurer, bank = connect("insurer", proxy.url(url)), connect("bank", proxy.url(url))
    sent = numbered(600)
    for start in range(0, 600, 20):
        proxy.cut_after_bytes = 500 * (1 + start % 7)
        send(bank.link, "insurer", *sent[start : start + 20])
        assert bank.link.flush(90.0)
    insurer.await_that(lambda inbox: set(inbox.bodies()) == set(sent))
    assert proxy.accepted > 10


def test_a_half_open_connection_is_noticed_by_its_heartbeat(connect: Connect, url: str, proxy: Proxy) -> None:
    insurer, bank = connect("insurer"), connect("bank", proxy.url(url) + "?heartbeat=1")
    proxy.stall()
    send(bank.link, "insurer", b"into the void")
    await_that(lambda: not bank.link.connectivity.connected, "the silence was not noticed")
    proxy.resume()
    bank.await_that(lambda inbox: inbox.reconnects)
    assert insurer.take(1)[0].body == b"into the void"


def test_a_slow_network_is_not_a_lost_one(connect: Connect, url: str, proxy: Proxy) -> None:
    insurer, bank = connect("insurer"), connect("bank", proxy.url(url))
    proxy.delay_s = 0.02
    send(bank.link, "insurer", *numbered(100), bytes(3_000_000))
    assert len(insurer.take(101)) == 101
    assert bank.link.flush(90.0)
    assert bank.reconnects == 0


def test_a_thread_that_computes_and_holds_the_interpreter_does_not_cost_the_connection(
    connect: Connect, url: str
) -> None:
    insurer, bank = connect("insurer", url + "?heartbeat=2"), connect("bank")
    ends = time.monotonic() + 6.0  # three heartbeats; the broker gives up after two
    while time.monotonic() < ends:
        sum(range(3_000_000))  # a call into C that keeps the interpreter's lock: one after the other, with no pause
    send(bank.link, "insurer", b"still there")
    assert insurer.take(1)[0].body == b"still there"
    assert insurer.reconnects == 0


# The driver -------------------------------------------------------------------------------------------------------


def test_acknowledging_a_thousand_deliveries_takes_one_frame(connect: Connect, url: str, proxy: Proxy) -> None:
    insurer, bank = connect("insurer", proxy.url(url)), connect("bank")
    send(bank.link, "insurer", *numbered(1000))
    tags = [delivery.tag for delivery in insurer.take(1000)]
    before = proxy.sent_bytes
    insurer.link.acknowledge(tags)
    insurer.link.close()
    assert proxy.sent_bytes - before < 1000  # each would be 21 bytes


def test_the_io_thread_ends_with_its_link(connect: Connect) -> None:
    bank = connect("bank")
    assert "bank-io" in [thread.name for thread in threading.enumerate()]
    bank.link.close()
    assert "bank-io" not in [thread.name for thread in threading.enumerate()]


def test_a_link_may_be_closed_while_it_is_being_opened(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        link = RabbitLink(f"amqp://127.0.0.1:{port}/", "bank", two_parties(), limits=Limits(first_s=200.0))
        threading.Timer(0.3, link.close).start()
        began = time.monotonic()
        with pytest.raises(TransportError, match="party 'bank' is closed"):
            Inbox(link).open()
        assert time.monotonic() - began < 100.0
    assert caplog.text == ""


def test_a_link_may_be_closed_at_any_moment_of_its_beginning(url: str, caplog: pytest.LogCaptureFixture) -> None:
    links = [RabbitLink(url, "bank", two_parties(), limits=LIMITS) for _ in range(20)]
    for number, link in enumerate(links):
        closing = threading.Timer(0.005 * number, link.close)
        closing.start()
        with suppress(TransportError):
            Inbox(link).open()
        closing.join()
    assert "asyncio" not in {record.name for record in caplog.records}
    Inbox(link := RabbitLink(url, "bank", two_parties(), limits=LIMITS)).open()  # nothing is left that holds the lock
    link.close()

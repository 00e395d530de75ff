"""A broker that refuses a link, and queues that are not what they should be: what a link says and does."""

import logging
import re
import threading
import time

import pytest

from sl_queue.errors import BrokerUnreachable, JobError, PartyBusy, SlQueueError, TransportError, Unroutable
from sl_queue.protocol.messages import SCHEDULER, Kind
from sl_queue.testing.private_broker import free_ports
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.retry import Limits
from tests.support.broker import Broker
from tests.support.links import Inbox, numbered, send, two_parties
from tests.support.rabbit import LIMITS, Connect, at_the_broker, with_login

LONG_S = 240.0  # for which a link would try: what is said at once takes less than half of it, however slow the machine

# Being refused ----------------------------------------------------------------------------------------------------


def failure_of(url: str, limits: Limits = LIMITS) -> tuple[SlQueueError, float]:
    """Return why `bank` cannot open a link there, and after how many seconds it said so."""
    link = RabbitLink(url, "bank", two_parties(), limits=limits)
    began = time.monotonic()
    with pytest.raises(SlQueueError) as failure:
        Inbox(link).open()
    return failure.value, time.monotonic() - began


def test_a_wrong_password_is_named_at_once_and_never_shown(url: str, caplog: pytest.LogCaptureFixture) -> None:
    error, seconds = failure_of(with_login(url, "bank", "s3cret-s3cret"), Limits(first_s=LONG_S))
    assert isinstance(error, BrokerUnreachable)
    assert "user 'bank' was refused: wrong user name or password" in str(error)
    assert seconds < LONG_S / 2
    assert "s3cret" not in f"{error!r}{caplog.text}"


def test_a_missing_virtual_host_is_named_at_once(url: str) -> None:
    error, seconds = failure_of(url + "-nope", Limits(first_s=LONG_S))
    assert re.search(r"there is no virtual host '\w+-nope': rabbitmqctl add_vhost \w+-nope", str(error))
    assert seconds < LONG_S / 2


def test_missing_rights_on_the_virtual_host_are_named_at_once(private_broker: Broker, url: str) -> None:
    private_broker.add_user("stranger", "pw", "/", "", "", "")
    error, seconds = failure_of(with_login(url, "stranger", "pw"), Limits(first_s=LONG_S))
    assert "user 'stranger' has no rights on virtual host" in str(error)
    assert seconds < LONG_S / 2


def test_a_port_where_nobody_listens_is_tried_for_a_bounded_time(caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    with caplog.at_level(logging.WARNING, "sl_queue"):
        error, seconds = failure_of(f"amqp://bank:pw@127.0.0.1:{port}/credit", Limits(first_s=1.0))
    assert isinstance(error, BrokerUnreachable)
    assert f"127.0.0.1:{port}, virtual host 'credit': connection refused: nothing listens there" in str(error)
    assert seconds < LONG_S / 2
    assert re.search(r"no connection to the broker .* trying again in \d\.\d s, for at most \d s more", caplog.text)


def test_a_host_that_is_not_known_is_named() -> None:
    error, _ = failure_of("amqp://bank:pw@no-such-host.invalid/credit", Limits(first_s=0.5))
    assert isinstance(error, BrokerUnreachable)
    assert "no-such-host.invalid:5672" in str(error)


def test_a_broker_without_tls_is_named(url: str) -> None:
    error, seconds = failure_of(url.replace("amqp://", "amqps://"), Limits(first_s=LONG_S))
    assert "TLS failed" in str(error)
    assert "amqp:// or amqps://" in str(error)
    assert seconds < LONG_S / 2


@pytest.mark.parametrize(
    "url", ["http://broker/", "broker:5672", "amqp://", "amqp://u:s3cret@h:notaport/", "amqp://u:s3cret@h/?nonsense=1"]
)
def test_what_is_no_broker_url_is_a_job_error(url: str) -> None:
    with pytest.raises(JobError, match="broker's URL") as error:
        RabbitLink(url, "bank", two_parties())
    assert "s3cret" not in str(error.value)


def test_a_user_who_may_only_write_and_read_gets_by_when_all_is_declared(
    private_broker: Broker, vhost: str, url: str, connect: Connect
) -> None:
    for party in ("insurer", "bank", SCHEDULER):
        connect(party).link.close()  # these may declare
    private_broker.add_user("clerk", "pw", vhost, "", r"^x\.bank$", r"^q\.bank\..*$")
    bank, insurer = connect("bank", with_login(url, "clerk", "pw")), connect("insurer")
    send(bank.link, "insurer", b"activation")
    assert insurer.take(1)[0].body == b"activation"
    send(insurer.link, "bank", b"gradient")
    (gradient,) = bank.take(1)
    bank.link.reject(gradient.tag, "unwanted")
    assert bank.link.flush(90.0)


def test_a_user_who_may_not_declare_is_told_what_is_missing(private_broker: Broker, vhost: str, url: str) -> None:
    private_broker.add_user("clerk", "pw", vhost, "", r"^x\.bank$", r"^q\.bank\..*$")
    error, _ = failure_of(with_login(url, "clerk", "pw"), Limits(first_s=0.5))
    assert isinstance(error, BrokerUnreachable)
    assert re.search(r"exchange 'x.bank' is not there and could not be declared \(ACCESS_REFUSED", str(error))


def test_a_user_who_may_not_read_is_told_so_at_once(
    private_broker: Broker, vhost: str, url: str, connect: Connect
) -> None:
    connect("bank").link.close()
    private_broker.add_user("clerk", "pw", vhost, "", r"^x\.bank$", "")
    error, seconds = failure_of(with_login(url, "clerk", "pw"), Limits(first_s=LONG_S))
    assert "user 'clerk' needs the read right on 'q.bank.scheduler'" in str(error)
    assert seconds < LONG_S / 2


def test_a_user_who_may_not_write_is_told_so(private_broker: Broker, vhost: str, url: str, connect: Connect) -> None:
    connect("bank").link.close()
    private_broker.add_user("clerk", "pw", vhost, "", "", r"^q\.bank\..*$")
    bank = connect("bank", with_login(url, "clerk", "pw"))
    send(bank.link, "insurer", b"activation")
    with pytest.raises(BrokerUnreachable, match=r"user 'clerk' needs the write right on 'x\.bank'"):
        bank.link.flush(90.0)


def test_a_second_worker_waits_and_gets_in_when_the_first_has_ended(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    first = connect("bank")
    threading.Timer(1.0, first.link.abort).start()
    connect("bank", limits=Limits(busy_s=20.0))
    assert "party 'bank': another worker serves it" in caplog.text


def test_a_second_worker_gives_up_after_a_bounded_time(connect: Connect) -> None:
    connect("bank")
    began = time.monotonic()
    with pytest.raises(PartyBusy, match="already serves party 'bank'"):
        connect("bank")
    assert LIMITS.busy_s / 2 < time.monotonic() - began < 100 * LIMITS.busy_s


# Queues that are not what they should be --------------------------------------------------------------------------


def test_a_deleted_queue_of_a_receiver_is_declared_again_and_the_message_arrives(connect: Connect, url: str) -> None:
    bank = connect("bank")
    with at_the_broker(url) as channel:
        channel.queue_delete("q.insurer.bank")
    send(bank.link, "insurer", *numbered(5))
    assert bank.link.flush(90.0)
    assert bank.reconnects == 0
    assert [delivery.body for delivery in connect("insurer").take(5)] == numbered(5)


def test_a_deleted_queue_under_its_consumer_is_declared_again(connect: Connect, url: str) -> None:
    insurer, bank = connect("insurer"), connect("bank")
    with at_the_broker(url) as channel:
        channel.queue_delete("q.insurer.bank")
    insurer.await_that(lambda inbox: inbox.reconnects == 1)
    send(bank.link, "insurer", b"after")
    assert insurer.take(1)[0].body == b"after"


def test_a_message_that_nobody_can_receive_is_named_at_last(private_broker: Broker, vhost: str, url: str) -> None:
    for party in ("bank", "insurer"):
        link = RabbitLink(url, party, two_parties(), limits=LIMITS)
        Inbox(link).open()
        link.close()
    private_broker.add_user("clerk", "pw", vhost, "", r"^x\.bank$", r"^q\.bank\..*$")
    limits = Limits(first_s=LONG_S, unroutable_s=1.0)
    bank = Inbox(RabbitLink(with_login(url, "clerk", "pw"), "bank", two_parties(), limits=limits)).open()
    with at_the_broker(url) as channel:
        channel.queue_unbind("q.insurer.bank", "x.bank", "*.*.insurer")
    send(bank.link, "insurer", b"lost")
    with pytest.raises(Unroutable, match=r"no queue is bound to exchange 'x\.bank' with the key 'r1\.activation\.insu"):
        bank.link.flush(90.0)
    assert isinstance(bank.failure, Unroutable)
    bank.link.close()


def test_a_full_queue_holds_messages_back_until_there_is_room(connect: Connect, url: str) -> None:
    with at_the_broker(url) as channel:
        channel.queue_declare(
            "q.insurer.bank", durable=True, arguments={"x-max-length": 3, "x-overflow": "reject-publish"}
        )
    bank = connect("bank")
    send(bank.link, "insurer", *numbered(8))
    assert not bank.link.flush(0.3)
    insurer = connect("insurer", prefetch=1)
    arrived = []
    while len(arrived) < 8:
        (delivery,) = insurer.take(1)
        arrived.append(delivery.body)
        insurer.link.acknowledge([delivery.tag])
    assert sorted(arrived) == numbered(8)
    assert bank.link.flush(90.0)


def test_a_queue_that_stays_full_is_named_at_last(connect: Connect, url: str) -> None:
    with at_the_broker(url) as channel:
        channel.queue_declare(
            "q.insurer.bank", durable=True, arguments={"x-max-length": 3, "x-overflow": "reject-publish"}
        )
    bank = connect("bank", limits=Limits(lost_s=1.0))
    send(bank.link, "insurer", *numbered(8))
    with pytest.raises(TransportError, match="its queue is full"):
        bank.link.flush(90.0)


def limit_messages(broker: Broker, size: int) -> None:
    """Change max_message_size of a running broker; RabbitMQ 4 keeps a copy of the setting."""
    broker.evaluate(
        f"application:set_env(rabbit, max_message_size, {size}), persistent_term:put(max_message_size, {size})"
    )


def test_a_message_that_is_too_large_for_the_broker_is_named(private_broker: Broker, connect: Connect) -> None:
    limit_messages(private_broker, 1_000_000)
    try:
        bank = connect("bank")
        send(bank.link, "insurer", bytes(1_000_001))
        with pytest.raises(JobError, match=r"larger than the broker accepts .*raise micro_batches"):
            bank.link.flush(90.0)
    finally:
        limit_messages(private_broker, 16 * 1024 * 1024)


def test_a_broker_without_memory_holds_publishers_back_and_says_so(
    private_broker: Broker, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    insurer, bank, impatient = connect("insurer"), connect("bank"), connect(SCHEDULER, limits=Limits(lost_s=1.0))
    alarm = "rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []})"
    private_broker.evaluate(f"{alarm}, rabbit_alarm:get_alarms()")  # answered when all connections have been told
    try:
        send(bank.link, "insurer", b"held back")
        send(impatient.link, "insurer", b"never")
        with pytest.raises(TransportError, match=r"took no messages for 1 s \(low on memory\)"):
            impatient.link.flush(90.0)
        assert not bank.link.flush(0.2)
        assert "the broker takes no messages (low on memory)" in caplog.text
    finally:
        private_broker.evaluate("rabbit_alarm:clear_alarm({resource_limit, memory, node()})")
    assert bank.link.flush(90.0)
    insurer.await_that(lambda inbox: b"held back" in inbox.bodies())
    assert bank.reconnects == 0


def test_a_crash_loop_loses_nothing_in_a_quorum_queue(url: str) -> None:
    bank = Inbox(RabbitLink(url, "bank", two_parties(), queue_type="quorum", limits=LIMITS)).open()
    send(bank.link, "insurer", b"poison")
    for _ in range(25):  # RabbitMQ 4 drops a message after 20 deliveries, if it is not told otherwise
        insurer = Inbox(RabbitLink(url, "insurer", two_parties(), queue_type="quorum", limits=LIMITS)).open()
        assert insurer.take(1)[0].body == b"poison"
        insurer.link.abort()
    bank.link.close()


def test_a_full_quorum_queue_holds_messages_back_until_there_is_room_and_loses_none(url: str) -> None:
    full = {"x-queue-type": "quorum", "x-max-length": 3, "x-overflow": "reject-publish"}
    with at_the_broker(url) as channel:
        channel.queue_declare("q.insurer.bank", durable=True, arguments=full)
    bank, insurer = (
        Inbox(RabbitLink(url, party, two_parties(), 1, queue_type="quorum", limits=LIMITS))
        for party in ("bank", "insurer")
    )
    bank.open()
    sent = numbered(24)
    send(bank.link, "insurer", *sent[:12])
    bank.link.flush(1.0)  # such a queue takes a burst before it says that it is full
    send(bank.link, "insurer", *sent[12:])
    assert not bank.link.flush(1.0)
    insurer.open()
    arrived: set[bytes] = set()
    while arrived != set(sent):
        (delivery,) = insurer.take(1)
        arrived.add(delivery.body)
        insurer.link.acknowledge([delivery.tag])
    assert bank.link.flush(90.0)
    assert bank.reconnects == 0
    for inbox in (bank, insurer):
        inbox.link.close()


def test_what_expires_is_not_kept_for_who_comes_late(connect: Connect) -> None:
    bank = connect("bank")
    bank.link.publish("insurer", Kind.REPORT, "r1", b"alive", persistent=False, expires_s=0.05)
    send(bank.link, "insurer", b"activation")
    assert bank.link.flush(90.0)
    time.sleep(0.1)  # until the first one has expired at the broker
    assert connect("insurer").take(1)[0].body == b"activation"


def test_of_a_large_rejected_message_the_head_is_kept_and_its_size_told(connect: Connect, url: str) -> None:
    insurer, bank = connect("insurer"), connect("bank")
    send(bank.link, "insurer", b"head" + bytes(1_000_000))
    (large,) = insurer.take(1)
    insurer.link.reject(large.tag, "too large")
    assert insurer.link.flush(90.0)
    with at_the_broker(url) as channel:
        _, properties, body = channel.basic_get("q.insurer.dead", auto_ack=True)
    assert properties.headers == {"x-reason": "too large", "x-size": 1_000_004, "x-queue": "q.insurer.bank"}
    assert body.startswith(b"head")
    assert len(body) == 16 * 1024

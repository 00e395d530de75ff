"""Rights of a login at the broker, measured: everybody tries everything that is not theirs.

docs/security.md shows the same table; this test compares the two.
"""

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker, ConnectionClosedByBroker, NackError, ProbableAccessDeniedError

from sl_queue.config.job import Job
from sl_queue.deployment.definitions import QUEUE_BYTES, definitions, hashed, roles, user_of
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.protocol.topology import Topology
from sl_queue.transport.rabbitmq.link import RabbitLink
from tests.support.broker import HOST, Broker
from tests.support.links import Inbox

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
PASSWORD = "correct horse battery staple"


@dataclass(frozen=True)
class Deployed:
    """A job whose definitions a broker has, and how its roles log in there."""

    job: Job
    broker: Broker

    @property
    def names(self) -> Topology:
        return self.job.topology()

    def url(self, role: str, vhost: str | None = None) -> str:
        user, password = user_of(self.job, role), PASSWORD.replace(" ", "%20")
        return f"amqp://{user}:{password}@{HOST}:{self.broker.port}/{vhost or self.job.name}"


def deploy(broker: Broker, name: str, queue_bytes: int = QUEUE_BYTES) -> Deployed:
    parties = {
        "bank": {"role": "feature", "cut": [2]},
        "telco": {"role": "feature", "cut": [2]},
        "insurer": {"role": "label"},
    }
    job = Job(name=name, seed=1, epochs=1, batch_size=4, parties=parties)
    known = definitions(job, {role: hashed(PASSWORD, b"salt") for role in roles(job)})
    known["policies"][0]["definition"]["max-length-bytes"] = queue_bytes
    body = b64encode(json.dumps(known).encode()).decode()
    broker.evaluate(f'rabbit_definitions:import_raw(base64:decode(<<"{body}">>))')
    return Deployed(job, broker)


@pytest.fixture(scope="module")
def deployed(private_broker: Broker) -> Iterator[Deployed]:
    here, elsewhere = deploy(private_broker, "credit"), deploy(private_broker, "fraud")
    yield here
    for job in (here.job, elsewhere.job):
        private_broker.evaluate(f'rabbit_vhost:delete(<<"{job.name}">>, <<"tests">>)')
        for role in roles(job):
            private_broker.evaluate(
                f'rabbit_auth_backend_internal:delete_user(<<"{user_of(job, role)}">>, <<"tests">>)'
            )


# What is tried ----------------------------------------------------------------------------------------------------

Try = Callable[[BlockingChannel, Topology, str, str], None]  # by `me`, against what belongs to `other`


def _inbox(names: Topology, other: str) -> str:
    return names.queue(other, names.senders_to(other)[0])


def _publish(channel: BlockingChannel, exchange: str, key: str, **properties: str) -> None:
    channel.confirm_delivery()
    channel.basic_publish(exchange, key, b"x", pika.BasicProperties(**properties))


OTHERS: dict[str, Try] = {
    "read a message of another's queue": lambda channel, names, me, other: channel.basic_get(_inbox(names, other)),
    "consume another's queue": lambda channel, names, me, other: channel.basic_consume(
        _inbox(names, other), lambda *_: None
    ),
    "read another's dead letters": lambda channel, names, me, other: channel.basic_get(names.dead_letters(other)),
    "empty another's queue": lambda channel, names, me, other: channel.queue_purge(_inbox(names, other)),
    "delete another's queue": lambda channel, names, me, other: channel.queue_delete(_inbox(names, other)),
    "publish as another": lambda channel, names, me, other: _publish(
        channel, names.exchange(other), "run.report.scheduler"
    ),
    "delete another's exchange": lambda channel, names, me, other: channel.exchange_delete(names.exchange(other)),
    "bind another's queue to its own exchange": lambda channel, names, me, other: channel.queue_bind(
        _inbox(names, other), names.exchange(me), "#"
    ),
    "bind an own queue to another's exchange": lambda channel, names, me, other: channel.queue_bind(
        _inbox(names, me), names.exchange(other), "#"
    ),
    "bind its own exchange to another's": lambda channel, names, me, other: channel.exchange_bind(
        names.exchange(me), names.exchange(other), "#"
    ),
    "unbind another's queue": lambda channel, names, me, other: channel.queue_unbind(
        _inbox(names, other), names.exchange(names.senders_to(other)[0]), names.binding_key(other)
    ),
    "write into another's queue through the default exchange": lambda channel, names, me, other: _publish(
        channel, "", _inbox(names, other)
    ),
    "publish in another's name (`user_id`)": lambda channel, names, me, other: _publish(
        channel, names.exchange(me), _own_key(names, me), user_id=f"credit.{other}"
    ),
    "look up whether another's queue is there": lambda channel, names, me, other: channel.queue_declare(
        _inbox(names, other), passive=True
    ),
}


def _own_key(names: Topology, me: str) -> str:
    """Return a key with which `me` may publish."""
    receiver = names.receivers_of(me)[0]
    return names.routing_key("run", min(names.kinds_between(me, receiver)), receiver)


OWN: dict[str, Callable[[BlockingChannel, Topology, str], None]] = {
    "declare a queue": lambda channel, names, me: channel.queue_declare("mine"),
    "declare a queue that the broker names": lambda channel, names, me: channel.queue_declare("", exclusive=True),
    "declare an exchange": lambda channel, names, me: channel.exchange_declare("mine", "topic"),
    "delete an own queue": lambda channel, names, me: channel.queue_delete(_inbox(names, me)),
    "delete its own exchange": lambda channel, names, me: channel.exchange_delete(names.exchange(me)),
    "bind an own queue to its own exchange": lambda channel, names, me: channel.queue_bind(
        _inbox(names, me), names.exchange(me), "#"
    ),
    "publish on the broker's own exchanges": lambda channel, names, me: _publish(
        channel, "amq.topic", "run.report.scheduler"
    ),
    "read the broker's log": lambda channel, names, me: channel.queue_bind(
        _inbox(names, me), "amq.rabbitmq.trace", "#"
    ),
    "publish a kind of message that is not its own": lambda channel, names, me: _publish(
        channel, names.exchange(me), f"run.{'gradient' if me == SCHEDULER else 'command'}.insurer"
    ),
    "publish to who does not listen to it": lambda channel, names, me: _publish(
        channel,
        names.exchange(me),
        f"run.report.{'bank' if me in ('telco', OPERATOR) else 'telco' if me == 'bank' else 'nobody'}",
    ),
    "listen for direct replies": lambda channel, names, me: channel.basic_consume(
        "amq.rabbitmq.reply-to", lambda *_: None, auto_ack=True
    ),
    "answer a direct reply": lambda channel, names, me: _publish(channel, "", "amq.rabbitmq.reply-to.x"),
    "read an own queue": lambda channel, names, me: channel.basic_get(_inbox(names, me)),
    "empty an own queue": lambda channel, names, me: channel.queue_purge(_inbox(names, me)),
    "publish on its own exchange": lambda channel, names, me: _publish(
        channel, names.exchange(me), _own_key(names, me)
    ),
}


REFUSED = (403, 406)  # ACCESS_REFUSED; PRECONDITION_FAILED for a false user_id


def outcome(connection: pika.BlockingConnection, attempt: Callable[[BlockingChannel], None]) -> str:
    channel = connection.channel()
    try:
        attempt(channel)
    except ChannelClosedByBroker as closed:
        return "refused" if closed.reply_code in REFUSED else str(closed)
    channel.close()
    return "allowed"


def measure(deployed: Deployed) -> dict[str, set[str]]:
    """Measure what became of each attempt, over all roles and all that are not them."""
    found: dict[str, set[str]] = {what: set() for what in (*OTHERS, *OWN)}
    names = deployed.names
    for me in roles(deployed.job):
        with pika.BlockingConnection(pika.URLParameters(deployed.url(me))) as connection:
            for what, own in OWN.items():
                found[what].add(outcome(connection, partial(own, names=names, me=me)))
            for what, theirs in OTHERS.items():
                for other in set(roles(deployed.job)) - {me}:
                    found[what].add(outcome(connection, partial(theirs, names=names, me=me, other=other)))
    return found


def documented() -> dict[str, str]:
    """Read the table of docs/security.md."""
    rows = [line.split("|")[1:3] for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return {what.strip(): said.strip().partition(" ")[0].rstrip(",;:") for what, said in rows}


def test_everybody_may_do_exactly_what_the_documented_table_says(deployed: Deployed) -> None:
    table = documented()
    measured = measure(deployed)
    assert {what: became for what, became in measured.items() if became != {table.get(what)}} == {}


@pytest.mark.parametrize("vhost", ["/", "fraud"])
def test_no_login_reaches_another_virtual_host(deployed: Deployed, vhost: str) -> None:
    for role in roles(deployed.job):
        with pytest.raises((ProbableAccessDeniedError, ConnectionClosedByBroker)):
            pika.BlockingConnection(pika.URLParameters(deployed.url(role, vhost.replace("/", "%2F"))))


def test_with_the_least_rights_every_role_can_do_its_work(deployed: Deployed) -> None:
    names, sent = deployed.names, Counter[str]()
    links = {role: Inbox(RabbitLink(deployed.url(role), role, names, 100)).open() for role in roles(deployed.job)}
    try:
        for sender, inbox in links.items():
            for receiver in names.receivers_of(sender):
                for kind in names.kinds_between(sender, receiver):
                    inbox.link.publish(receiver, kind, "run", b"x", persistent=False)
                    sent[receiver] += 1
            assert inbox.link.flush(90.0)
        for receiver, inbox in links.items():
            taken = inbox.take(sent[receiver] if receiver != OPERATOR else 1)  # only the newest status is kept
            inbox.link.reject(taken[0].tag, "for the dead letters")
            assert inbox.link.flush(90.0)
    finally:
        for inbox in links.values():
            inbox.link.close()


def test_who_floods_a_queue_has_to_wait_and_nobody_loses_a_message(private_broker: Broker) -> None:
    flooded = deploy(private_broker, "flooded", queue_bytes=2**20)
    with pika.BlockingConnection(pika.URLParameters(flooded.url("bank"))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        accepted = list(takewhile(bool, (_accepted(channel, flooded) for _ in range(40))))
    with pika.BlockingConnection(pika.URLParameters(flooded.url("insurer"))) as connection:
        queue = connection.channel().queue_declare(flooded.names.queue("insurer", "bank"), passive=True)
        assert queue.method.message_count == len(accepted) == 16
    private_broker.evaluate('rabbit_vhost:delete(<<"flooded">>, <<"tests">>)')


def _accepted(channel: BlockingChannel, deployed: Deployed) -> bool:
    try:
        channel.basic_publish(deployed.names.exchange("bank"), "run.activation.insurer", bytes(2**16))
    except NackError:
        return False
    return True

"""Rights of a hand's login and of its lead at the hands' virtual host, measured; docs/security.md shows the table."""

import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker, ProbableAccessDeniedError

from sl_queue.config.job import Job
from sl_queue.deployment.definitions import definitions, hashed, roles, user_of
from sl_queue.deployment.hands import hand_user, hands_vhost, with_hands
from sl_queue.protocol.hands import HANDS, LEAD, TASKS
from sl_queue.transport.rabbitmq.lane import RabbitLane
from tests.contract.test_lanes import LIMITS, Side
from tests.support.broker import HOST, Broker

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
PASSWORD = "correcthorse"
OWN = "hand.0123456789ab"


@dataclass(frozen=True)
class Deployed:
    job: Job
    broker: Broker

    @property
    def prefix(self) -> str:
        return f"{self.job.name}.bank."

    def url(self, user: str, vhost: str | None = None) -> str:
        return f"amqp://{user}:{PASSWORD}@{HOST}:{self.broker.port}/{vhost or hands_vhost(self.job, 'bank')}"


@pytest.fixture(scope="module")
def deployed(private_broker: Broker) -> Iterator[Deployed]:
    parties = {"bank": {"role": "feature", "cut": [2]}, "insurer": {"role": "label"}}
    job = Job(name="handy", seed=1, epochs=1, batch_size=4, parties=parties)
    password = hashed(PASSWORD, b"salt")
    known = definitions(job, dict.fromkeys(roles(job), password))
    known = with_hands(known, job, {"bank": password, "insurer": password})
    body = b64encode(json.dumps(known).encode()).decode()
    private_broker.evaluate(f'rabbit_definitions:import_raw(base64:decode(<<"{body}">>))')
    yield Deployed(job, private_broker)
    for vhost in (job.name, hands_vhost(job, "bank"), hands_vhost(job, "insurer")):
        private_broker.evaluate(f'rabbit_vhost:delete(<<"{vhost}">>, <<"tests">>)')


def _declare(name: str, channel: BlockingChannel) -> None:
    channel.queue_declare(name, exclusive=True)


def _publish(exchange: str, key: str, channel: BlockingChannel) -> None:
    channel.confirm_delivery()
    channel.basic_publish(exchange, key, b"")


def tries(prefix: str) -> dict[str, Callable[[BlockingChannel], object]]:
    return {
        "take tickets": lambda channel: channel.basic_get(f"{prefix}{TASKS}"),
        "declare a queue of its own": partial(_declare, f"{prefix}{OWN}"),
        "send to the lead": partial(_publish, "", f"{prefix}{LEAD}"),
        "declare any other queue": partial(_declare, "anything"),
        "declare the lead's queue": partial(_declare, f"{prefix}{LEAD}"),
        "read the lead's queue": lambda channel: channel.basic_get(f"{prefix}{LEAD}"),
        "speak to all hands": partial(_publish, f"{prefix}{HANDS}", ""),
        "delete the queue of tickets": lambda channel: channel.queue_delete(f"{prefix}{TASKS}"),
        "empty the queue of tickets": lambda channel: channel.queue_purge(f"{prefix}{TASKS}"),
        "declare an exchange": lambda channel: channel.exchange_declare("mine"),
        "delete the exchange to all hands": lambda channel: channel.exchange_delete(f"{prefix}{HANDS}"),
        "read the broker's log": lambda channel: channel.queue_bind(f"{prefix}{OWN}", "amq.rabbitmq.log", "#"),
    }


def measured(deployed: Deployed) -> dict[str, str]:
    """Try everything with a hand's login while a lead is there."""
    lead = RabbitLane(deployed.url(user_of(deployed.job, "bank")), deployed.prefix, lead=True, limits=LIMITS)
    lead.open(Side())
    found = {}
    try:
        for what, attempt in tries(deployed.prefix).items():
            url = deployed.url(hand_user(deployed.job, "bank"))
            with pika.BlockingConnection(pika.URLParameters(url)) as connection:
                try:
                    attempt(connection.channel())
                    found[what] = "allowed"
                except ChannelClosedByBroker as closed:
                    found[what] = "refused" if closed.reply_code in (403, 405) else closed.reply_text
    finally:
        lead.close()
    return found


def documented() -> dict[str, str]:
    lines = iter(DOCUMENT.read_text().splitlines())
    for line in lines:
        if line.startswith("| a hand tries to"):
            break
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        what, outcome, _ = (cell.strip() for cell in line.strip("|").split("|"))
        rows[what] = outcome
    return rows


def test_a_hand_may_do_exactly_what_the_documented_table_says(deployed: Deployed) -> None:
    found = measured(deployed)
    for vhost, what in (
        (deployed.job.name, "log in at the job's virtual host"),
        (hands_vhost(deployed.job, "insurer"), "log in where another party meets its hands"),
    ):
        with pytest.raises(ProbableAccessDeniedError):
            pika.BlockingConnection(pika.URLParameters(deployed.url(hand_user(deployed.job, "bank"), vhost)))
        found[what] = "refused"
    assert found == documented()


def test_with_these_rights_lead_and_hand_can_do_their_work(deployed: Deployed) -> None:
    lead = RabbitLane(deployed.url(user_of(deployed.job, "bank")), deployed.prefix, lead=True, limits=LIMITS)
    hand = RabbitLane(deployed.url(hand_user(deployed.job, "bank")), deployed.prefix, limits=LIMITS)
    lead_side, side = Side(), Side()
    lead.open(lead_side)
    hand.open(side)
    try:
        hand.take_tickets()
        lead.send(HANDS, b"weights")
        lead.send(side.names[0], b"to you")
        assert [side.next()[0] for _ in range(2)] == [b"weights", b"to you"]
        lead.send(TASKS, b"a ticket")
        body, ticket = side.next()
        hand.send(LEAD, b"a result")
        hand.done(ticket)
        assert (body, lead_side.next()) == (b"a ticket", (b"a result", None))
    finally:
        hand.close()
        lead.close()

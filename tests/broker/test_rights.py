"""Findings of `sl-queue check --broker` on a login: which right is missing, which is too wide."""

from pathlib import Path

import pytest

from sl_queue.checking.check import check_job
from sl_queue.checking.findings import Finding, Level
from sl_queue.errors import BrokerUnreachable
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.topology import Topology
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.rabbitmq.rights import try_rights
from tests.support.broker import Broker
from tests.support.credit import write_credit
from tests.support.links import Inbox, numbered, send

NAMES = Topology("insurer", ("bank",))


def login(broker: Broker, vhost: str, configure: str, write: str, read: str) -> str:
    """Return the URL of a new user with these rights."""
    url = broker.url(vhost)
    broker.add_user(f"{vhost}-user", "secret", vhost, configure, write, read)
    return f"amqp://{vhost}-user:secret@{url.rpartition('@')[2]}"


@pytest.fixture
def declared(private_broker: Broker, unique: str) -> Broker:
    """Return a broker where everything is declared, by somebody who may."""
    for role in ("bank", "insurer", SCHEDULER):
        Inbox(RabbitLink(private_broker.url(unique), role, NAMES)).open().link.close()
    return private_broker


def test_a_login_with_the_least_rights_is_fine(declared: Broker, unique: str) -> None:
    rights = try_rights(login(declared, unique, "^$", r"^x\.bank$", r"^q\.bank\..*$"), "bank", NAMES)
    assert (rights.missing, rights.absent) == ((), ())
    assert rights.too_wide == ("publish with any routing key",)


def test_missing_rights_are_named(declared: Broker, unique: str) -> None:
    rights = try_rights(login(declared, unique, "^$", "^$", r"^q\.bank\.scheduler$"), "bank", NAMES)
    assert rights.missing == ("read queue q.bank.insurer", "write to exchange x.bank")


def test_rights_that_are_too_wide_are_named(declared: Broker, unique: str) -> None:
    rights = try_rights(login(declared, unique, "^sl_queue", r"^(x|amq)\..*$", r"^q\..*$"), "bank", NAMES)
    assert rights.missing == ()
    assert {"declare queues", "write into any queue (the default exchange)"} < set(rights.too_wide)
    assert {"read queue q.insurer.scheduler", "write to exchange x.scheduler"} < set(rights.too_wide)


def test_trying_takes_no_message_away_and_disturbs_no_worker(declared: Broker, unique: str) -> None:
    url = declared.url(unique)
    bank = Inbox(RabbitLink(url, "bank", NAMES)).open()
    send(bank.link, "insurer", *numbered(5))
    assert bank.link.flush(90.0)
    assert try_rights(url, "insurer", NAMES).missing == ()
    insurer = Inbox(RabbitLink(url, "insurer", NAMES)).open()
    assert try_rights(url, "insurer", NAMES).missing == ()
    assert [delivery.body for delivery in insurer.take(5)] == numbered(5)
    for inbox in (bank, insurer):
        inbox.link.close()


def test_a_broker_where_nothing_is_declared_yet_lacks_nothing(private_broker: Broker, unique: str) -> None:
    rights = try_rights(private_broker.url(unique), "bank", NAMES)
    assert rights.missing == () and "read queue q.bank.insurer" in rights.absent


def test_a_wrong_password_is_told_at_once(private_broker: Broker, unique: str) -> None:
    url = private_broker.url(unique).replace("sl_queue:", "sl_queue:x")
    with pytest.raises(BrokerUnreachable, match="wrong user name or password"):
        try_rights(url, "bank", NAMES)


def test_check_tells_it_as_findings(declared: Broker, unique: str, tmp_path: Path) -> None:
    findings: list[Finding] = []
    url = login(declared, unique, "^$", r"^(x\.bank|x\.insurer)$", r"^q\.bank\.insurer$")
    code = check_job(write_credit(tmp_path), [tmp_path / "bank.toml"], url, findings.append)
    told = {finding.level: finding.text for finding in findings if "login" in finding.text}
    assert code == BrokerUnreachable.exit_code
    assert "bank's login lacks rights: read queue q.bank.scheduler;" in told[Level.ERROR]
    assert "write to exchange x.insurer" in told[Level.WARNING]
    assert "secret" not in str(findings)

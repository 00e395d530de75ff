"""A login, a right or a queue that is gone is tried for the same time and named, whichever it is; limits too."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sl_queue.checking.check import check_job
from sl_queue.checking.findings import Finding, Level
from sl_queue.config.broker_url import read_url
from sl_queue.errors import BrokerUnreachable
from sl_queue.testing.broker_contents import binary
from sl_queue.transport.rabbitmq.endpoint import BRIEF_S, Denials, Ended
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.rabbitmq.names import channels_needed
from sl_queue.transport.rabbitmq.nodes import Nodes
from sl_queue.transport.retry import Limits
from tests.support.broker import Broker
from tests.support.credit import write_credit
from tests.support.links import Inbox, send, two_parties
from tests.support.waiting import await_that

LIMITS = Limits(first_s=120.0, lost_s=120.0, busy_s=2.0)
ALL = (".*", ".*", ".*")
RIGHTS = {  # what is left when one of them is revoked
    "write": (".*", "^$", ".*"),
    "read": (".*", ".*", "^$"),
    "all": ("^$", "^$", "^$"),
}


class Clerk:  # mutable: it changes its password
    """A login whose rights are given and revoked while it works."""

    def __init__(self, broker: Broker, vhost: str, folder: Path) -> None:
        self.broker, self.vhost, self.name = broker, vhost, f"{vhost}-clerk"
        self._at = broker.url(vhost).rpartition("@")[2]
        self._file = folder / "broker.url"

    def may(self, rights: tuple[str, str, str], password: str = "first") -> None:
        self.broker.add_user(self.name, password, self.vhost, *rights)

    def url(self, password: str = "first") -> str:
        return f"amqp://{self.name}:{password}@{self._at}"

    def write(self, password: str) -> str:
        self._file.write_text(self.url(password))
        self._file.chmod(0o600)
        return f"file:{self._file}"

    def disconnect(self) -> None:
        user, reason = binary(self.name), binary("tests")
        self.broker.evaluate(f"rabbit_networking:close_all_user_connections({user}, {reason})")


@pytest.fixture
def clerk(private_broker: Broker, unique: str, tmp_path: Path) -> Iterator[Clerk]:
    private_broker.url(unique)
    clerk = Clerk(private_broker, unique, tmp_path)
    clerk.may(ALL)
    yield clerk
    private_broker.delete_vhost(unique)
    private_broker.evaluate(f"rabbit_auth_backend_internal:delete_user({binary(clerk.name)}, {binary('tests')})")


@pytest.fixture
def bank(clerk: Clerk) -> Iterator[Callable[..., Inbox]]:
    links: list[RabbitLink] = []

    def connect(url: str = clerk.url(), *, limits: Limits = LIMITS, again: Callable[[], str] | None = None) -> Inbox:
        links.append(RabbitLink(url, "bank", two_parties(), limits=limits, again=again))
        return Inbox(links[-1]).open()

    yield connect
    for link in links:
        link.close()


@pytest.mark.parametrize("revoked", RIGHTS)
def test_a_right_that_is_revoked_and_given_back_ends_nothing(
    clerk: Clerk, bank: Callable[..., Inbox], revoked: str, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = bank()
    send(inbox.link, "insurer", b"before")
    assert inbox.link.flush(90.0)
    named = "needs the write right on 'x.bank'" if revoked == "write" else "needs the read right on 'q.bank.scheduler'"
    clerk.may(RIGHTS[revoked])
    with caplog.at_level(logging.WARNING, "sl_queue"):
        clerk.disconnect()
        send(inbox.link, "insurer", b"after")
        named = (
            "needs the read right on 'q.bank.scheduler'" if revoked != "write" else "needs the write right on 'x.bank'"
        )
        await_that(lambda: named in caplog.text, f"{named}: {caplog.text}")
    assert (f"user '{clerk.name}'" in caplog.text and "s more" in caplog.text) or "at most" in caplog.text
    clerk.may(ALL)
    assert inbox.link.flush(90.0)
    assert inbox.failure is None and inbox.reconnects >= 1


def test_a_right_that_is_revoked_from_a_link_without_confirms_ends_nothing(
    clerk: Clerk, caplog: pytest.LogCaptureFixture
) -> None:
    link = RabbitLink(clerk.url(), "bank", two_parties(), limits=LIMITS, confirms=False)
    inbox = Inbox(link).open()
    try:
        send(link, "insurer", b"before")
        await_that(lambda: link._session is not None and link._session.published)  # and not refused for a while
        clerk.may(RIGHTS["write"])
        clerk.disconnect()

        def refused() -> bool:
            send(link, "insurer", b"after")
            return "needs the write right on 'x.bank'" in caplog.text

        await_that(refused)
        clerk.may(ALL)
        await_that(lambda: link.connectivity.connected)
        assert inbox.failure is None
    finally:
        link.close()


def send_for_ever(inbox: Inbox) -> None:
    while True:
        send(inbox.link, "insurer", b"after")
        inbox.link.flush(0.1)


@pytest.mark.parametrize("revoked", RIGHTS)
def test_a_right_that_stays_away_ends_the_link_with_its_name_after_the_same_time(
    clerk: Clerk, bank: Callable[..., Inbox], revoked: str
) -> None:
    lost_s = 4.0
    inbox = bank(limits=Limits(first_s=120.0, lost_s=lost_s, busy_s=2.0))
    send(inbox.link, "insurer", b"before")
    assert inbox.link.flush(90.0)
    clerk.may(RIGHTS[revoked])
    clerk.disconnect()
    began = time.monotonic()
    with pytest.raises(BrokerUnreachable, match="write right on 'x.bank'" if revoked == "write" else "read right on"):
        send_for_ever(inbox)
    assert time.monotonic() - began > lost_s / 2


def test_a_login_that_was_changed_is_used_at_the_next_attempt(clerk: Clerk, bank: Callable[..., Inbox]) -> None:
    given = clerk.write("first")
    inbox = bank(read_url(given), again=lambda: read_url(given, again=True))
    clerk.may(ALL, "second")
    clerk.disconnect()
    await_that(lambda: not inbox.link.connectivity.connected, "it is refused with the first")
    clerk.write("second")
    await_that(lambda: inbox.reconnects == 1, "it is back with the second")
    send(inbox.link, "insurer", b"after")
    assert inbox.link.flush(90.0)
    assert inbox.link.connectivity.connected


def test_a_channel_limit_that_is_too_low_is_named_at_once(clerk: Clerk, bank: Callable[..., Inbox]) -> None:
    needed = channels_needed(two_parties(), "bank")
    began = time.monotonic()
    with pytest.raises(BrokerUnreachable, match=f"party 'bank' needs {needed} channels .* allows {needed - 1}: set"):
        bank(f"{clerk.url()}?channel_max={needed - 1}")
    assert time.monotonic() - began < LIMITS.first_s / 2
    inbox = bank(f"{clerk.url()}?channel_max={needed}")
    send(inbox.link, "insurer", b"one")
    assert inbox.link.flush(90.0)


def test_check_names_a_channel_limit_and_a_heartbeat_that_is_off(clerk: Clerk, tmp_path: Path) -> None:
    findings: list[Finding] = []
    url = f"{clerk.url()}?channel_max=3&heartbeat=0"
    code = check_job(write_credit(tmp_path), [tmp_path / "bank.toml"], url, findings.append)
    told = {
        finding.level: finding.text for finding in findings if "channel_max" in finding.text or "heart" in finding.text
    }
    assert code == BrokerUnreachable.exit_code
    assert "bank needs 4 channels in its connection, the broker allows 3" in told[Level.ERROR]
    assert "heartbeat = 0" in told[Level.WARNING]


DENIED = Ended("why", denied=True)

# Pure -------------------------------------------------------------------------------------------------------------


def test_what_was_never_allowed_is_not_waited_for() -> None:
    with pytest.raises(BrokerUnreachable, match=r"^why$"):
        Denials(300.0).note(DENIED, 0.0, 1.0, published=False)


def test_what_was_allowed_in_an_earlier_session_is_waited_for() -> None:
    denials = Denials(300.0)
    denials.note(Ended("cut"), 0.0, 1.0, published=True)
    denials.note(DENIED, 1.0, 2.0, published=False)


def test_denials_in_a_row_end_after_their_time_though_other_messages_are_confirmed_between_them() -> None:
    denials = Denials(10.0)
    for second in range(11):
        denials.note(DENIED, float(second), second + 0.5, published=True)
    assert denials.count == 11
    with pytest.raises(BrokerUnreachable, match="why; tried for 10 s"):
        denials.note(DENIED, 11.0, 11.5, published=True)


def test_a_session_that_went_well_for_a_while_begins_a_new_count() -> None:
    denials = Denials(10.0)
    denials.note(DENIED, 0.0, 1.0, published=True)
    denials.note(DENIED, 100.0, 100.0 + BRIEF_S, published=True)
    assert denials.count == 1


def test_a_url_that_cannot_be_read_or_used_leaves_the_one_before_and_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = ["amqp://bank:pw2@two/v", "", "http://x", "amqp://bank:pw3@three,four/v"]
    nodes = Nodes("amqp://bank:pw1@one/v", lambda: texts[0])
    with caplog.at_level(logging.WARNING, "sl_queue"):
        assert nodes.next().host == "one"
        assert nodes.next().host == "two"
        for _ in range(2):
            texts.pop(0)
            assert [nodes.next().host for _ in range(3)] == ["two"] * 3
    assert len(caplog.records) == 1 and "pw" not in caplog.text
    texts.pop(0)
    assert {nodes.next().host for _ in range(4)} == {"three", "four"}

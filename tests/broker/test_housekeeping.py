"""`sl-queue dead` and `sl-queue cleanup`: what lies at the broker is listed, put back or removed, never by accident."""

import os
import pty
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pika
import pytest

from sl_queue.cli.housekeeping import (
    describe_dead,
    find_remains,
    parties_of,
    plain,
    purge_dead,
    put_back,
    read_dead,
    remove_remains,
)
from sl_queue.config.job import Job
from sl_queue.errors import JobError, PartyBusy
from sl_queue.launch.connect import topology
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.transport.rabbitmq.consuming import HEAD_BYTES
from sl_queue.transport.rabbitmq.housekeeping import Housekeeping, NotAllowed
from sl_queue.transport.rabbitmq.link import RabbitLink
from tests.support.broker import Broker
from tests.support.credit import write_credit
from tests.support.forked import sl_queue
from tests.support.links import Inbox, send

Connect = Callable[[str], Inbox]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job.load(write_credit(tmp_path))


@pytest.fixture
def connect(job: Job, broker_url: str) -> Iterator[Connect]:
    links: list[RabbitLink] = []

    def connect(party: str) -> Inbox:
        links.append(RabbitLink(broker_url, party, topology(job, broker_url)))
        return Inbox(links[-1]).open()

    yield connect
    for link in links:
        link.close()


def refuse(connect: Connect, *bodies: bytes, reason: str = "is of run 'old'") -> Inbox:
    """Have the insurer refuse what the bank sent; returns the insurer's end."""
    insurer, bank = connect("insurer"), connect("bank")
    send(bank.link, "insurer", *bodies)
    for delivery in insurer.take(len(bodies)):
        insurer.link.reject(delivery.tag, reason)
    assert insurer.link.flush(90.0)
    bank.link.close()
    return insurer


def lines(job: Job, url: str, now: float = 0.0, parties: tuple[str, ...] = ("insurer",)) -> list[str]:
    return list(describe_dead(job, url, read_dead(job, url, parties), now))


def test_dead_letters_are_told_by_sender_and_reason_and_stay(job: Job, broker_url: str, connect: Connect) -> None:
    refuse(connect, b"one", b"two").link.close()
    refuse(connect, bytes(HEAD_BYTES + 1), reason="too large\n\x1b]0;owned\x07 [bold]").link.close()
    (at,) = {letter.at for letter in read_dead(job, broker_url, ["insurer"])["insurer"][:1]}  # type: ignore[index]
    for _ in range(2):
        told = lines(job, broker_url, at + 7200)
        assert told[0] == f"insurer: 3 dead letters in {topology(job, broker_url).dead_letters('insurer')}"
        assert told[1].startswith("  2 from bank, 2 h to 2 h old: is of run 'old'")
        assert ", 1 shortened: too large??]0;owned? [bold]" in told[2]
        assert len(told) == 3


def test_what_is_put_back_reaches_its_receiver_from_its_sender(job: Job, broker_url: str, connect: Connect) -> None:
    refuse(connect, b"one", b"two").link.close()
    assert list(put_back(job, broker_url, ["insurer", "bank"])) == [
        "insurer: 2 messages put back",
        "bank: 0 messages put back",
    ]
    assert lines(job, broker_url) == [f"insurer: 0 dead letters in {topology(job, broker_url).dead_letters('insurer')}"]
    assert [(each.sender, each.body) for each in connect("insurer").take(2)] == [("bank", b"one"), ("bank", b"two")]


def test_what_is_not_whole_or_not_the_partys_own_stays_and_is_told(job: Job, broker_url: str, connect: Connect) -> None:
    names = topology(job, broker_url)
    refuse(connect, bytes(HEAD_BYTES + 1), b"whole").link.close()
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        for queue in (names.queue("bank", "insurer"), names.queue(OPERATOR, SCHEDULER), "elsewhere", 7):
            forged = pika.BasicProperties(headers={"x-reason": "r", "x-size": 1, "x-queue": queue})
            connection.channel().basic_publish(names.exchange("insurer"), "x.dead.insurer", b"f", forged)
        connection.channel().basic_publish(names.exchange("insurer"), "x.dead.insurer", b"without headers")
    assert list(put_back(job, broker_url, ["insurer"])) == [
        "insurer: 1 message put back",
        "  1 stay: they are larger than what is kept of a dead letter, so that only their beginning is here",
        "  5 stay: they do not say from which queue of this party they came",
    ]
    assert lines(job, broker_url)[0].startswith("insurer: 6 dead letters")
    assert connect("bank").bodies() == []


def test_a_queue_that_is_gone_leaves_its_letters(job: Job, broker_url: str, connect: Connect) -> None:
    refuse(connect, b"one").link.close()
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        connection.channel().queue_delete(topology(job, broker_url).queue("insurer", "bank"))
    assert list(put_back(job, broker_url, ["insurer"]))[1:] == [
        "  1 stay: they came from a queue that is not there any more"
    ]
    assert lines(job, broker_url)[0].startswith("insurer: 1 dead letter ")


def test_purging_removes_the_dead_letters_and_nothing_else(job: Job, broker_url: str, connect: Connect) -> None:
    insurer = refuse(connect, b"one", b"two")
    assert list(purge_dead(job, broker_url, ["insurer", "bank"])) == [
        "insurer: 2 dead letters removed",
        "bank: 0 dead letters removed",
    ]
    send(connect("bank").link, "insurer", b"three")
    assert insurer.take(1)[0].body == b"three"


def test_a_partys_own_login_reads_its_own_and_is_told_of_the_others(
    job: Job, private_broker: Broker, unique: str, broker_url: str, connect: Connect
) -> None:
    connect("bank").link.close()
    refuse(connect, b"one").link.close()
    private_broker.add_user(f"{unique}-i", "secret", unique, "^$", "^$", r"^q\.insurer\..*$")
    private_broker.add_user(f"{unique}-n", "secret", unique, "^$", "^$", "^$")
    at = broker_url.rpartition("@")[2]
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        names = topology(job, broker_url)
        connection.channel().basic_publish(names.exchange("bank"), "x.dead.bank", b"of the bank")
    everybody = parties_of(job, [])
    told = lines(job, f"amqp://{unique}-i:secret@{at}", 0.0, everybody)
    (bank,) = (line for line in told if line.startswith("bank"))
    assert bank.startswith(f"bank: cannot be read: user '{unique}-i' needs the read right on 'q.bank.dead' (ACCESS_REF")
    assert "insurer: 1 dead letter in q.insurer.dead" in told
    assert "secret" not in str(told)
    with pytest.raises(NotAllowed, match="needs the read right on"):
        read_dead(job, f"amqp://{unique}-n:secret@{at}", everybody)


def test_a_name_that_is_no_party_is_named_with_the_nearest(job: Job) -> None:
    with pytest.raises(JobError, match=r"PARTY = 'insuer'.*'insurer'"):
        parties_of(job, ["insuer"])
    assert set(parties_of(job, [])) == {"bank", "insurer", SCHEDULER, OPERATOR}


def test_a_reason_is_one_line_of_bounded_length() -> None:
    assert plain("a\nb\x1b[2J\u202e\ud800") == "a?b?[2J??"
    assert len(plain("x" * 10_000)) < 300


# cleanup ----------------------------------------------------------------------------------------------------------


def test_nothing_of_a_job_is_left_after_a_cleanup(job: Job, broker_url: str, connect: Connect) -> None:
    refuse(connect, b"one").link.close()
    send(bank := connect("bank").link, "insurer", b"two", b"three")
    assert bank.flush(90.0)
    bank.close()
    remains = find_remains(job, broker_url, force=False)
    assert sum(queue.messages for queue in remains.queues) == 3
    said = remove_remains(job, broker_url, remains, force=False)
    assert said == f"removed {len(remains.queues)} queues with 3 messages, and {len(remains.exchanges)} exchanges"
    with Housekeeping(broker_url, topology(job, broker_url)) as house:
        assert house.remains().queues == house.remains().exchanges == ()
    assert connect("insurer").bodies() == []


def test_a_cleanup_refuses_while_a_worker_is_connected_and_says_which(
    job: Job, broker_url: str, connect: Connect
) -> None:
    remains = find_remains(job, broker_url, force=False)
    bank = connect("bank")
    with pytest.raises(PartyBusy, match=r"still connected: bank; stop the run first"):
        find_remains(job, broker_url, force=False)
    with Housekeeping(broker_url, topology(job, broker_url)) as house:
        remains = house.remains()
    with pytest.raises(PartyBusy, match="a worker reads 'q"):
        remove_remains(job, broker_url, remains, force=False)
    assert bank.failure is None
    assert "removed" in remove_remains(job, broker_url, find_remains(job, broker_url, force=True), force=True)


# The commands -----------------------------------------------------------------------------------------------------


def run(*words: str, tmp_path: Path, broker: str, stdin: Path = Path(os.devnull)) -> CompletedProcess[str]:
    return sl_queue(words[0], tmp_path / "job.toml", *words[1:], "--broker", broker, stdin=stdin)


@pytest.mark.parametrize("words", [("dead", "insurer", "--purge"), ("dead", "--requeue"), ("cleanup",)])
def test_where_nobody_can_be_asked_nothing_is_done_without_yes(
    tmp_path: Path, job: Job, broker_url: str, connect: Connect, words: tuple[str, ...]
) -> None:
    refuse(connect, b"one").link.close()
    done = run(*words, tmp_path=tmp_path, broker=broker_url)
    assert (done.returncode, "add --yes" in done.stderr) == (2, True)
    assert lines(job, broker_url)[0].startswith("insurer: 1 dead letter ")
    done = run(*words, "--yes", tmp_path=tmp_path, broker=broker_url)
    assert done.returncode == 0, done.stderr
    assert {"--purge": "1 dead letter removed", "--requeue": "1 message put back", "cleanup": "removed "}[
        words[-1]
    ] in done.stdout
    assert lines(job, broker_url)[0].startswith("insurer: 0 dead letters ")


@pytest.mark.parametrize(("answer", "code", "left"), [(b"n\n", 1, 1), (b"\n", 1, 1), (b"y\n", 0, 0)])
def test_on_a_terminal_it_asks(
    tmp_path: Path, job: Job, broker_url: str, connect: Connect, answer: bytes, code: int, left: int
) -> None:
    refuse(connect, b"one").link.close()
    master, slave = pty.openpty()
    try:
        os.write(master, answer)
        terminal = Path(os.ttyname(slave))
        done = run("dead", "insurer", "--purge", tmp_path=tmp_path, broker=broker_url, stdin=terminal)
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == code and "Remove the dead letters of insurer for good?" in done.stdout + done.stderr
    assert lines(job, broker_url)[0].startswith(f"insurer: {left} dead letter")


def test_one_thing_at_a_time(tmp_path: Path, job: Job) -> None:
    done = run("dead", "--purge", "--requeue", "--yes", tmp_path=tmp_path, broker="amqp://localhost")
    assert (done.returncode, "give one of them" in done.stderr) == (2, True)

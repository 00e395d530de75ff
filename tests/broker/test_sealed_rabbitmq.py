"""Sealed over a real broker: the same weights, nothing to be read there, and status and stop for the operator only."""

import json
import re
import threading
from pathlib import Path

import pika
import pytest

import sl_queue
from sl_queue.errors import AlignmentError, JobError, PeerSilent, RemoteProtocolError, RunStopped
from sl_queue.launch.connect import sealing, topology
from sl_queue.launch.operator import read_status, request_stop
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.security.keys import PrivateKey, read_key, write_key
from tests.support.broker import Broker
from tests.support.tampering import Tampering
from tests.system.test_run_local import difference, job, party_files, weights

ROLES = ("bank", "telco", "insurer", SCHEDULER, OPERATOR)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Write a private key for every role, in a folder of its own."""
    for role in ROLES:
        (tmp_path / "keys" / role).mkdir(parents=True)
        write_key(tmp_path / "keys" / role / "seal.key", PrivateKey.generate(signs=role == SCHEDULER))
    return tmp_path / "keys"


def sealed_job(keys: Path, unique: str, **changes: object) -> sl_queue.Job:
    public = {role: read_key(keys / role / "seal.key").public.texts() for role in ROLES}
    return job(name=unique, security={"seal": True, "keys": public}, **changes)


def test_a_sealed_run_over_rabbitmq_is_bit_equal_to_a_plain_one(
    keys: Path, tmp_path: Path, unique: str, broker_url: str
) -> None:
    plain = sl_queue.run_local(job(), party_files(tmp_path))
    sealed = sl_queue.run_local(sealed_job(keys, unique), party_files(tmp_path), broker=broker_url, keys=keys)
    assert difference(weights(plain), weights(sealed)) == 0.0


def test_the_operator_alone_reads_the_status_and_stops_the_run(
    keys: Path, tmp_path: Path, unique: str, broker_url: str
) -> None:
    agreed = sealed_job(keys, unique, epochs=500)
    seal = sealing(agreed, OPERATOR, keys / OPERATOR / "seal.key", broker_url)
    with pytest.raises(PeerSilent, match="nothing to stop"):
        request_stop(agreed, broker_url, seal)
    running, ended = threading.Event(), []

    def run() -> None:
        try:
            sl_queue.run_local(
                agreed,
                party_files(tmp_path),
                broker_url,
                tmp_path / "out",
                lambda s: s["step"] > 2 and running.set(),
                keys,
            )
        except RunStopped as stopped:
            ended.append(stopped)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert running.wait(100)
        with pytest.raises(RemoteProtocolError):
            read_status(agreed, broker_url)
        status = read_status(agreed, broker_url, seal=seal)
        assert status is not None and status.job == unique and status.step >= 2
    finally:
        request_stop(agreed, broker_url, sealing(agreed, OPERATOR, keys / OPERATOR / "seal.key", broker_url))
        thread.join(100)
    assert "stopped by the operator" in str(ended[0])


def test_nothing_that_lies_in_a_queue_can_be_read_there(
    keys: Path, tmp_path: Path, unique: str, broker_url: str
) -> None:
    agreed = sealed_job(keys, unique)
    url = pika.URLParameters(broker_url)
    names = topology(agreed, broker_url)
    with pika.BlockingConnection(url) as connection:
        channel = connection.channel()
        channel.queue_declare("everything")
        for role in ROLES:
            channel.exchange_declare(names.exchange(role), "topic", durable=True)
            channel.queue_bind("everything", names.exchange(role), "#")
        sl_queue.run_local(agreed, party_files(tmp_path), broker=broker_url, keys=keys)
        seen = []
        while (got := channel.basic_get("everything", auto_ack=True))[0] is not None:
            seen.append(got[2])
        channel.queue_delete("everything")
    assert len(seen) > 100
    clear = [b"bank", b"telco", b"insurer", b"scheduler", b"float32", b"joined", b"progress", unique.encode()]
    assert not [word for word in clear if any(word in body for body in seen)]


def test_a_thousand_messages_edited_replayed_reordered_and_swapped_on_the_way_change_no_weight_and_stop_no_run(
    keys: Path, tmp_path: Path, unique: str, private_broker: Broker, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    agreed = sealed_job(keys, unique, epochs=12, broker={"patience": 1.5})
    quiet = sl_queue.run_local(job(epochs=12), party_files(tmp_path))
    with Tampering(private_broker.port, broker_url, seed=1, often=0.5, lose=0.1) as proxy:
        sealed = sl_queue.run_local(agreed, party_files(tmp_path), proxy.url(broker_url), tmp_path / "out", keys=keys)
    assert proxy.tried.total() >= 1000 and min(proxy.tried.values()) >= 100, proxy.tried
    assert difference(weights(quiet), weights(sealed)) == 0.0
    assert [line["loss"] for line in sealed.history] == [line["loss"] for line in quiet.history]
    state = json.loads((tmp_path / "out" / SCHEDULER / "run.json").read_text())["state"]
    assert state["bases"] == [], "somebody was sent back"
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        names, channel = topology(agreed, broker_url), connection.channel()
        rejected = [channel.queue_declare(names.dead_letters(role), passive=True) for role in ROLES[:-1]]
        assert 4 <= sum(queue.method.message_count for queue in rejected) < 300, "a few of each sender"
    said = [record.getMessage() for record in caplog.records if ": rejected " in record.getMessage()]
    counted = [
        int(found[1].replace(",", "")) for text in said if (found := re.search(r"rejected ([\d,]+) further", text))
    ]
    assert len(said) + sum(counted) - len(counted) > 300
    print(f"\n{dict(proxy.tried)}, {proxy.tried.total()} in all")


def test_a_worker_without_its_key_or_with_another_is_refused_before_it_begins(
    keys: Path, tmp_path: Path, unique: str
) -> None:
    agreed = sealed_job(keys, unique)
    with pytest.raises(JobError, match=r"'bank' needs its private key: give --key FILE, set SL_QUEUE_KEY"):
        sealing(agreed, "bank", None, "amqp://broker/")
    with pytest.raises(AlignmentError, match=r"the private key of 'bank' does not belong"):
        sealing(agreed, "bank", keys / "telco" / "seal.key", "amqp://broker/")

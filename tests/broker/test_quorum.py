"""A whole run on quorum queues: the bits of memory, also when its broker is killed."""

import threading
import time
from pathlib import Path

import sl_queue
from tests.support.broker import Broker
from tests.system.test_run_local import difference, job, party_files, weights

QUORUM = {"patience": 10.0, "queues": "quorum"}


def test_a_run_on_quorum_queues_is_bit_equal_to_one_over_memory(tmp_path: Path, broker_url: str) -> None:
    over_memory = sl_queue.run_local(job(), party_files(tmp_path))
    over_quorum = sl_queue.run_local(job(broker=QUORUM), party_files(tmp_path), broker=broker_url)
    assert difference(weights(over_memory), weights(over_quorum)) == 0.0


def test_a_broker_killed_under_quorum_queues_changes_no_bit(
    tmp_path: Path, private_broker: Broker, broker_url: str
) -> None:
    quiet = sl_queue.run_local(job(epochs=40), party_files(tmp_path))
    killed = threading.Event()
    begun = time.monotonic()

    def kill_once(status: dict[str, object]) -> None:
        # a quorum queue that is younger than two seconds does not survive its broker
        if not killed.is_set() and int(str(status["epoch"])) >= 2 and time.monotonic() - begun > 3.0:
            killed.set()
            threading.Thread(target=private_broker.restart).start()

    broken = sl_queue.run_local(
        job(epochs=40, broker=QUORUM), party_files(tmp_path), broker=broker_url, on_status=kill_once
    )
    assert killed.is_set()
    assert difference(weights(quiet), weights(broken)) == 0.0

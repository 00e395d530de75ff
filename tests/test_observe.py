"""What Prometheus is told: the numbers of a real run, and nothing of rows or secrets."""

import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sl_queue.errors import JobError
from sl_queue.local.private_broker import free_ports
from sl_queue.observe import SchedulerCollector, Vitals, serve
from sl_queue.ports import IN_PROCESS
from tests.crew import CHECKPOINT_EVERY, ROLES, Crew, write_job
from workers.health import complaint

pytestmark = pytest.mark.timeout(120)


def show(port: int) -> None:
    os.environ["SL_QUEUE_METRICS_PORT"] = str(port)


@pytest.fixture
def crew(tmp_path: Path, broker_url: str) -> Iterator[tuple[Crew, dict[str, int]]]:
    write_job(tmp_path)
    ports = dict(zip(ROLES, free_ports(len(ROLES)), strict=True))
    with Crew(tmp_path, broker_url) as crew:
        for role in ROLES:
            crew.start(role, prepare=(show, ports[role]))
        yield crew, ports


def scrape(port: int) -> dict[str, float]:
    """Every sample by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert not re.search(r"password|amqp|customer", text)
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {" ".join((sample.name, *sorted(sample.labels.values()))): sample.value for sample in samples}


def test_a_run_can_be_followed_in_numbers(crew: tuple[Crew, dict[str, int]]) -> None:
    workers, ports = crew
    workers.await_step("bank", 2 * CHECKPOINT_EVERY)
    for role in ROLES:
        assert complaint(str(ports[role])) is None
    bank, scheduler = scrape(ports["bank"]), scrape(ports["scheduler"])
    again = scrape(ports["bank"])
    assert all(again[name] >= value for name, value in bank.items() if name.partition(" ")[0].endswith("_total"))
    assert bank["sl_queue_committed_step"] >= CHECKPOINT_EVERY - 1
    assert bank["sl_queue_step"] >= bank["sl_queue_committed_step"]
    assert bank["sl_queue_checkpoints_total"] >= 1
    assert bank["sl_queue_samples_total"] >= 32 * 2 * CHECKPOINT_EVERY
    assert bank["sl_queue_messages_total applied"] >= 2 * 2 * CHECKPOINT_EVERY
    assert min(bank["sl_queue_sent_bytes_total"], bank["sl_queue_received_bytes_total"]) > 10_000
    assert bank["sl_queue_waiting_seconds_total gradient insurer"] > 0
    assert bank["sl_queue_busy_seconds_total"] > 0
    assert bank["sl_queue_reconnects_total"] == 0
    assert bank["sl_queue_silent_seconds insurer"] < 60
    assert scheduler["sl_queue_generation"] == 0
    assert scheduler["sl_queue_party_committed_step bank"] >= -1
    assert scheduler["sl_queue_silent_seconds insurer"] < 60
    workers.finish()
    assert "does not answer" in str(complaint(str(ports["bank"])))


def vitals() -> Vitals:
    return Vitals(0.0, IN_PROCESS)


def test_an_address_that_cannot_be_used_is_a_clear_error() -> None:
    for address in ("http", "127.0.0.1:99999", "192.0.2.1:9108"):
        with pytest.raises(JobError, match=rf"--metrics-port {address}"):
            serve(address, SchedulerCollector(dict, vitals), vitals)

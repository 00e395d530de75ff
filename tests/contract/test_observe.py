"""Numbers that Prometheus reads: those of a real run, and nothing of rows or secrets."""

import math
import os
import re
import resource
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sl_queue.errors import JobError
from sl_queue.observe.prometheus import PartyCollector, SchedulerCollector, Training, Vitals, serve
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.measures import IN_PROCESS, Connectivity, HandCounts, Measures
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus
from sl_queue.testing.private_broker import free_ports
from tests.support.crew import CHECKPOINT_EVERY, ROLES, Crew, write_job
from tests.support.waiting import await_that
from workers.health import complaint

DESCRIPTORS = 200


def show(port: int) -> None:
    os.environ["SL_QUEUE_METRICS_PORT"] = str(port)


def show_with_few_descriptors(port: int) -> None:
    show(port)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


@pytest.fixture
def crew(tmp_path: Path, broker_url: str) -> Iterator[tuple[Crew, dict[str, int]]]:
    write_job(tmp_path, epochs=100_000)
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
    workers.kill("bank")
    assert "does not answer" in str(complaint(str(ports["bank"])))


def test_idle_connections_to_the_metrics_port_do_not_end_the_run(tmp_path: Path, broker_url: str) -> None:
    write_job(tmp_path)
    ports = dict(zip(ROLES, free_ports(len(ROLES)), strict=True))
    with Crew(tmp_path, broker_url) as crew, ExitStack() as held:
        for role in ("bank", "scheduler"):
            crew.start(role, prepare=(show_with_few_descriptors, ports[role]))
            await_that(lambda: complaint(str(ports[role])) is None, f"{role} is healthy")  # noqa: B023
            for _ in range(2 * DESCRIPTORS):
                held.enter_context(socket.create_connection(("127.0.0.1", ports[role]), timeout=10))
            assert complaint(str(ports[role])) is None
        crew.start("insurer")
        crew.finish()


def test_a_worker_that_never_reached_its_broker_is_not_healthy(tmp_path: Path) -> None:
    write_job(tmp_path)
    ports = dict(zip(ROLES, free_ports(len(ROLES)), strict=True))
    (nobody,) = free_ports(1)
    with Crew(tmp_path, f"amqp://bank:pw@127.0.0.1:{nobody}/") as crew:
        for role in ("bank", "scheduler"):
            crew.start(role, prepare=(show, ports[role]))
        for role in ("bank", "scheduler"):
            await_that(lambda: "not reached" in str(complaint(str(ports[role]))), f"{role} says so")  # noqa: B023
            assert scrape(ports[role])["sl_queue_connected"] == 0
            assert "sl_queue_generation" not in scrape(ports[role])


@pytest.mark.parametrize(
    ("pulse_age_s", "broker", "said"),
    [
        (0.1, IN_PROCESS, None),
        (61.0, IN_PROCESS, "pulse has stopped for 61 s"),
        (0.1, Connectivity(False, math.inf, {}), "not reached its broker yet"),
        (0.1, Connectivity(False, 5.0, {}), None),
        (0.1, Connectivity(False, 45.0, {}), "no connection to its broker for 45 s"),
        (0.1, Connectivity(True, 45.0, {}), None),
    ],
)
def test_health_says_what_is_wrong(pulse_age_s: float, broker: Connectivity, said: str | None) -> None:
    complaint = Vitals(pulse_age_s, broker).complaint()
    assert complaint is None if said is None else said in str(complaint)


def test_health_follows_what_the_worker_says() -> None:
    now = [IN_PROCESS]
    server = serve("0", SchedulerCollector(lambda: None, lambda: Vitals(0.0, now[0])), lambda: Vitals(0.0, now[0]))
    assert complaint(f"127.0.0.1:{server.port}") is None
    now[0] = Connectivity(False, 90.0, {})
    assert complaint(str(server.port)) == "it has had no connection to its broker for 90 s"
    server.close()
    assert "does not answer" in str(complaint(str(server.port)))


def shown() -> dict[str, str]:
    """Return the type of every number that a worker can show, by the name it has in a query."""
    measures = Measures(1.0, 0.5, 0.0, {("a", "b"): 0.5}, {"a": 1.0}, {"applied": 1}, 1, 1, 1, 1, IN_PROCESS)
    hands = HandCounts(2, 5, 1, 1.0, 0, False)
    parties = {"bank": PartyStatus("here", silent_s=1.0, committed=1)}
    status = RunStatus("running", "j", "r", epoch=1, history=(EpochResult(0, 1, 0.5),), parties=parties)
    collectors = (
        PartyCollector("job", "bank", lambda: measures, lambda: Training("r", 0, 1, 1, 1), lambda: hands),
        SchedulerCollector(lambda: status, vitals),
    )
    families = [family for collector in collectors for family in collector.collect()]
    return {f"{family.name}_total" if family.type == "counter" else family.name: family.type for family in families}


@pytest.mark.parametrize("file", ["alerts.yml", "grafana.json"])
def test_what_is_asked_of_prometheus_is_shown_and_only_counters_are_taken_for_counters(file: str) -> None:
    text, types = (Path(__file__).parents[2] / "ops" / file).read_text(), shown()
    asked = set(re.findall(r"\b(sl_queue_[a-z_]+)(?=[\[{ )\\\"]|$)", text, re.MULTILINE)) - {"sl_queue_worker"}
    assert asked and asked <= set(types)
    assert {types[name] for name in re.findall(r"\b(?:rate|increase)\((sl_queue_\w+)", text)} == {"counter"}
    assert {types[name] for name in re.findall(r"\b(?:delta|deriv)\((sl_queue_\w+)", text)} <= {"gauge"}


def vitals() -> Vitals:
    return Vitals(0.0, IN_PROCESS)


def test_an_address_that_cannot_be_used_is_a_clear_error() -> None:
    for address in ("http", "127.0.0.1:99999", "192.0.2.1:9108"):
        with pytest.raises(JobError, match=rf"--metrics-port {address}"):
            serve(address, SchedulerCollector(lambda: None, vitals), vitals)

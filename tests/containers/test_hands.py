"""Hands of the example come and go as containers; no bit of the weights differs, and they reach nothing else."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containers import PARTIES, WORKERS, Project, bits, in_peace, sh, until

EPOCHS = 400
SEED = 3
HANDS = tuple(f"{party}-hand" for party in PARTIES)
COUNT = """
import urllib.request
text = urllib.request.urlopen("http://127.0.0.1:9108/metrics").read().decode()
print(next(line.split()[1] for line in text.splitlines() if line.startswith("sl_queue_hands ")))
"""
REACH = """
import pathlib, sys
import pika
from sl_queue.transport.rabbitmq.address import Address
url = pathlib.Path("broker.url").read_text().strip()
for vhost in sys.argv[1:]:
    (address,) = Address.parse(url.rpartition("/digits.")[0] + "/" + vhost + "?cacertfile=./ca.crt")
    try:
        pika.BlockingConnection(address.parameters("reach")).close()
        print(vhost, "reached")
    except pika.exceptions.ProbableAccessDeniedError:
        print(vhost, "denied")
"""

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def example(image: None) -> Iterator[Project]:
    """Yield the example while it trains."""
    with Project(SL_QUEUE_EPOCHS=str(EPOCHS)) as project:
        project.compose("up", "--detach", "--scale", "left-hand=1", "--scale", "labels-hand=1")
        yield project


def hands(project: Project, party: str) -> int:
    """Return how many hands a party has by its own metrics."""
    told = project.inside(party, "python", "-c", COUNT, check=False)
    return int(float(told)) if told else 0


def scale(project: Project, party: str, count: int) -> None:
    """Have so many hands of a party, and wait until it has them."""
    project.compose("up", "--detach", "--no-recreate", "--scale", f"{party}-hand={count}", f"{party}-hand")
    until(lambda: hands(project, party) == count, f"{party} has {count} hands")


def test_a_hand_has_neither_key_nor_volume_to_write_nor_a_way_into_the_job(example: Project) -> None:
    until(lambda: hands(example, "left") == 1, "left has a hand")
    host = example.inspect("left-hand")
    assert host["HostConfig"]["ReadonlyRootfs"] and host["HostConfig"]["CapDrop"] == ["ALL"]
    assert not [mount for mount in host["Mounts"] if mount["RW"]]
    assert {mount["Name"] for mount in host["Mounts"]} == {f"{example.name}_left-hand"}
    assert "seal.key" not in example.inside("left-hand", "ls", "/etc/sl_queue").split()
    assert example.inside("left-hand", "id", "-u") == "10001"
    tried = ("digits.left.hands", "digits", "digits.right.hands", "/")
    reached = example.inside("left-hand", "python", "-c", REACH, *tried).splitlines()
    assert reached == ["digits.left.hands reached", "digits denied", "digits.right.hands denied", "/ denied"]


def test_hands_come_and_go_in_mid_run_and_leave_no_trace_in_the_weights(example: Project, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    for party, count in (("left", 3), ("labels", 0), ("left", 0), ("right", 2), ("labels", 2), ("left", 1)):
        scale(example, party, count)
        example.await_step(example.step() + rng.randint(1, 20))
    for victim in ("right-hand", "right", "labels-hand", "labels", "left-hand"):
        sh("docker", "exec", example.container(victim), "sh", "-c", "kill -9 -1", check=False)
        example.await_step(example.step() + rng.randint(1, 20))
    example.await_end(*WORKERS)
    for hand in HANDS:
        until(lambda: not running(example, hand), f"{hand} has gone home")  # noqa: B023
    files = tmp_path / "files"
    for party in PARTIES:
        example.copy(party, f"/state/{party}/final", tmp_path / party)
        example.copy(party, "/etc/sl_queue/.", files)
    expected = in_peace(files, PARTIES, tmp_path)
    for party in PARTIES:
        assert bits(tmp_path / party) == bits(expected / party / "final")


def running(project: Project, service: str) -> list[str]:
    """Return the containers of a service that run."""
    by = f"label=com.docker.compose.service={service}"
    where = f"label=com.docker.compose.project={project.name}"
    told = sh("docker", "ps", "--filter", where, "--filter", by, "--format", "{{json .}}").stdout
    return [json.loads(line)["ID"] for line in told.splitlines()]

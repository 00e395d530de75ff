"""compose.yaml trains its example to the end though its containers are killed, and no bit of the weights differs."""

import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sl_queue.testing.private_broker import free_ports
from tests.support.containers import PARTIES, ROOT, WORKERS, Project, bits, host_address, in_peace, kill
from tests.system.test_deploy_doc import blocks, run

EPOCHS = 100
SEED = 5

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def example(image: None) -> Iterator[Project]:
    """Yield the example while it trains."""
    with Project(SL_QUEUE_EPOCHS=str(EPOCHS)) as project:
        project.compose("up", "--detach")
        yield project


def test_every_container_becomes_healthy_and_can_do_no_more_than_it_must(example: Project) -> None:
    for service in ("broker", *WORKERS):
        example.await_health(service)
    for service in WORKERS:
        host = example.inspect(service)["HostConfig"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["Memory"] > 0 and host["PidsLimit"] > 0
        assert host["RestartPolicy"]["Name"] == "on-failure"
        assert example.inside(service, "id", "-u") == "10001"
        for path in ("/x", "/opt/sl_queue/x", "/etc/sl_queue/x"):
            assert example.inside(service, "sh", "-c", f"touch {path} 2>&1", check=False).endswith("system")
        assert example.inside(service, "stat", "--format", "%a %u", f"/state/{service}") == "700 10001"
        mine = {mount["Name"] for mount in example.inspect(service)["Mounts"] if mount["Type"] == "volume"}
        assert mine == {f"{example.name}_{service}", f"{example.name}_{service}-state"}


def test_killed_containers_leave_no_trace_in_the_weights(example: Project, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    victims = [(service, by) for service in ("broker", *WORKERS) for by in ("engine", "itself")]
    rng.shuffle(victims)
    step = example.step()
    for service, by in victims:
        step += rng.randint(1, 40)
        example.await_step(step)
        kill(example, service, by)
    example.await_end(*WORKERS)
    for party in PARTIES:
        example.copy(party, f"/state/{party}/final", tmp_path / party)
    files = tmp_path / "files"
    for party in PARTIES:
        example.copy(party, "/etc/sl_queue/.", files)
    assert f"epochs = {EPOCHS}\n" in (files / "job.toml").read_text()
    expected = in_peace(files, PARTIES, tmp_path)
    for party in PARTIES:
        assert bits(tmp_path / party) == bits(expected / party / "final")


def test_starting_the_finished_example_again_changes_nothing(example: Project) -> None:
    example.await_end(*WORKERS)
    example.compose("up", "--detach")
    example.await_end(*WORKERS)
    assert all("already finished" in example.logs(service) for service in WORKERS)
    assert f"finished: {EPOCHS} of {EPOCHS} epochs" in example.compose("run", "--rm", "status")


def test_two_organisations_train_with_a_container_each_as_the_page_says(image: None, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("state*", "over-*"))
    shutil.copy(ROOT / "compose.yaml", tmp_path)
    run("python examples/credit/make_data.py 600", tmp_path)
    prepare, keys, job, provision, *_ = blocks("sh")
    for block in (prepare, keys, job):
        run(block, tmp_path)
    (port,) = free_ports(1)
    run(provision.replace("broker.example", f"{host_address()} --port {port}"), tmp_path)
    hub, feature = blocks("sh docker")
    (look,), (rotate,) = blocks("sh docker look"), blocks("sh docker rotate")
    label = feature.replace("bank", "insurer").replace("feature", "label")
    coordinator = feature.splitlines()[-1].replace("bank", "scheduler").replace("feature", "coordinator")
    with Project() as project:

        def organisation(block: str) -> str:
            settings = " ".join(f"{name}={value}" for name, value in project.environ.items())
            script = block.replace("docker compose", " ".join(project.command))
            return run(f"export {settings} SL_QUEUE_PORT={port}\n{script}", tmp_path)

        organisation(hub)
        project.await_health("hub")
        for block in (rotate, label, coordinator):
            organisation(block)
        shutil.copy(tmp_path / "bank" / "seal.key", tmp_path / "its.key")
        shutil.copy(tmp_path / "insurer" / "seal.key", tmp_path / "bank" / "seal.key")
        organisation(feature)
        project.await_end("feature")
        assert project.inspect("feature")["RestartCount"] == 0
        assert re.search(r"error: .*key.*\nexit code 3, reported as 0 .*\n$", project.logs("feature"))
        shutil.copy(tmp_path / "its.key", tmp_path / "bank" / "seal.key")
        organisation(feature)
        project.await_end("feature", "label", "coordinator")
        assert "finished; final weights" in organisation(look)
        project.copy("label", "/state/party/final", tmp_path / "insurer-weights")
    files = tmp_path / "examples" / "credit"
    expected = in_peace(files, ("bank", "insurer"), tmp_path)
    assert bits(tmp_path / "weights") == bits(expected / "bank" / "final")
    assert bits(tmp_path / "insurer-weights") == bits(expected / "insurer" / "final")

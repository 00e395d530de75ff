"""compose.yaml trains its example to the end though its containers are killed, and not one bit of the weights differs.

This runs wherever a Docker engine answers that has the base images or can pull them. In CI it runs only with
SL_QUEUE_TEST_COMPOSE=1, and then a missing engine is a failure; with 0 it never runs. It needs about three minutes,
more when the image must be built. The image stays as sl_queue:test, so that the next time is short; all else goes.
"""

import json
import os
import random
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from sl_queue.testing.private_broker import free_ports
from tests.system.test_deploy_doc import blocks, run

ROOT = Path(__file__).parents[2]
BASE_IMAGES = ("python:3.11-slim", "rabbitmq:4.0-management")
IMAGE = "sl_queue:test"
PARTIES = ("left", "right", "labels")
WORKERS = ("scheduler", *PARTIES)
EPOCHS = 100
SEED = 5

STEP = """
import urllib.request
text = urllib.request.urlopen("http://127.0.0.1:9108/metrics").read().decode()
print(next(line.split()[1] for line in text.splitlines() if line.startswith("sl_queue_step ")))
"""

pytestmark = pytest.mark.timeout(1800)


def sh(*words: str, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SL_QUEUE_", "COMPOSE_"))}
    done = subprocess.run(words, cwd=ROOT, env={**kept, **environ}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 or not check, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done


def answers(*words: str) -> bool:
    return shutil.which(words[0]) is not None and sh(*words, check=False).returncode == 0


def missing() -> str | None:
    """Return why this machine cannot run it."""
    wanted = os.environ.get("SL_QUEUE_TEST_COMPOSE")
    if wanted == "1":
        return None
    if wanted == "0" or os.environ.get("CI"):
        return "SL_QUEUE_TEST_COMPOSE=1 is not set"
    if not answers("docker", "info"):
        return "no Docker engine answers"
    if not (answers("docker", "compose", "version") or answers("docker-compose", "version")):
        return "no Docker Compose here"
    for image in BASE_IMAGES:
        if not (answers("docker", "image", "inspect", image) or answers("docker", "pull", "--quiet", image)):
            return f"the image {image} is neither here nor can it be pulled"
    return None


class Project:
    """Containers of one name, gone at the end with all that is theirs."""

    def __init__(self, **environ: str) -> None:
        self.name = f"sl_queue_test_{secrets.token_hex(4)}"
        self.environ = {"COMPOSE_PROJECT_NAME": self.name, "SL_QUEUE_IMAGE": IMAGE, **environ}
        self.command = ("docker", "compose") if answers("docker", "compose", "version") else ("docker-compose",)

    def __enter__(self) -> "Project":
        return self

    def __exit__(self, *_: object) -> None:
        profiles = [word for name in ("hub", "coordinator", "feature", "label") for word in ("--profile", name)]
        self.compose(*profiles, "down", "--volumes", "--remove-orphans", "--timeout", "1")

    def compose(self, *words: str) -> str:
        return sh(*self.command, *words, **self.environ).stdout

    def container(self, service: str) -> str:
        by = f"label=com.docker.compose.service={service}"
        where = f"label=com.docker.compose.project={self.name}"
        return sh("docker", "ps", "--all", "--quiet", "--filter", where, "--filter", by).stdout.split()[0]

    def inspect(self, service: str) -> dict[str, Any]:
        (found,) = json.loads(sh("docker", "inspect", self.container(service)).stdout)
        return dict(found)

    def inside(self, service: str, *words: str, check: bool = True) -> str:
        return sh("docker", "exec", self.container(service), *words, check=check).stdout.strip()

    def copy(self, service: str, path: str, to: Path) -> None:
        sh("docker", "cp", f"{self.container(service)}:{path}", str(to))

    def logs(self, service: str) -> str:
        done = sh("docker", "logs", self.container(service))
        return done.stdout + done.stderr

    def step(self) -> int:
        """Return the newest step of the label holder by its metrics; -1 while it has none."""
        told = self.inside("labels", "python", "-c", STEP, check=False)
        return int(float(told)) if told else -1

    def await_health(self, service: str) -> None:
        until(lambda: self.inspect(service)["State"]["Health"]["Status"] == "healthy", f"{service} is healthy")

    def await_step(self, step: int) -> None:
        until(lambda: self.step() >= step, f"step {step}")

    def await_end(self, *services: str) -> None:
        """Until all of them have ended well."""
        for service in services:
            until(lambda: self.inspect(service)["State"]["Status"] == "exited", f"{service} has ended")  # noqa: B023
            assert self.inspect(service)["State"]["ExitCode"] == 0, self.logs(service)


def until(condition: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def image() -> None:
    """Build the image of what lies here now."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Project() as project:
        project.compose("build", "image")


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


def kill(project: Project, service: str, by: str) -> None:
    """As `docker kill` does, after which an operator must start it; or from inside, and the engine starts it again."""
    before = project.inspect(service)
    assert before["State"]["Running"], project.logs(service)
    if by == "engine":
        sh("docker", "kill", before["Id"])
        until(lambda: not project.inspect(service)["State"]["Running"], f"{service} is killed")
        project.compose("start", service)
    else:
        sh("docker", "exec", before["Id"], "sh", "-c", "kill -9 -1", check=False)
        until(lambda: project.inspect(service)["RestartCount"] > before["RestartCount"], f"{service} is started again")


def in_peace(files: Path, parties: tuple[str, ...], tmp_path: Path) -> Path:
    """Return the folder of the weights of `sl-queue local`, run on the files of all parties."""
    words = ["local", "job.toml", *(f"{party}.toml" for party in parties), "--broker", "memory://", "--out", "/tmp/out"]
    options = ["--network", "none", "--entrypoint", "sl-queue", "--env", "OMP_NUM_THREADS=1", "--workdir", "/job"]
    made = sh("docker", "create", *options, IMAGE, *words).stdout.strip()
    try:
        sh("docker", "cp", f"{files}/.", f"{made}:/job")
        sh("docker", "start", "--attach", made)
        sh("docker", "cp", f"{made}:/tmp/out", str(tmp_path / "out"))
    finally:
        sh("docker", "rm", "--force", made)
    return tmp_path / "out"


def bits(final: Path) -> dict[str, bytes]:
    """Every weight of a party."""
    weights = {
        f"{path.stem}.{name}": weight.tobytes()
        for path in final.glob("*.safetensors")
        for name, weight in load_file(path).items()
    }
    assert weights
    return weights


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
    here = sh("docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}").stdout.strip()
    run(provision.replace("broker.example", f"{here} --port {port}"), tmp_path)
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

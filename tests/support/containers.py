"""The example of compose.yaml, or any of its services, in containers of a name of their own."""

import ipaddress
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
BASE_IMAGES = ("python:3.11-slim", "rabbitmq:4.0-management")
IMAGE = "sl_queue:test"
PARTIES = ("left", "right", "labels")
WORKERS = ("scheduler", *PARTIES)
PROFILES = ("hub", "coordinator", "feature", "label", "watch", "serve", "operator")

STEP = """
import urllib.request
text = urllib.request.urlopen("http://127.0.0.1:9108/metrics").read().decode()
print(next(line.split()[1] for line in text.splitlines() if line.startswith("sl_queue_step ")))
"""


def sh(*words: str, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SL_QUEUE_", "COMPOSE_"))}
    done = subprocess.run(words, cwd=ROOT, env={**kept, **environ}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 or not check, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done


def answers(*words: str) -> bool:
    return shutil.which(words[0]) is not None and sh(*words, check=False).returncode == 0


@cache
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
        profiles = [
            word
            for name in ("hub", "coordinator", "feature", "label", "watch", "serve", "operator")
            for word in ("--profile", name)
        ]
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


def host_address() -> str:
    """Return the address at which containers reach this machine; not every engine names it as their gateway."""
    shape = "{{(index .IPAM.Config 0).Subnet}}"
    return str(ipaddress.ip_network(sh("docker", "network", "inspect", "bridge", "--format", shape).stdout.strip())[1])


def until(condition: Callable[[], bool], what: str, timeout_s: float = 900.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)


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

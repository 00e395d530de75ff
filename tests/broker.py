"""A RabbitMQ for the tests, in this order: SL_QUEUE_TEST_BROKER, a rabbitmq-server, Debian's package, Docker.

`python -m tests.broker` makes sure that there is one, installing Debian's package where that is possible.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import quote

from sl_queue.errors import BrokerUnreachable
from sl_queue.private_broker import (
    HOST,
    START_S,
    USER,
    PrivateBroker,
    answers,
    binary,
    find_server,
    free_ports,
    permissions,
)

GIVEN = "SL_QUEUE_TEST_BROKER"
IMAGE = os.environ.get("SL_QUEUE_TEST_IMAGE", "rabbitmq:4-management")
POLICY = Path("/usr/sbin/policy-rc.d")  # what Debian asks before it starts a service that it installs

NO_BROKER = f"""no RabbitMQ for the tests. One of these is needed:
  1. {GIVEN}=amqp://USER:PASSWORD@HOST:PORT/ of a broker that the tests may use freely
  2. a rabbitmq-server on this machine (a private one is started, a running one is not touched)
  3. apt-get as root or with passwordless sudo, to install Debian's rabbitmq-server
  4. Docker, to run {IMAGE}"""


class Broker(Protocol):
    """What the tests need of a broker that is theirs alone."""

    port: int

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def start(self) -> None: ...
    def kill(self) -> None: ...
    def wipe(self) -> None: ...
    def restart(self) -> None: ...
    def url(self, vhost: str = "/") -> str: ...
    def delete_vhost(self, vhost: str) -> None: ...
    def add_user(self, name: str, password: str, vhost: str, configure: str, write: str, read: str) -> None: ...
    def evaluate(self, expression: str) -> str: ...


class DockerBroker:  # mutable: it owns a container
    """A private broker in a container, with the surface of PrivateBroker."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self._name = f"sl_queue-test-{self.port}"
        self._password = secrets.token_hex(8)
        self._vhosts = ["/"]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wipe()

    def start(self) -> None:
        if _docker("container", "inspect", self._name, check=False).returncode == 0:
            _docker("start", self._name)
        else:
            login = ("-e", f"RABBITMQ_DEFAULT_USER={USER}", "-e", f"RABBITMQ_DEFAULT_PASS={self._password}")
            where = ("--name", self._name, "--hostname", "broker", "-p", f"{HOST}:{self.port}:5672")
            _docker("run", "--detach", *where, *login, IMAGE)
        deadline = time.monotonic() + START_S
        while not answers(self.port):
            if time.monotonic() > deadline:
                said = _docker("logs", "--tail", "20", self._name)
                raise BrokerUnreachable(f"{IMAGE} did not start:\n{said.stdout}{said.stderr}")
            time.sleep(0.1)
        for vhost in self._vhosts[1:]:
            self._provide(vhost)

    def kill(self) -> None:
        _docker("kill", self._name)

    def wipe(self) -> None:
        _docker("rm", "--force", "--volumes", self._name)

    def restart(self) -> None:
        self.kill()
        self.start()

    def url(self, vhost: str = "/") -> str:
        if vhost not in self._vhosts:
            self._provide(vhost)
            self._vhosts.append(vhost)
        return f"amqp://{USER}:{self._password}@{HOST}:{self.port}/{quote(vhost, safe='')}"

    def delete_vhost(self, vhost: str) -> None:
        self._vhosts.remove(vhost)
        self.evaluate(f"rabbit_vhost:delete({binary(vhost)}, {binary(USER)})")

    def add_user(self, name: str, password: str, vhost: str, configure: str, write: str, read: str) -> None:
        self._control("add_user", name, password)
        self._control("set_permissions", "--vhost", vhost, name, configure, write, read)

    def evaluate(self, expression: str) -> str:
        return self._control("eval", f"{expression}.")

    def _provide(self, vhost: str) -> None:
        made = f"rabbit_vhost:add({binary(vhost)}, {binary(USER)})"
        self.evaluate(f"{made}, {permissions(USER, vhost, '.*', '.*', '.*')}")

    def _control(self, *arguments: str) -> str:
        return _docker("exec", self._name, "rabbitmqctl", "--quiet", *arguments).stdout


def _docker(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=600)
    if check and done.returncode != 0:
        raise BrokerUnreachable(f"docker {arguments[0]}: {done.stderr}")
    return done


def own_broker() -> Broker | None:
    """A private broker, not yet started; None where neither a rabbitmq-server nor Docker is to be had."""
    if "SL_QUEUE_TEST_IMAGE" not in os.environ and find_server() is not None:
        return PrivateBroker()
    return DockerBroker() if _has_docker() else None


def _has_docker() -> bool:
    return shutil.which("docker") is not None and _docker("info", check=False).returncode == 0


def _install() -> bool:
    """Debian's rabbitmq-server, installed but not started; False where that is not possible."""
    as_root: list[str] = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    if shutil.which("apt-get") is None or (as_root and subprocess.run([*as_root, "true"], check=False).returncode != 0):
        return False
    with tempfile.TemporaryDirectory() as folder:
        never = Path(folder) / "policy-rc.d"
        never.write_text("#!/bin/sh\nexit 101\n")
        script = f"""
            set -e
            export DEBIAN_FRONTEND=noninteractive
            if [ ! -e {POLICY} ]; then trap 'rm -f {POLICY}' EXIT; install -m 755 {never} {POLICY}; fi
            apt-get update -q
            apt-get install -y -q --no-install-recommends rabbitmq-server
        """
        return subprocess.run([*as_root, "sh", "-c", script], check=False).returncode == 0 and find_server() is not None


def main() -> None:
    """Say which broker the tests will use, or that there is none."""
    if os.environ.get(GIVEN):
        print(f"tests: using the broker of {GIVEN}")
    elif "SL_QUEUE_TEST_IMAGE" not in os.environ and find_server() is not None:
        print(f"tests: using {find_server()}")
    elif "SL_QUEUE_TEST_IMAGE" not in os.environ and _install():
        print(f"tests: installed {find_server()}")
    elif _has_docker():
        print(f"tests: using {IMAGE} in Docker")
    else:
        sys.exit(NO_BROKER)


if __name__ == "__main__":
    main()

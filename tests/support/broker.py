"""A RabbitMQ for the tests: SL_QUEUE_TEST_BROKER, else one of our own, from rabbitmq-server or in Docker.

`make test` has installed Debian's package before, where there is none of the three (obtain_broker.sh).
"""

import os
import secrets
import shutil
import subprocess
import time
from types import TracebackType
from typing import Protocol, Self

from sl_queue.errors import BrokerUnreachable
from sl_queue.testing.broker_contents import HOST, USER, Contents
from sl_queue.testing.private_broker import START_S, PrivateBroker, answers, find_server, free_ports
from tests.support.secured import TLS, TlsBroker

GIVEN = "SL_QUEUE_TEST_BROKER"
IMAGE = os.environ.get("SL_QUEUE_TEST_IMAGE", "rabbitmq:4-management")


class Broker(Protocol):
    """Broker as tests need it, when it is theirs alone."""

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


class DockerBroker(Contents):  # mutable: it owns a container
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
        self._restore_vhosts()

    def kill(self) -> None:
        _docker("kill", self._name)

    def wipe(self) -> None:
        _docker("rm", "--force", "--volumes", self._name)

    def restart(self) -> None:
        self.kill()
        self.start()

    def evaluate(self, expression: str) -> str:
        return _docker("exec", self._name, "rabbitmqctl", "--quiet", "eval", f"{expression}.").stdout


def _docker(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=600)
    if check and done.returncode != 0:
        raise BrokerUnreachable(f"docker {arguments[0]}: {done.stderr}")
    return done


def own_broker() -> Broker | None:
    """Return a private broker, not yet started; None where neither a rabbitmq-server nor Docker is to be had."""
    if "SL_QUEUE_TEST_IMAGE" not in os.environ and find_server() is not None:
        return TlsBroker() if TLS else PrivateBroker()
    return DockerBroker() if _has_docker() else None


def _has_docker() -> bool:
    return shutil.which("docker") is not None and _docker("info", check=False).returncode == 0

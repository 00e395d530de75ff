"""The trained example answers single requests, from containers that are killed meanwhile."""

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from sl_queue.testing.private_broker import free_ports
from tests.support.containers import PARTIES, WORKERS, Project, sh, until

IMAGES = (3, 14, 15)

pytestmark = pytest.mark.timeout(1800)


def predictions(port: int) -> list[Any] | None:
    """Ask for those of some images; None where nobody answers yet."""
    asked = json.dumps({"ids": list(IMAGES)}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", data=asked, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return list(json.load(answer)["predictions"])
    except urllib.error.HTTPError as error:
        if error.code not in (503, 504):  # no way to a party, or none in time
            raise
    except OSError:
        pass
    return None


def test_a_service_answers_and_answers_again_once_a_killed_container_is_back(image: None) -> None:
    (port,) = free_ports(1)
    with Project(SL_QUEUE_EPOCHS="2", SL_QUEUE_SERVE_PORT=str(port)) as project:
        project.compose("up", "--detach")
        project.await_end(*WORKERS)
        services = [f"{party}-serve" for party in PARTIES]
        project.compose("--profile", "serve", "up", "--detach", *services)
        until(lambda: predictions(port) is not None, "the service answers")
        first = predictions(port)
        assert first is not None and len(first) == len(IMAGES)
        for victim in services:
            before = project.inspect(victim)["RestartCount"]
            sh("docker", "exec", project.container(victim), "sh", "-c", "kill -9 -1", check=False)
            until(lambda: project.inspect(victim)["RestartCount"] > before, f"{victim} is started again")  # noqa: B023
            until(lambda: predictions(port) == first, "the same answer comes again")

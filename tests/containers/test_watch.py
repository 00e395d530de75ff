"""The example on the page that compose's profile `watch` serves to this machine."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from sl_queue.testing.private_broker import free_ports
from tests.support.containers import PARTIES, WORKERS, Project, until

pytestmark = pytest.mark.timeout(1800)


def views(url: str) -> Iterator[dict[str, Any]]:
    """Yield the states that the page gets, as they come."""
    with urllib.request.urlopen(f"{url}/events", timeout=60) as stream:
        for line in stream:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return b"<script>" in page.read()
    except OSError:
        return False


def test_the_page_follows_a_sealed_run_to_its_end(image: None) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with Project(SL_QUEUE_EPOCHS="8", SL_QUEUE_WATCH_PORT=str(port)) as project:
        project.compose("--profile", "watch", "up", "--detach")
        until(lambda: answers(url), "the page is served")
        with pytest.raises(urllib.error.HTTPError, match="421"):
            urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "evil.example"}), timeout=10)
        running = next(view for view in views(url) if view["status"] and view["status"]["step"] > 0)
        assert set(running["parties"]) == set(PARTIES)
        done = next(view for view in views(url) if view["status"] and view["status"]["phase"] == "finished")
        assert len(done["status"]["history"]) == 8
        assert done["curves"]["points"]
        project.await_end(*WORKERS)

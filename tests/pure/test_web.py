"""The live page answers to names of this machine alone, needs nothing from outside, and holds nobody up."""

import base64
import hashlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sl_queue.errors import JobError
from sl_queue.observe.live import Live, Seen
from sl_queue.observe.web import MOST, WatchServer, kept_page, page
from sl_queue.protocol.scheduler.status import RunStatus
from tests.support.waiting import await_that


@pytest.fixture
def live() -> Live:
    return Live()


@pytest.fixture
def server(live: Live) -> Iterator[WatchServer]:
    with WatchServer(live, 0) as server:
        yield server


def status(step: int, **changes: Any) -> RunStatus:
    return RunStatus("running", job="toy", run="r1", step=step, loss=1.0 / (step + 1), samples=step, **changes)


def get(port: int, path: str = "/", host: str | None = None, method: str = "GET") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    return connection.getresponse()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "10.0.0.7"])
def test_a_name_of_this_machine_is_answered(server: WatchServer, host: str) -> None:
    assert get(server.port, host=host).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.nip.io"]
)
@pytest.mark.parametrize("path", ["/", "/events"])
def test_a_foreign_host_header_is_refused(server: WatchServer, host: str, path: str) -> None:
    answer = get(server.port, path, host)
    assert answer.status == 421
    assert b"<script" not in answer.read()


def test_there_is_nothing_else_and_nothing_to_change(server: WatchServer) -> None:
    assert get(server.port, "/../etc/passwd", "localhost").status == 404
    assert get(server.port, "/", "localhost", "POST").status == 501


def test_the_page_asks_for_nothing_from_outside_and_its_policy_allows_its_own_code_alone(server: WatchServer) -> None:
    text = page()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(r"""\s(on\w+|style)=["']""", text)  # what the policy would refuse
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = get(server.port, host="localhost").headers["Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


def test_values_of_a_peer_cannot_end_the_data_of_a_report() -> None:
    text = kept_page({"status": {"reason": "</script><script>alert(1)</script>"}})
    assert "<script>alert" not in text
    (data,) = re.findall(r'id="kept">(.*?)</script>', text)
    assert json.loads(data)["status"]["reason"] == "</script><script>alert(1)</script>"


# The stream -------------------------------------------------------------------------------------------------------


def test_who_looks_later_is_shown_all_and_then_what_is_new(live: Live, server: WatchServer) -> None:
    for step in range(5):
        live.take(status(step))
    events = get(server.port, "/events", "localhost")
    first = next_event(events)
    assert (first["curves"]["from"], [p[0] for p in first["curves"]["points"]]) == (0, [0, 1, 2, 3, 4])
    assert first["status"]["step"] == 4
    live.take(status(5))
    second = next_event(events)
    assert (second["curves"]["from"], [p[0] for p in second["curves"]["points"]]) == (5, [5])
    again = next_event(get(server.port, "/events", "localhost"))  # a reload
    assert [p[0] for p in again["curves"]["points"]] == [0, 1, 2, 3, 4, 5]


def next_event(answer: http.client.HTTPResponse) -> dict[str, Any]:
    while True:
        line = answer.readline()
        assert line, "the stream has ended"
        if line.startswith(b"data: "):
            return dict(json.loads(line[6:]))


def test_trouble_is_shown_and_gone_with_the_next_status(live: Live) -> None:
    live.trouble("the broker refuses")
    text, seen = live.next(Seen(), 1.0)
    assert text is not None
    assert json.loads(text)["problem"] == "the broker refuses"
    assert json.loads(text)["silent_s"] is None
    live.take(status(1), age_s=7.0)
    text, seen = live.next(seen, 1.0)
    assert text is not None
    assert json.loads(text)["problem"] is None
    assert json.loads(text)["silent_s"] >= 7.0  # it was told before we came
    assert live.next(seen, 0.01)[0] is None


def test_two_views_a_second_are_made_however_often_the_scheduler_tells(live: Live) -> None:
    ended = threading.Event()

    def tell() -> None:
        step = 0
        while not ended.wait(0.01):
            live.take(status(step := step + 1))

    teller = threading.Thread(target=tell)
    teller.start()
    seen, began = Seen(), time.monotonic()
    for _ in range(4):
        _, seen = live.next(seen, 60.0)
    took_s = time.monotonic() - began
    ended.set()
    teller.join()
    assert took_s > 1.0  # the first at once, and half a second before each of the others


def test_idle_connections_are_bounded_and_cost_the_run_nothing(live: Live, server: WatchServer) -> None:
    before = set(threading.enumerate())  # those of an earlier test may end in between

    def held() -> int:
        return len(set(threading.enumerate()) - before)

    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3 * MOST)]
    await_that(lambda: held() >= MOST, "no thread a connection")
    live.take(status(1))
    assert held() == MOST, "they were not waited for, and are no more"
    for each in idle:
        each.close()
    await_that(lambda: answers(server.port), "no answer after the idle have left")


def answers(port: int) -> bool:
    try:
        return get(port, host="localhost").status == 200
    except (OSError, http.client.HTTPException):
        return False


def test_a_port_that_is_taken_is_named(live: Live, server: WatchServer) -> None:
    with pytest.raises(JobError, match=rf"--port {server.port}: .* give a free port"):
        WatchServer(live, server.port)

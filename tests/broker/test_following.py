"""Whoever follows a run has one connection, and takes nothing from others who ask."""

import threading
from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.job import Job
from sl_queue.launch.connect import connector
from sl_queue.launch.following import Follower
from sl_queue.launch.operator import read_status, watch_status
from sl_queue.protocol.codec import encode
from sl_queue.protocol.control import Status
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Header, Kind, MicroBatch
from sl_queue.protocol.scheduler.status import RunStatus
from sl_queue.testing.private_broker import free_ports
from sl_queue.transport.link import Link
from tests.support.credit import edit
from tests.support.crew import write_job
from tests.support.secured import SEALED
from tests.support.waiting import await_that

pytestmark = [
    pytest.mark.skipif(SEALED, reason="what is published here is not sealed"),
]


class Heard:
    """A watcher that remembers. Mutable."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ages: list[float] = []
        self.troubles: list[str] = []

    def take(self, status: RunStatus, age_s: float = 0.0) -> None:
        self.steps.append(status.step)
        self.ages.append(age_s)

    def trouble(self, problem: str) -> None:
        self.troubles.append(problem)


@pytest.fixture
def job(tmp_path: Path, unique: str) -> Job:
    path = write_job(tmp_path)
    edit(path, 'name = "credit"', f'name = "{unique}"')
    return Job.load(path)


def publish(link: Link, step: int) -> None:
    run: dict[str, Any] = {"phase": "running", "step": step, "told_at": f"2026-01-01T00:00:{step:02}.000+00:00"}
    header = Header("", 0, Kind.COMMAND, SCHEDULER, OPERATOR, MicroBatch(0, 0))
    link.publish(OPERATOR, Kind.COMMAND, "", encode(header, Status(run, "s1")), persistent=True)
    assert link.flush(90.0)


def test_statuses_are_followed_beside_others_and_the_last_goes_back(job: Job, broker_url: str) -> None:
    heard = Heard()
    link = connector(job, broker_url)(SCHEDULER, 0)
    link.open(lambda _: None, lambda: None, lambda _: None)
    try:
        publish(link, 1)
        with Follower(job, broker_url, None, heard):
            await_that(lambda: heard.steps == [1], "the status that lay there was not taken")
            assert heard.ages[0] > 1000  # it was told long ago
            publish(link, 2)
            await_that(lambda: heard.steps == [1, 2], "the next status was not taken")
            assert heard.ages[1] == 0.0

            told = threading.Event()

            def go_on() -> None:
                step = 3
                while not told.wait(0.25):
                    publish(link, step)
                    step = min(59, step + 1)

            scheduler = threading.Thread(target=go_on)
            scheduler.start()
            telling = watch_status(job, broker_url)
            told.set()
            scheduler.join()
            assert telling is not None
            assert telling.fresh

            last = max(heard.steps)
            await_that(lambda: read_status(job, broker_url, timeout_s=1.0) is not None, "it was not given back")
        assert heard.steps == sorted(set(heard.steps))  # none twice, though the last was delivered again
        assert last >= 2
    finally:
        link.close()


def test_where_nothing_was_ever_said_and_where_no_broker_is_that_is_the_trouble(job: Job, broker_url: str) -> None:
    heard = Heard()
    with Follower(job, broker_url, None, heard):
        await_that(lambda: bool(heard.troubles), "no trouble")
    assert "no scheduler has reported anything of this job" in heard.troubles[0]
    (port,) = free_ports(1)
    nobody = Heard()
    with Follower(job, f"amqp://guest:guest@127.0.0.1:{port}/%2F", None, nobody):
        await_that(lambda: bool(nobody.troubles), "no trouble")
    assert str(port) in nobody.troubles[0]
    assert "guest:guest" not in nobody.troubles[0]

"""`sl-queue status` tells what is, or says that it does not know."""

import json
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.job import Job
from sl_queue.errors import JobError, PeerSilent
from sl_queue.launch.connect import connector
from sl_queue.launch.following import Follower
from sl_queue.launch.operator import request_stop, watch_status
from sl_queue.protocol.codec import encode
from sl_queue.protocol.control import Status
from sl_queue.protocol.events import StillWaiting
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Header, Kind, MicroBatch
from sl_queue.protocol.scheduler.status import Telling, from_json
from sl_queue.transport.link import Link
from tests.broker.test_following import Heard
from tests.support.broker import Broker
from tests.support.credit import edit
from tests.support.crew import Crew, write_job
from tests.support.forked import sl_queue
from tests.support.waiting import await_that

RUN: dict[str, Any] = {"phase": "running", "told_at": "2026-01-01T00:00:00.000+00:00"}
WALL = 1767225600.0 + 12.5  # 12.5 s after that


@pytest.mark.parametrize(
    ("phase", "fresh", "silent", "code"),
    [
        ("gathering", True, False, 0),
        ("running", True, False, 0),
        ("running", False, True, 75),
        ("gathering", False, True, 75),
        ("stopping", False, True, 75),
        ("stopped", False, False, 0),
        ("finished", False, False, 0),
        ("finished", True, False, 0),
        ("failed", False, False, 6),
        ("failed", True, False, 6),
    ],
)
def test_the_code_says_whether_the_run_is_known_to_be_well(phase: str, fresh: bool, silent: bool, code: int) -> None:
    telling = Telling(from_json({**RUN, "phase": phase}), fresh, 3.0)
    assert (telling.silent, telling.exit_code) == (silent, code)
    told = telling.as_json(WALL)
    assert (told["told_at"], told["age_s"], told["fresh"]) == (RUN["told_at"], 12.5, fresh)


@pytest.mark.parametrize("told_at", [None, "yesterday", 7])
def test_a_status_that_does_not_say_when_it_was_told_has_no_age(told_at: Any) -> None:
    assert Telling(from_json({"phase": "running", "told_at": told_at}), True, 3.0).as_json(WALL)["age_s"] is None
    assert Telling(from_json({"phase": "running"}), True, 3.0).as_json(WALL)["age_s"] is None


# At a broker --------------------------------------------------------------------------------------------------


@pytest.fixture
def scheduler(tmp_path: Path, broker_url: str, unique: str) -> Iterator[tuple[Job, Link]]:
    """Play the scheduler's end, reporting what the test has it report."""
    path = write_job(tmp_path)
    edit(path, 'name = "credit"', f'name = "{unique}"')
    job = Job.load(path)
    link = connector(job, broker_url)(SCHEDULER, 0)
    link.open(lambda _: None, lambda: None, lambda _: None)
    yield job, link
    link.close()


def tell(link: Link, **run: Any) -> None:
    header = Header("", 0, Kind.COMMAND, SCHEDULER, OPERATOR, MicroBatch(0, 0))
    link.publish(OPERATOR, Kind.COMMAND, "", encode(header, Status({**RUN, **run}, "s1")), persistent=True)
    assert link.flush(90.0)


def test_what_lies_in_the_queue_is_not_the_present(scheduler: tuple[Job, Link], broker_url: str) -> None:
    job, link = scheduler
    assert watch_status(job, broker_url) is None
    tell(link, epoch=1)
    tell(link, epoch=2)
    for _ in range(2):  # it stays there for the next who asks
        telling = watch_status(job, broker_url)
        assert telling is not None and telling.silent
        assert telling.run.epoch == 2 and telling.listened_s >= 3.0


def test_a_run_of_another_job_is_neither_shown_nor_stopped(scheduler: tuple[Job, Link], broker_url: str) -> None:
    """Jobs may share a virtual host one after the other."""
    job, link = scheduler
    tell(link, job="before")
    assert watch_status(job, broker_url) is None
    with pytest.raises(PeerSilent, match="no scheduler of this job is running"):
        request_stop(job, broker_url)
    asked, over = list[Any](), threading.Event()

    def go_on() -> None:
        while not over.wait(0.25):
            tell(link, job="before", told_at=datetime.now(UTC).isoformat())

    other = threading.Thread(target=go_on)
    other.start()
    try:
        for ask in (watch_status, request_stop):
            with pytest.raises(JobError, match=f"runs job 'before', not '{job.name}'"):
                asked.append(ask(job, broker_url))
        heard = Heard()
        with Follower(job, broker_url, None, heard):
            await_that(lambda: any("runs job 'before'" in said for said in heard.troubles), "no trouble")
    finally:
        over.set()
        other.join()
    assert not asked and not heard.steps
    tell(link, job=job.name, epoch=3)
    told = watch_status(job, broker_url)
    assert told is not None and told.run.epoch == 3


# Real workers -------------------------------------------------------------------------------------------------


def status(crew: Crew, *options: str) -> tuple[int, str]:
    key = {"SL_QUEUE_KEY": str(crew.folder / "keys" / "operator" / "seal.key")}
    done = sl_queue("status", crew.job, *options, SL_QUEUE_BROKER=crew.url, **key)
    return done.returncode, done.stdout + done.stderr


def test_the_dead_are_not_described_as_living(tmp_path: Path, broker_url: str) -> None:
    write_job(tmp_path)
    edit(tmp_path / "job.toml", "epochs = 8", "epochs = 4000")
    with Crew(tmp_path, broker_url) as crew:
        crew.start()
        crew.await_step("insurer", 8)
        code, said = status(crew)
        assert code == 0 and "reported now" in said and "here" in said
        crew.kill("bank")
        told = "{}"

        def silent() -> bool:
            nonlocal code, told
            code, told = status(crew, "--json")
            return json.loads(told)["parties"]["bank"]["silent_s"] > 1.0

        await_that(silent, lambda: f"a party that is dead shows no growing silence: {told}")
        assert code == 0 and json.loads(told)["fresh"]
        for role in ("insurer", "scheduler"):
            crew.kill(role)
        code, said = status(crew)
        assert code == 75
        assert re.search(r"the scheduler has said nothing for at least 3 s", said)
        assert "was " in said and not re.search(r"(?<!was) (here|waiting)\b", said)
        code, told = status(crew, "--json")
        assert code == 75
        assert json.loads(told)["fresh"] is False and json.loads(told)["age_s"] > 3.0


def test_a_run_that_is_over_is_told_as_such_though_nobody_tells_it_any_more(tmp_path: Path, broker_url: str) -> None:
    write_job(tmp_path)
    with Crew(tmp_path, broker_url) as crew:
        crew.start()
        crew.finish()
        code, said = status(crew)
        assert code == 0 and "finished: 8 of 8 epochs" in said and "said nothing" not in said


UNHURRIED = """        import os
        import time

        time.sleep(0.05 if os.path.exists({path!r}) else 0.0)
        return self.relu"""


def blocked_s(crew: Crew) -> float:
    """Return the longest time for which the label holder has said that its link is of no use."""
    waits = [event.outage_s for event in crew.events("insurer") if isinstance(event, StillWaiting)]
    return max((seconds for seconds in waits if seconds is not None), default=0.0)


def test_a_broker_that_takes_no_messages_is_no_silence_of_a_peer(
    tmp_path: Path, broker_url: str, private_broker: Broker
) -> None:
    """The alarm lasts longer than the patience with which whoever is silent is given up."""
    write_job(tmp_path, patience=0.5)
    edit(tmp_path / "job.toml", "epochs = 8", "epochs = 40")
    slow = tmp_path / "slow"  # so that no run ends before the broker has seen to its memory
    slow.touch()
    edit(tmp_path / "bank.py", "        return self.relu", UNHURRIED.format(path=str(slow)))
    with Crew(tmp_path, broker_url) as crew:
        crew.start()
        crew.await_step("insurer", 8)
        private_broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.0)")
        try:
            blamed = "waited for the broker to confirm"  # it blames the broker for its commit, or waits on
            await_that(lambda: blocked_s(crew) >= 6.0 or blamed in crew.log("insurer"))
            code, said = status(crew)
            assert code == 75 and "the broker takes no messages" in said
        finally:
            private_broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.4)")
        slow.unlink()
        crew.restart_until_done({})
        logs = "".join(path.read_text() for path in crew.folder.glob("*-*.log"))
        assert "has been silent for" not in logs and "nothing was heard from" not in logs

"""SIGKILL of each worker before and after every operation of a commit, each time of a real process at a real broker."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.job import Job, PartyFile
from sl_queue.local.threads import run_local
from sl_queue.storage.secret_file import write_secret
from tests.support.broker import Broker
from tests.support.credit import FILES
from tests.support.crew import CHECKPOINT_EVERY, ROLES, Crew, die_at, quiet_weights, sums, write_job
from tests.support.frames import FrameProxy

DEPTH = 2
AT_THE_BROKER = [
    ("before", "deliver", 6),
    ("before", "publish", 7),
    ("after", "publish", 8),  # in the middle: its header and body never leave
    ("after", "the end of a publish", 9),
    ("before", "confirm", 1),
    ("after", "confirm", 1),
    ("before", "acknowledge", 2),
    ("after", "acknowledge", 2),
]
CHECKPOINT = [("before the temp file", 2), ("before the rename", 2), ("after the rename", 2)]
LEDGER = [  # its state is written when it starts and when it ends, its history after each epoch
    ("before a line of history", 1),
    ("before the temp file", 1),
    ("before the rename", 1),
    ("after the rename", 1),
]


@pytest.fixture
def crew(tmp_path: Path, broker_url: str) -> Iterator[Crew]:
    write_job(tmp_path)
    with Crew(tmp_path, broker_url) as crew:
        yield crew


@pytest.mark.parametrize("victim", ROLES)
def test_a_worker_killed_before_and_after_every_operation_of_a_commit_changes_no_weight(
    crew: Crew, private_broker: Broker, victim: str
) -> None:
    others = [role for role in ROLES if role != victim]
    crew.start(*others)
    with FrameProxy(private_broker.port) as proxy:
        for when, point, count in AT_THE_BROKER:
            proxy.arm(when, point, count, lambda: os.kill(crew.pid(victim), signal.SIGKILL))
            crew.start(victim, url=proxy.url(crew.url))
            assert crew.wait(victim) == -signal.SIGKILL, f"{when} {point}\n{crew.tail(victim)}"
    for point in LEDGER if victim == "scheduler" else CHECKPOINT:
        crew.start(victim, prepare=(die_at, point))
        assert crew.wait(victim) == -signal.SIGKILL, f"{point}\n{crew.tail(victim)}"
    crew.start(victim)
    crew.finish()
    assert crew.weights() == quiet_weights()
    assert crew.generation() == 0, "somebody was rolled back"
    for role in ("bank", "insurer"):
        after_restart, without = crew.run_log(role).recomputed(role)
        assert without == 0
        assert all(again <= CHECKPOINT_EVERY + DEPTH for again in after_restart)
        assert role == victim or after_restart == []


DEFENCES = {
    "bank": "activations = { clip = 1.0, sigma = 0.5 }\n",
    "insurer": "labels = { epsilon = 3.0 }\ngradients = { noise = 0.5 }\n",
}
RELEASES = {"bank": ["activations"] * 8, "insurer": ["labels", "gradients"]}  # one an epoch, or once for good
TORN = [("before a line of releases", 1), ("before a line of releases", 2)]  # the second: between its two copies


@pytest.fixture
def defended(tmp_path: Path, broker_url: str) -> Iterator[Crew]:
    """Write the job with a defence and a meter at each party, under secrets of their own."""
    folder = tmp_path / "defended"
    folder.mkdir()
    write_job(folder, patience=6.0)
    for party, defence in DEFENCES.items():
        write_secret(folder / f"{party}.secret")
        path = folder / f"{party}.toml"
        path.write_text(f'{path.read_text()}\n[privacy]\nmeter = true\nsecret = "{party}.secret"\n{defence}')
    with Crew(folder, broker_url) as crew:
        yield crew


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", list(DEFENCES))
def test_a_worker_with_defences_killed_at_any_operation_draws_the_same_and_releases_nothing_twice(
    defended: Crew, private_broker: Broker, tmp_path: Path, victim: str
) -> None:
    crew, quiet = defended, tmp_path / "quiet"
    shutil.copytree(crew.folder, quiet)
    files = [PartyFile.load(quiet / name) for name in FILES]
    run_local(Job.load(quiet / "job.toml"), files, out=quiet / "states")
    crew.start(*(role for role in ROLES if role != victim))
    for point in (*TORN, *CHECKPOINT):
        crew.start(victim, prepare=(die_at, point))
        assert crew.wait(victim) == -signal.SIGKILL, f"{point}\n{crew.tail(victim)}"
    with FrameProxy(private_broker.port) as proxy:
        for when, point, count in (AT_THE_BROKER[1], AT_THE_BROKER[5], AT_THE_BROKER[7]):
            proxy.arm(when, point, count, lambda: os.kill(crew.pid(victim), signal.SIGKILL))
            crew.start(victim, url=proxy.url(crew.url))
            assert crew.wait(victim) == -signal.SIGKILL, f"{when} {point}\n{crew.tail(victim)}"
    crew.start(victim)
    crew.finish()
    assert crew.generation() == 0, "somebody was rolled back, and would have drawn again"
    assert crew.weights() == sums(quiet / "states")
    for path in (crew.states / victim / "privacy.jsonl", crew.folder / f"{victim}.secret.privacy.jsonl"):
        assert [line["mechanism"] for line in lines_of(path)] == RELEASES[victim]
    leaks = [
        [line["leak"] for line in lines_of(states / "scheduler" / "history.jsonl")]
        for states in (crew.states, quiet / "states")
    ]
    assert leaks[0] == leaks[1]

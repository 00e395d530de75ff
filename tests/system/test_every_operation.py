"""SIGKILL of each worker before and after every operation of a commit, each time of a real process at a real broker."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.broker import Broker
from tests.support.crew import CHECKPOINT_EVERY, ROLES, Crew, die_at, quiet_weights, write_job
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

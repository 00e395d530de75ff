"""Standbys of real workers: they take over at once, no bit differs, and nobody takes them for their party before."""

import os
import re
import signal
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.local.threads import run_local
from sl_queue.storage.files import lock
from sl_queue.testing.private_broker import free_ports
from tests.support.credit import FILES, edit
from tests.support.crew import Crew, limit_file_size, quiet_weights, sums, write_job
from tests.support.forked import sl_queue
from tests.support.waiting import await_that

STANDBY = ("--standby",)
READY = "prepared: standby"
TOOK_OVER = "takes over"


HOLDS = """        import os
        import time

        time.sleep(0.02)
        while self.training and os.path.exists({path!r}):
            time.sleep(0.005)
        return self.relu"""


@pytest.fixture
def crew(tmp_path: Path, broker_url: str) -> Iterator[Crew]:
    write_job(tmp_path)
    edit(tmp_path / "bank.py", "        return self.relu", HOLDS.format(path=str(tmp_path / "hold")))
    with Crew(tmp_path, broker_url) as crew:
        yield crew


@contextmanager
def held(crew: Crew, step: int, role: str = "bank") -> Iterator[None]:
    """Have the run wait after that step while the body runs: so nobody finishes before a standby is ready."""
    crew.await_step(role, step)
    (crew.folder / "hold").touch()
    yield
    (crew.folder / "hold").unlink()


def stand_by(crew: Crew, role: str, *words: str, **options: Any) -> Any:
    """Start a standby, which is the role's newest process from now on; returns the one before."""
    before = crew.disown(role)
    crew.start(role, words=(*STANDBY, *words), **options)
    return before


def end(process: Any, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode is not None


@pytest.mark.parametrize("role", ["bank", "insurer"])
def test_a_worker_killed_again_and_again_with_a_standby_in_place_changes_no_weight(crew: Crew, role: str) -> None:
    other = {"bank": "insurer", "insurer": "bank"}[role]
    crew.start()
    for number in range(4):
        with held(crew, 8 * number + 3, other):
            worker = stand_by(crew, role)
            crew.await_log(role, READY)
            end(worker)
            crew.await_log(role, TOOK_OVER)
        crew.await_first_step(role)
    crew.finish()
    assert crew.weights() == quiet_weights()
    assert crew.generation() == 0
    for steps in crew.steps(other):
        assert steps == sorted(set(steps))


def test_a_standby_goes_on_with_rows_that_the_parties_found_and_chose_together(crew: Crew) -> None:
    edit(crew.job, "holdout = 0.2", "holdout = { share = 0.2, stratify = true }")
    crew.job.write_text(f'{crew.job.read_text()}\n[alignment]\nmethod = "psi"\n')
    for file in (crew.folder / name for name in FILES):  # a share of each class is chosen by a secret
        file.write_text(f'{file.read_text()}\n[privacy]\nsecret = "seed"\n')
    files = [PartyFile.load(crew.folder / name) for name in FILES]
    run_local(Job.load(crew.job), files, out=crew.folder / "quiet")
    crew.start()
    with held(crew, 6):
        worker = stand_by(crew, "insurer")
        crew.await_log("insurer", READY)
        end(worker)
        crew.await_log("insurer", TOOK_OVER)
    crew.finish()
    assert crew.weights() == sums(crew.folder / "quiet")
    assert crew.generation() == 0


def test_of_two_standbys_one_takes_over_and_both_end_with_the_run(crew: Crew) -> None:
    crew.start()
    with held(crew, 4):
        worker = stand_by(crew, "bank")
        crew.await_log("bank", READY)
        first = stand_by(crew, "bank")
        crew.await_log("bank", READY)
        end(worker)
        await_that(lambda: TOOK_OVER in said_by_standbys(crew))
    crew.finish()
    first.join(60)
    assert first.exitcode == 0
    assert said_by_standbys(crew).count(TOOK_OVER) == 1
    assert crew.weights() == quiet_weights()


def said_by_standbys(crew: Crew) -> str:
    return crew.log_file("bank", 2).read_text() + crew.log_file("bank", 3).read_text()


def test_a_standby_that_is_started_first_works_and_one_that_is_ended_disturbs_nobody(crew: Crew) -> None:
    crew.start("scheduler", "insurer")
    crew.start("bank", words=STANDBY)
    with held(crew, 4):
        working = stand_by(crew, "bank")
        crew.await_log("bank", READY)
        standby = crew.disown("bank")
        end(standby, signal.SIGTERM)
    assert standby.exitcode == -signal.SIGTERM
    crew.finish()
    working.join(60)
    assert working.exitcode == 0
    assert crew.weights() == quiet_weights()
    assert len(crew.steps("bank")[0]) == 40


def test_a_standby_is_no_sign_of_life_and_says_what_it_is(crew: Crew) -> None:
    (port,) = free_ports(1)
    crew.start()
    with held(crew, 4):
        worker = stand_by(crew, "bank", "--metrics-port", str(port))
        crew.await_log("bank", READY)
        os.kill(worker.pid, signal.SIGSTOP)
        await_that(lambda: re.search(r"of party 'bank'; last heard from it ([4-9]|\d\d) s ago", crew.log("insurer")))
        assert asked(port, "health") == "standby\n"
        assert "sl_queue_standby 1.0" in asked(port, "metrics")
        assert "sl_queue_connected" not in asked(port, "metrics")
        assert "silent" in sl_queue("status", crew.job, SL_QUEUE_BROKER=crew.url).stdout
        end(worker)
        crew.await_log("bank", "training from step")
        assert asked(port, "health") == "healthy\n"
        assert "sl_queue_connected 1.0" in asked(port, "metrics")
    crew.finish()
    assert crew.weights() == quiet_weights()


def asked(port: int, page: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=30) as answer:
        return str(answer.read().decode())


def stop(crew: Crew) -> int:
    assert sl_queue("stop", crew.job, SL_QUEUE_BROKER=crew.url).returncode == 0
    return 0


def fail_another(crew: Crew) -> int:
    """Let the label holder end with an error that no restart fixes."""
    crew.kill("insurer")
    crew.start("insurer", prepare=(limit_file_size, 3000))
    return 6


@pytest.mark.parametrize("ending", [stop, fail_another])
def test_a_standby_ends_as_the_worker_that_was_not_killed(crew: Crew, ending: Callable[[Crew], int]) -> None:
    crew.start()
    with held(crew, 4):
        worker = stand_by(crew, "bank")
        crew.await_log("bank", READY)
    code = ending(crew)
    worker.join(150)
    assert worker.exitcode == code
    assert crew.wait("bank") == code
    said = [crew.log_file("bank", start).read_text().splitlines()[-1] for start in (1, 2)]
    assert said[0] == said[1]
    assert TOOK_OVER not in crew.log("bank")
    crew.wait("insurer")
    crew.wait("scheduler")


def test_a_worker_on_another_machine_is_not_waited_for(crew: Crew) -> None:
    state = crew.states / "bank"
    state.mkdir(parents=True)
    taken = lock(state)
    (state / "lock").write_text("4321 another-machine")
    crew.start("bank", words=STANDBY)
    assert crew.wait("bank") == 2
    assert "a worker on another machine has the state folder" in crew.log("bank")
    taken.release()

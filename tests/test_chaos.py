"""`sl-queue chaos` is the system test of recovery, with a fixed seed; and it says so when a bit differs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sl_queue.chaos import Kind, Storm, plan_faults
from sl_queue.journal import Journal, recomputed
from tests.credit import edit
from tests.crew import ROLES, write_job

COMMAND = str(Path(sys.executable).with_name("sl-queue"))


def chaos(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    files = [str(folder / name) for name in ("job.toml", "bank.toml", "insurer.toml")]
    return subprocess.run([COMMAND, "chaos", *files, *options], capture_output=True, text=True, check=False)


@pytest.mark.timeout(400)  # it starts a broker and a dozen workers, each of which loads torch
def test_killed_workers_a_killed_broker_and_cut_connections_change_no_bit(tmp_path: Path) -> None:
    write_job(tmp_path)
    run = chaos(tmp_path, "--kills", "2", "--broker-restarts", "1", "--cuts", "2", "--seed", "5")
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(re.findall(r"^ .* s  step +\d+ +\d/5  ", run.stdout, re.MULTILINE)) == 5
    assert run.stdout.count(": equal\n") == 3
    again = re.findall(r"steps done again by \w+ +0 +(\d+)", run.stdout)
    assert len(again) == 2
    assert re.search(r"^passed: .*2 x SIGKILL", run.stdout, re.MULTILINE)
    for digests in re.findall(r"in peace +([0-9a-f]{64})\n +under faults +([0-9a-f]{64})", run.stdout):
        assert digests[0] == digests[1]


@pytest.mark.timeout(200)
def test_a_model_that_draws_from_a_generator_of_its_own_is_found_out(tmp_path: Path) -> None:
    write_job(tmp_path)
    edit(tmp_path / "bank.py", "self.relu(self.linear(x))", "self.relu(self.linear(x)) + torch.seed() % 1000 / 1e6")
    run = chaos(tmp_path, "--kills", "0", "--broker-restarts", "0", "--cuts", "0")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "bank/final/base.safetensors: DIFFERENT" in run.stdout
    assert "failed: the weights differ" in run.stdout


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    write_job(tmp_path)
    run = chaos(tmp_path, "--out", str(tmp_path))
    assert run.returncode == 2
    assert "is not empty" in run.stderr


def test_the_same_seed_plans_the_same_faults_and_another_seed_others() -> None:
    storm = Storm(kills=10, broker_restarts=2, cuts=5, seed=3)
    planned = plan_faults(storm, ROLES, 500)
    assert planned == plan_faults(storm, ROLES, 500)
    assert planned != plan_faults(Storm(10, 2, 5, seed=4), ROLES, 500)
    assert [fault.kind for fault in planned].count(Kind.KILL) == 10
    assert [fault.kind for fault in planned].count(Kind.BROKER) == 2
    assert len(planned) == 17
    assert [fault.step for fault in planned] == sorted(fault.step for fault in planned)
    assert all(0 <= fault.step < 475 for fault in planned)
    assert {fault.victim for fault in planned} == {*ROLES, "broker"}


def test_steps_done_again_are_counted_by_restart_and_those_without_one_apart() -> None:
    assert recomputed([[0, 1, 2, 3]]) == ([], 0)
    assert recomputed([[0, 1, 2, 3], [2, 3, 4], [5]]) == ([2, 0], 0)
    assert recomputed([[0, 1, 2, 3, 1, 2, 3, 4]]) == ([], 3)  # everyone went back
    assert recomputed([[], [0, 1], [0, 1, 2]]) == ([0, 2], 0)


def test_a_journal_reads_what_workers_log() -> None:
    journal = Journal()
    journal.start("bank", 1)
    said = "2026-01-01 00:00:00,000 DEBUG bank: step 7 is done; messages of this process so far: "
    assert journal.line("bank", said + "{'redelivered': 1, 'applied': 4}")
    assert journal.line("bank", said.replace("7", "8") + "{'redelivered': 1, 'applied': 6, 'duplicates': 2}")
    assert not journal.line("bank", "2026-01-01 00:00:00,000 INFO bank: sent 3 messages again to party 'insurer'")
    assert not journal.line("bank", "error: something else")
    journal.start("bank", 2)
    assert journal.line("bank", said + "{'redelivered': 5, 'applied': 1}")
    assert (journal.last_step, journal.resent) == (8, 3)
    assert [journal.count(what) for what in ("applied", "redelivered", "duplicates", "rejected")] == [7, 6, 2, 0]
    assert journal.recomputed("bank") == ([1], 0)

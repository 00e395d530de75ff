"""`sl-queue chaos` is the system test of recovery, with a fixed seed; and it says so when a bit differs."""

import os
import re
import subprocess
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sl_queue.config.job import Job
from sl_queue.errors import JobError
from sl_queue.local.supervise import Failure
from sl_queue.observe.json_lines import Entry, EventFile
from sl_queue.protocol.events import Loaded, Resent, StepDone
from sl_queue.testing.chaos import Comparison, Run, run_chaos
from sl_queue.testing.faults import Fault, FaultPlan, Injected, Kind, plan_faults
from sl_queue.testing.report import report
from sl_queue.testing.run_log import RunLog, following, recomputed
from tests.support.crew import ROLES, write_job
from tests.support.everything import use_everything
from tests.support.forked import sl_queue


def chaos(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    files = [folder / name for name in ("job.toml", "bank.toml", "insurer.toml")]
    return sl_queue("chaos", *files, *options, timeout_s=580.0)


def test_killed_workers_a_killed_broker_and_cut_connections_change_no_bit(tmp_path: Path) -> None:
    write_job(tmp_path)
    use_everything(tmp_path, micro_batches=2)
    run = chaos(tmp_path, "--kills", "2", "--broker-restarts", "1", "--cuts", "1", "--seed", "5")
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(re.findall(r"^ .* s  step +\d+ +\d/4  ", run.stdout, re.MULTILINE)) == 4
    assert run.stdout.count(": equal\n") == 3
    again = re.findall(r"steps done again by \w+ +0 +(\d+)", run.stdout)
    assert len(again) == 2
    assert re.search(r"^passed: .*2 x SIGKILL", run.stdout, re.MULTILINE)
    for digests in re.findall(r"in peace +([0-9a-f]{64})\n +under faults +([0-9a-f]{64})", run.stdout):
        assert digests[0] == digests[1]


def run(weights: str, *, injected: int = 1, failure: Failure | None = None, history: str = "[]") -> Run:
    fault, sums = Fault(3, 0.1, Kind.KILL, "bank"), {"bank/final/base.safetensors": weights}
    return Run(failure, 10.0, RunLog(), (Injected(fault, 5.0),) * injected, sums, history)


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (run("ab"), "passed: 1 x SIGKILL, and not one bit differs"),
        (run("cd"), "failed: the weights differ"),
        (run("ab", history="[{}]"), "failed: the histories differ"),
        (run("ab", injected=0), "failed: the run ended before 1 of the faults came"),
        (run("ab", failure=Failure("bank", 5, "NaN")), "failed: the run under faults ended because of bank: NaN"),
    ],
    ids=["equal", "different", "another history", "too short", "ended"],
)
def test_it_passes_only_if_all_faults_came_and_no_bit_differs(faults: Run, said: str) -> None:
    comparison = Comparison(ROLES, (Fault(3, 0.1, Kind.KILL, "bank"),), run("ab", injected=0), faults)
    assert comparison.passed == said.startswith("passed")
    console = Console(width=200, file=StringIO(), record=True)
    console.print(report(comparison))
    shown = console.export_text()
    assert said in shown
    assert ("DIFFERENT" in shown) == (faults.weights["bank/final/base.safetensors"] != "ab")


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    with pytest.raises(JobError, match="is not empty"):
        run_chaos(Job.load(job), job, {}, tmp_path, FaultPlan(1, 0, 0, seed=0), print)


def test_the_same_seed_plans_the_same_faults_and_another_seed_others() -> None:
    plan = FaultPlan(kills=10, broker_restarts=2, cuts=5, seed=3)
    planned = plan_faults(plan, ROLES, 500)
    assert planned == plan_faults(plan, ROLES, 500)
    assert planned != plan_faults(FaultPlan(10, 2, 5, seed=4), ROLES, 500)
    assert [fault.kind for fault in planned].count(Kind.KILL) == 10
    assert [fault.kind for fault in planned].count(Kind.BROKER) == 2
    assert len(planned) == 17
    assert [fault.step for fault in planned] == sorted(fault.step for fault in planned)
    assert all(0 <= fault.step < 475 for fault in planned)
    assert {fault.victim for fault in planned} == {*ROLES, "broker"}


def test_hands_and_their_broker_are_among_the_victims() -> None:
    hands = ["bank, hand 1", "bank, hand 2"]
    planned = plan_faults(FaultPlan(kills=30, broker_restarts=2, cuts=5, seed=3), ROLES, 500, hands)
    kinds = [fault.kind for fault in planned]
    assert kinds.count(Kind.BROKER) == kinds.count(Kind.MEETING) == 2
    assert {fault.victim for fault in planned} == {*ROLES, *hands, "broker"}


def test_steps_done_again_are_counted_by_restart_and_those_without_one_apart() -> None:
    assert recomputed([[0, 1, 2, 3]]) == ([], 0)
    assert recomputed([[0, 1, 2, 3], [2, 3, 4], [5]]) == ([2, 0], 0)
    assert recomputed([[0, 1, 2, 3, 1, 2, 3, 4]]) == ([], 3)  # everyone went back
    assert recomputed([[], [0, 1], [0, 1, 2]]) == ([0, 2], 0)


def test_a_run_log_counts_what_the_events_of_each_process_say() -> None:
    run_log = RunLog()

    def done(pid: int, step: int, **messages: int) -> None:
        run_log.take(Entry(100.0 + step, pid, StepDone("bank", 0, step, 32, None, messages)))

    run_log.start("bank", 1)
    run_log.take(Entry(100.0, 1, Loaded("bank")))
    done(1, 7, redelivered=1, applied=4)
    done(1, 8, redelivered=1, applied=6, duplicates=2)
    run_log.take(Entry(109.0, 1, Resent("bank", "insurer", 3, "gradient 7.0")))
    run_log.start("bank", 2)
    done(1, 9, redelivered=1, applied=7, duplicates=2)  # read late, of the process before
    done(2, 7, redelivered=5, applied=1)
    done(3, 90, applied=900)  # of a process that nobody started
    assert (run_log.last_step, run_log.resent) == (9, 3)
    assert [run_log.count(what) for what in ("applied", "redelivered", "duplicates", "rejected")] == [8, 6, 2, 0]
    assert run_log.recomputed("bank") == ([1], 0)
    assert run_log.processes("bank")[0].to_next_step_s == 7.0


def test_a_file_of_events_is_followed_to_its_last_whole_line(tmp_path: Path) -> None:
    path, taken = tmp_path / "deep" / "events.jsonl", list[Entry]()
    with following(path, taken.append):
        write = EventFile(path)
        for step in range(1000):
            write(StepDone("bank", 0, step, 32))
        with path.open("a") as file:
            file.write('{"at": "2026-01-01T00:00:00+00:00", "clock": 1.0, "event": "step_done", "party": "ba')
    assert [entry.event for entry in taken] == [StepDone("bank", 0, step, 32) for step in range(1000)]
    assert {entry.pid for entry in taken} == {os.getpid()}

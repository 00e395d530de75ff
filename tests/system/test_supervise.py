"""Supervision, with real processes: what is restarted, what ends everything, and that no child is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sl_queue.local.processes import failure_in
from sl_queue.local.supervise import Failure, Limits, Worker, supervise
from tests.support.waiting import await_that

QUICK = Limits(first_pause_s=0.02, longest_pause_s=0.1, crashes=4, grace_s=5.0)


def worker(name: str, code: str, *arguments: object) -> Worker:
    return Worker(name, (sys.executable, "-u", "-c", textwrap.dedent(code), *map(str, arguments)))


def run(*workers: Worker, step_of: Callable[[str], int | None] = lambda _: None) -> tuple[Failure | None, list[str]]:
    lines: list[str] = []
    failure = supervise(workers, os.environ, lambda name, line: lines.append(f"{name}: {line}"), step_of, QUICK)
    return failure, lines


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


COUNTS_ITS_STARTS = """
    import os, signal, sys
    starts = open(sys.argv[1], "a+"); starts.write("x"); starts.flush(); starts.seek(0)
    n = len(starts.read())
"""
SAYS_WHY = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from sl_queue.observe.json_lines import EventFile
    from sl_queue.protocol.events import Failed
    def say(why):
        EventFile(Path(sys.argv[1]))(Failed("bank", "JobError", why, 2))
""")
FOREVER = "import time, os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"


def test_workers_that_exit_0_end_the_supervision(tmp_path: Path) -> None:
    failure, lines = run(worker("bank", "print('hello')"), worker("insurer", "pass"))
    assert failure is None
    assert lines == ["bank: hello"]


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(75)", "sys.exit(137)"])
def test_a_worker_that_was_killed_or_lost_the_broker_is_restarted(tmp_path: Path, ending: str) -> None:
    code = textwrap.dedent(COUNTS_ITS_STARTS) + f"if n < 3: {ending}\n"
    failure, lines = run(worker("bank", code, tmp_path / "starts"))
    assert failure is None
    assert (tmp_path / "starts").read_text() == "xxx"
    assert sum("restarting in" in line for line in lines) == 2


def test_any_other_exit_code_ends_everything_with_that_reason(tmp_path: Path) -> None:
    bad = worker("bank", SAYS_WHY + "say('column age is missing'); print('bye'); sys.exit(2)", tmp_path / "events")
    patient = worker("insurer", FOREVER, tmp_path / "pid")
    reason_of = partial(failure_in, tmp_path / "events")
    quiet = (lambda *_: None, lambda _: None)
    failure = supervise([patient, bad], os.environ, *quiet, Limits(grace_s=0.5), reason_of=reason_of)
    assert failure == Failure("bank", 2, "column age is missing")
    if (tmp_path / "pid").exists():  # it may have been ended before it could write
        assert not alive(int((tmp_path / "pid").read_text()))


def test_the_others_may_end_by_themselves_after_a_failure(tmp_path: Path) -> None:
    bad = worker("bank", "import sys; sys.exit(5)")
    slow = worker("insurer", "import sys, time; time.sleep(0.5); open(sys.argv[1], 'w')", tmp_path / "done")
    failure, _ = run(slow, bad)
    assert failure is not None and failure.exit_code == 5
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(("ending", "exit_code"), [("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", 70)])
def test_a_crash_loop_at_the_same_step_is_given_up(tmp_path: Path, ending: str, exit_code: int) -> None:
    code = textwrap.dedent(COUNTS_ITS_STARTS) + f"print('error: no memory'); {ending}\n"
    failure, _ = run(worker("bank", code, tmp_path / "starts"), step_of=lambda _: 120)
    assert failure is not None and failure.exit_code == exit_code
    assert "4 times in a row after step 120" in failure.reason and "no memory" in failure.reason
    assert (tmp_path / "starts").read_text() == "x" * 4


def test_crashes_with_progress_in_between_are_no_loop(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    code = textwrap.dedent(COUNTS_ITS_STARTS) + "if n < 9: os.kill(os.getpid(), 9)\n"
    failure, _ = run(worker("bank", code, starts), step_of=lambda _: starts.stat().st_size)
    assert failure is None
    assert starts.stat().st_size == 9


SUPERVISES = """
    import os, sys
    from sl_queue.local.supervise import Worker, supervise
    child = '''import os, sys, time
    from sl_queue.local.supervise import die_with_parent
    die_with_parent()
    open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)'''.replace('\\n    ', '\\n')
    workers = [Worker(name, (sys.executable, '-c', child, sys.argv[1] + '/' + name)) for name in ('bank', 'insurer')]
    supervise(workers, os.environ, lambda *_: None, lambda _: None)
"""


def pids(folder: Path) -> list[int]:
    return [int(text) for name in ("bank", "insurer") if (text := _text(folder / name))]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_its_parent_however_that_ends(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(SUPERVISES), str(tmp_path)]) as parent:
        await_that(lambda: len(pids(tmp_path)) == 2, "both workers run")
        parent.send_signal(number)
        assert parent.wait(30) != 0
    for pid in pids(tmp_path):
        await_that(lambda pid=pid: not alive(pid), f"{pid} is gone")  # type: ignore[misc]


def test_what_a_killed_worker_started_itself_is_ended_too(tmp_path: Path) -> None:
    code = """
        import os, subprocess, sys
        sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
        child = subprocess.Popen(sleep, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        open(sys.argv[1], "w").write(str(child.pid)); sys.exit(4)
    """
    failure, _ = run(worker("bank", code, tmp_path / "pid"))
    assert failure is not None and failure.exit_code == 4
    pid = int((tmp_path / "pid").read_text())
    await_that(lambda: not alive(pid), "the grandchild is gone")


def test_lines_come_as_they_are_written(tmp_path: Path) -> None:
    seen = threading.Event()
    go = tmp_path / "go"
    code = "import sys, os, time\nprint('ready')\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"

    def on_line(name: str, line: str) -> None:
        assert (name, line) == ("bank", "ready")
        seen.set()
        go.touch()

    assert supervise([worker("bank", code, go)], os.environ, on_line, lambda _: None, QUICK) is None
    assert seen.is_set()

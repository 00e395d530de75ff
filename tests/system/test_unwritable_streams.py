"""An exit code says how the work ended, also where stderr or stdout takes nothing: a full disk, a pipe nobody reads."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sl_queue.launch.process import INTERRUPTED, UNSHOWN
from tests.support.credit import write_credit
from tests.support.forked import environment

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "sl_queue.cli"]
WAITS = """
from sl_queue.errors import PeerFailed
from sl_queue.launch.process import leave_on_sigterm, leaving, spare_stderr
spare_stderr()
leave_on_sigterm()
with leaving():
    print("here", flush=True)
    if input() == "fail":
        raise PeerFailed("as told")
"""


@contextmanager
def taking_nothing(how: str) -> Iterator[int]:
    """Give a stream that cannot be written."""
    if how == "full disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    yield descriptor
    os.close(descriptor)


def ended(words: list[str], folder: Path, **streams: int) -> "subprocess.CompletedProcess[str]":
    rest = {name: subprocess.PIPE for name in ("stdout", "stderr") if name not in streams}
    command, environ = [sys.executable, *words], environment(PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=folder, env=environ, text=True, timeout=100, check=False, **streams, **rest)  # type: ignore[call-overload, no-any-return]


HOWS = pytest.mark.parametrize("how", ["full disk", "closed pipe"])


@HOWS
@pytest.mark.parametrize(
    "words",
    [
        [*COMMAND, "check", "nowhere.toml"],
        [*COMMAND, "check", "--unknown"],
        ["-m", "workers.scheduler", "--job", "nowhere.toml", "--broker", "amqp://localhost"],
    ],
    ids=["command", "usage", "worker"],
)
def test_a_mistake_has_its_exit_code_where_stderr_cannot_be_written(words: list[str], how: str, tmp_path: Path) -> None:
    with taking_nothing(how) as stream:
        assert ended(words, tmp_path, stderr=stream).returncode == 2


@HOWS
@pytest.mark.parametrize(
    ("by", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, INTERRUPTED), ("fail", 6), ("go", 0)]
)
def test_a_program_ends_as_it_would_where_stderr_cannot_be_written(
    by: "signal.Signals | str", code: int, how: str
) -> None:
    with (
        taking_nothing(how) as stream,
        subprocess.Popen(
            [sys.executable, "-c", WAITS],
            env=environment(PYTHONPATH=str(ROOT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        ) as program,
    ):
        assert program.stdin is not None and program.stdout is not None
        assert program.stdout.readline() == "here\n"
        if isinstance(by, signal.Signals):
            program.send_signal(by)
        else:
            program.stdin.write(f"{by}\n")
            program.stdin.close()
        assert program.wait(60) == code


@HOWS
def test_a_command_that_could_not_show_what_it_found_says_so_with_a_code_of_its_own(how: str, tmp_path: Path) -> None:
    write_credit(tmp_path)
    with taking_nothing(how) as stream:
        found = ended([*COMMAND, "check", "job.toml"], tmp_path, stdout=stream)
        asked = ended([*COMMAND, "--help"], tmp_path, stdout=stream)
        wrong = ended([*COMMAND, "check", "nowhere.toml"], tmp_path, stdout=stream)
    assert (found.returncode, asked.returncode, wrong.returncode) == (UNSHOWN, UNSHOWN, 2)
    said = "" if how == "closed pipe" else "error: stdout cannot be written (No space left on device): what this "
    assert found.stderr.startswith(said) and found.stderr.count("\n") == (1 if said else 0)
    assert "Traceback" not in found.stderr + asked.stderr + wrong.stderr


def test_a_command_that_was_started_without_stdout_ends_without_a_traceback(tmp_path: Path) -> None:
    write_credit(tmp_path)
    words = [
        "-c",
        f"import os, sys; os.close(1); os.execv(sys.executable, {[sys.executable, *COMMAND]!r} + sys.argv[1:])",
    ]
    found = ended([*words, "check", "job.toml"], tmp_path)
    assert found.returncode == UNSHOWN and found.stderr.count("\n") == 1


SHOWS = """
import io, os, sys
from contextlib import redirect_stdout
from sl_queue.launch.process import showing
with redirect_stdout(io.StringIO()) as kept, showing():
    print("in memory")
assert kept.getvalue() == "in memory\\n"
os.set_blocking(sys.stdout.fileno(), False)
with showing():
    for row in range(20_000):
        print(row)
"""


def test_a_stream_that_does_not_block_and_one_in_memory_take_all(tmp_path: Path) -> None:
    done = ended(["-c", SHOWS], tmp_path)
    assert (done.returncode, done.stdout.splitlines()) == (0, [str(row) for row in range(20_000)]), done.stderr

"""The command and the workers as processes of their own, forked from one that has loaded everything they import.

Loading torch and the rest takes a process two seconds of computing, and a forked one none: what it says, how it ends
and how it takes signals is the same. That `sl-queue` starts from nothing, and what it then loads, is tested where the
command itself is run: test_readme, test_deploy_doc, test_cli's demo.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from runpy import run_module, run_path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.spares import COUNT, FEW, Spares, use_for_workers

LOADED = (
    "sl_queue.checking.check",
    "sl_queue.cli.main",
    "sl_queue.launch.party",
    "sl_queue.launch.scheduler",
    "sl_queue.local.threads",
    "sl_queue.transport.rabbitmq.link",
    "tests.support.crew",
    "torch._dynamo",
    "torchmetrics",
)
WAIT_S = 200.0
ENDS_S = 10.0

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(LOADED))


def environment(**changes: str) -> dict[str, str]:
    """Return this process' environment without settings of ours, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SL_QUEUE_")}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def fork(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process; it is killed when the test process ends."""
    process = _server.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


class Forked:
    """A program of ours in a process of its own; mutable: it runs."""

    def __init__(self, words: Sequence[str], process: Any) -> None:
        self.words = words
        self._process = process

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def poll(self) -> int | None:
        """Return the exit code, as subprocess does, once there is one."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout_s: float = WAIT_S) -> int:
        self._process.join(timeout_s)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.words, timeout_s)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; it is gone when this returns."""
        self._process.kill()
        self._process.join(ENDS_S)


@contextmanager
def forked(
    words: Sequence[object],
    environ: Mapping[str, str],
    *,
    stdout: Path,
    stderr: Path,
    stdin: Path = Path(os.devnull),
    cwd: Path | None = None,
) -> Iterator[Forked]:
    """Run a program: `sl-queue`, the module of a worker or a file of Python, and its words.

    Its streams are files or terminals.

    It is killed at the end of the `with` statement.
    """
    for path in (stdout, stderr):
        path.touch()  # what is in it already stays, and new lines come after it
    command, streams = [str(word) for word in words], (str(stdin), str(stdout), str(stderr))
    running = Forked(command, fork(_become, command, dict(environ), streams, str(cwd or Path.cwd())))
    try:
        yield running
    finally:
        running.kill()


def sl_queue(
    *words: object,
    cwd: Path | None = None,
    stdin: Path = Path(os.devnull),
    timeout_s: float = WAIT_S,
    **changes: str,
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, in an environment with these changes."""
    with TemporaryDirectory(prefix="sl_queue-command-") as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        command, environ = ["sl-queue", *words], environment(**changes)
        with forked(command, environ, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd) as running:
            code = running.wait(timeout_s)
        return subprocess.CompletedProcess(running.words, code, stdout.read_text(), stderr.read_text())


def _become(words: list[str], environ: dict[str, str], streams: tuple[str, str, str], cwd: str) -> None:
    """Be the program with these words; what is loaded stays loaded."""
    os.setsid()
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_APPEND if number else os.O_RDWR)
        os.dup2(opened, number)
        os.close(opened)
    for name, how in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        number = ("stdin", "stdout", "stderr").index(name)
        setattr(sys, name, os.fdopen(number, how, 1 if name == "stderr" else -1, closefd=False))
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    if _starts_workers(words):
        use_for_workers(Spares(_run, COUNT if words[1] == "chaos" else FEW))
    _run(words)


def _starts_workers(words: list[str]) -> bool:
    """Return True for a command over a broker that has processes of its own: over memory, all are threads."""
    return words[:2] == ["sl-queue", "chaos"] or (
        words[:2] == ["sl-queue", "local"] and ("--broker" in words or "SL_QUEUE_BROKER" in os.environ)
    )


def _run(words: list[str]) -> None:
    """Run the command, the file or the module."""
    sys.argv = words
    if words[0] == "sl-queue":
        from sl_queue.cli.main import main

        main()
    elif words[0].endswith(".py"):
        sys.path.insert(0, str(Path(words[0]).parent))
        run_path(words[0], run_name="__main__")
    else:
        run_module(words[0], run_name="__main__")

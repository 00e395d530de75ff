"""The example's three workers as real processes over a real broker, to be killed, frozen and started again one by one.

They are forked (tests/support/forked.py), so a worker starts in a fraction of a second. What a worker logs goes to a
file, where it is found even if the worker was killed right after.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sl_queue.config.job import Job, PartyFile
from sl_queue.local.threads import run_local
from sl_queue.observe.json_lines import Entry, entries
from sl_queue.protocol.events import Event
from sl_queue.protocol.messages import OPERATOR
from sl_queue.testing.run_log import RunLog, events_in
from tests.support.credit import FILES, edit, write_credit
from tests.support.forked import fork
from tests.support.secured import SEALED, write_keys
from tests.support.waiting import await_that

ROLES = ("bank", "insurer", "scheduler")
MODULES = {"bank": "feature", "insurer": "label", "scheduler": "scheduler"}
WAIT_S = 150.0
CHECKPOINT_EVERY = 4
STEPS = 40
KEYS = "keys"
QUEUES = os.environ.get("SL_QUEUE_TEST_QUEUES", "classic")  # or quorum


def write_job(
    folder: Path, *, patience: float = 2.0, checkpoint_every: int = CHECKPOINT_EVERY, epochs: int = 8
) -> Path:
    """Write the example as a job of 40 steps with a checkpoint every 4; only `epochs`, of 5 steps, changes a weight.

    Those 40 take half a second: who looks at a run that must not have ended meanwhile wants more of them.
    """
    job = write_credit(folder)
    edit(job, "epochs = 5", f"epochs = {epochs}")
    edit(job, "batch_size = 128", "batch_size = 32")
    edit(job, "micro_batches = 4", f"micro_batches = 2\ncheckpoint_every = {checkpoint_every}")
    security = write_keys(folder / KEYS, (*ROLES, OPERATOR)) if SEALED else ""
    broker = f'[broker]\npatience = {patience}\nqueues = "{QUEUES}"\n'
    job.write_text(f"{job.read_text()}\n{security}\n{broker}")
    return job


def with_heartbeat(url: str, seconds: int) -> str:
    return f"{url}{'&' if '?' in url else '?'}heartbeat={seconds}"


def sums(states: Path) -> dict[str, str]:
    """SHA-256 of all final weights under a folder of state folders."""
    files = sorted(states.glob("*/final/*.safetensors"))
    return {str(path.relative_to(states)): sha256(path.read_bytes()).hexdigest() for path in files}


class Crew:
    """Mutable: it owns processes. Use it in a `with` statement; at its end all that still run are killed."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.states = folder / "states"
        self.job = folder / "job.toml"
        self._running: dict[str, Any] = {}
        self._starts: dict[str, int] = dict.fromkeys(ROLES, 0)
        self._pids: dict[str, list[int]] = {role: [] for role in ROLES}
        self._entries: dict[Path, tuple[int, list[Entry]]] = {}  # and how much of each file was read

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for role in list(self._running):
            self.kill(role)

    # Processes --------------------------------------------------------------------------------------------------

    def start(self, *roles: str, **options: Any) -> "Crew":
        """Start these workers, all if none is named; the options are those of `_start`."""
        for role in roles or ROLES:
            self._start(role, **options)
        return self

    def _start(
        self,
        role: str,
        *,
        url: str | None = None,
        state: Path | None = None,
        job: Path | None = None,
        threads: int = 1,
        log_level: str = "debug",
        words: tuple[str, ...] = (),  # more of its command
        prepare: tuple[Callable[..., None], Any] | None = None,  # called in the worker's process before it begins
    ) -> None:
        assert role not in self._running, f"{role} runs already"
        party = () if role == "scheduler" else ("--party", str(self.folder / f"{role}.toml"))
        arguments = ("--job", str(job or self.job), *party, "--state", str(state or self.states / role), *words)
        environ = {"SL_QUEUE_BROKER": url or self.url, "SL_QUEUE_THREADS": str(threads), "SL_QUEUE_LOG": log_level}
        environ["SL_QUEUE_EVENTS"] = str(self.events_file(role, self._starts[role] + 1))
        if SEALED:
            environ["SL_QUEUE_KEY"] = str(self.folder / KEYS / role / "seal.key")
        self._starts[role] += 1
        log = self.log_file(role)
        log.touch()
        process = fork(_work, role, arguments, environ, log, prepare)
        self._running[role] = process
        self._pids[role].append(process.pid)

    def pid(self, role: str) -> int:
        """Return the process id of one that runs; another thread may ask before `start` has noted it."""
        await_that(lambda: role in self._running, f"{role} does not run")
        return int(self._running[role].pid)

    def kill(self, role: str) -> None:
        """SIGKILL, also for one that is frozen or has ended by itself."""
        process = self._running.pop(role)
        process.kill()
        process.join(WAIT_S)

    def disown(self, role: str) -> Any:
        """Its process, which another one of that role may now replace; killed when this test process ends."""
        return self._running.pop(role)

    def signal(self, role: str, number: signal.Signals) -> None:
        os.kill(self.pid(role), number)

    def wait(self, role: str, timeout_s: float = WAIT_S) -> int:
        """Wait for a worker that ends by itself; returns its exit code."""
        process = self._running[role]
        process.join(timeout_s)
        assert process.exitcode is not None, f"{role} did not end within {timeout_s} s:\n{self.tail(role)}"
        del self._running[role]
        return int(process.exitcode)

    def finish(self, *roles: str, timeout_s: float = WAIT_S) -> None:
        """Wait until these workers, all if none is named, have ended well."""
        deadline = time.monotonic() + timeout_s
        for role in roles or tuple(self._running):
            code = self.wait(role, max(0.1, deadline - time.monotonic()))
            assert code == 0, f"{role} exited {code}:\n{self.tail(role)}"

    def restart_until_done(self, restart: Mapping[str, dict[str, Any]], timeout_s: float = WAIT_S) -> dict[str, int]:
        """Start whoever was killed again, as a supervisor does, until all have ended well; how often each was."""
        deadline = time.monotonic() + timeout_s
        again = dict.fromkeys(ROLES, 0)
        while self._running:
            assert time.monotonic() < deadline, "\n".join(self.tail(role) for role in self._running)
            for role, process in list(self._running.items()):
                if process.exitcode is None:
                    continue
                code = self.wait(role)
                if code in (-signal.SIGKILL, 75):
                    again[role] += 1
                    self._start(role, **restart.get(role, {}))
                else:
                    assert code == 0, f"{role} exited {code}:\n{self.tail(role)}"
            time.sleep(0.01)
        return again

    # What they say ----------------------------------------------------------------------------------------------

    def log_file(self, role: str, start: int | None = None) -> Path:
        """Return the log of the newest process of a role, or of an earlier one, counted from 1."""
        return self.folder / f"{role}-{start or self._starts[role]}.log"

    def events_file(self, role: str, start: int | None = None) -> Path:
        """Return the events of a process of a role, as `log_file`."""
        return self.folder / f"{role}-{start or self._starts[role]}.events"

    def events(self, role: str) -> list[Event]:
        """Return the events of the newest process of a role so far."""
        return events_in(self.events_file(role))

    def log(self, role: str) -> str:
        """Return what the newest process of a role has logged so far."""
        return self.log_file(role).read_text(errors="replace")

    def tail(self, role: str) -> str:
        return f"--- {role}\n" + "\n".join(self.log(role).splitlines()[-15:])

    def await_log(self, role: str, text: str, timeout_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.log(role):
            assert time.monotonic() < deadline, f"{role} did not say {text!r}:\n{self.tail(role)}"
            time.sleep(0.005)

    def await_step(self, role: str, step: int, timeout_s: float = WAIT_S) -> None:
        """Until the newest process of a role has done that step or a later one."""
        deadline = time.monotonic() + timeout_s
        while max(self.steps(role)[-1], default=-1) < step:
            assert time.monotonic() < deadline, f"{role} did not do step {step}:\n{self.tail(role)}"
            time.sleep(0.005)

    def await_first_step(self, role: str) -> None:
        """Until the newest process of a role has done a step, whichever."""
        self.await_step(role, 0)

    def steps(self, role: str) -> list[list[int]]:
        """Return the steps that each process of a role has done, in order."""
        processes = self.run_log(role).processes(role)
        return [[step for step, _ in process.steps] for process in processes]

    def run_log(self, *roles: str) -> RunLog:
        """Read the events of all processes of these roles so far."""
        run_log = RunLog()
        for role in roles or ROLES:
            for start, pid in enumerate(self._pids[role], 1):
                run_log.start(role, pid)
                for entry in self._read(self.events_file(role, start)):
                    run_log.take(entry)
        return run_log

    def _read(self, path: Path) -> list[Entry]:
        """Read on in a file of events, which who waits for a step looks at many times a second; returns all of it."""
        size, found = self._entries.setdefault(path, (0, []))
        if path.exists() and path.stat().st_size > size:
            with path.open("rb") as file:
                file.seek(size)
                whole = file.read().rpartition(b"\n")[0]
            found += entries(whole.decode())
            self._entries[path] = (size + len(whole), found)
        return found

    def generation(self) -> int:
        """Return how often everybody went back to a common checkpoint, as the scheduler has it on disk."""
        state = json.loads((self.states / "scheduler" / "run.json").read_text())["state"]
        return len(state["bases"])

    def weights(self) -> dict[str, str]:
        return sums(self.states)

    def checkpoints(self, role: str) -> list[Path]:
        """Oldest first."""
        return sorted((self.states / role / "checkpoints").glob("step-*.safetensors"))


def _work(
    role: str,
    arguments: tuple[str, ...],
    environ: Mapping[str, str],
    log: Path,
    prepare: tuple[Callable[..., None], Any] | None,
) -> None:
    """Become a worker."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environ)
    sys.argv = [role, *arguments]
    if prepare is not None:
        act, argument = prepare
        act(argument)
    from workers.entry import main

    main(MODULES[role])  # type: ignore[arg-type]


# What can be prepared in a worker's process --------------------------------------------------------------------------


def die_at(point: tuple[str, int]) -> None:
    """SIGKILL at the n-th time that a file operation of a commit is about to happen: Python's own audit events."""
    name, count = point
    left = [count]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _is_at(name, event, arguments):
            return
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _is_at(name: str, event: str, arguments: tuple[Any, ...]) -> bool:
    match name:
        case "before the temp file":
            return event == "open" and str(arguments[0]).endswith(".tmp")
        case "before the rename":
            return event == "os.rename" and str(arguments[0]).endswith(".tmp")
        case "after the rename":  # write_durably opens the folder to sync it
            flags = arguments[2] if event == "open" else 0
            return event == "open" and isinstance(flags, int) and bool(flags & os.O_DIRECTORY)
        case "before a line of history":
            flags = arguments[2] if event == "open" else 0
            appended = event == "open" and isinstance(flags, int) and bool(flags & os.O_RDWR)
            return appended and str(arguments[0]).endswith("history.jsonl")
        case _:
            raise ValueError(name)


def obey_rights(_: object) -> None:
    """Root may write anywhere; give up that privilege."""
    version, pid, nothing = 0x20080522, 0, 0
    header = struct.pack("Ii", version, pid)
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, struct.pack("6I", *[nothing] * 6)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def limit_file_size(size_bytes: int) -> None:
    """As on a full disk, every write beyond this size fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


@cache
def quiet_weights() -> dict[str, str]:
    """Return the weights of the job when nothing goes wrong: over memory, in this process."""
    with TemporaryDirectory(prefix="sl_queue-quiet-") as folder:
        job = write_job(Path(folder))
        files = [PartyFile.load(Path(folder) / name) for name in FILES]
        run_local(Job.load(job), files, out=Path(folder) / "states")
        return sums(Path(folder) / "states")

"""Keep worker processes running: restart those that were killed or lost the broker, end all for any other reason.

A worker that crashes again and again without committing a further step is given up. Every child dies with its parent,
even with a parent that was killed.
"""

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sl_queue.config.environment import PARENT
from sl_queue.errors import PeerFailed, SlQueueError, TransportError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Worker:
    """A process to keep running until it exits 0."""

    name: str
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)  # besides what all workers get
    helps: bool = False  # others: it is not waited for when they have ended


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of supervision: how long it waits, how often it restarts."""

    first_pause_s: float = 1.0  # before the second restart at the same step; doubled for every further one
    longest_pause_s: float = 15.0
    crashes: int = 6  # at the same step, then it is given up
    grace_s: float = 10.0  # for the others to end by themselves after a failure, and after SIGTERM


@dataclass(frozen=True, slots=True)
class Failure:
    """Reason why everything was ended."""

    worker: str
    exit_code: int
    reason: str


@dataclass(slots=True)
class _Child:  # mutable: a worker's process changes with every restart
    worker: Worker
    process: subprocess.Popen[str] | None = None  # None: ended, or waiting for its restart
    restart_at: float | None = None
    crashes: int = 0
    step: int | None = None  # committed when it crashed last
    pid: int = 0  # of its newest process
    last_line: str = ""


def supervise(
    workers: Sequence[Worker],
    environ: Mapping[str, str],
    on_line: Callable[[str, str], None],
    step_of: Callable[[str], int | None],
    limits: Limits = Limits(),
    on_start: Callable[[str, int], None] = lambda worker, pid: None,
    reason_of: Callable[[int], str | None] = lambda pid: None,
) -> Failure | None:
    """Run all workers until each has exited 0 (None), or one has failed for good.

    Call from the main thread: children die with the thread that started them. `on_line(worker, line)` is called on
    other threads with every line a worker writes; `step_of(worker)` is the last step it is known to have committed;
    `on_start(worker, pid)` is called for every process before any of its lines; `reason_of(pid)` is the error with
    which a process ended, if it is known: else its last line is the reason.
    However this returns or raises, no child is left; they are ended in the given order.
    """
    return _Supervisor(workers, environ, on_line, step_of, limits, on_start, reason_of).run()


class _Supervisor:  # mutable: it owns processes
    def __init__(
        self,
        workers: Sequence[Worker],
        environ: Mapping[str, str],
        on_line: Callable[[str, str], None],
        step_of: Callable[[str], int | None],
        limits: Limits,
        on_start: Callable[[str, int], None],
        reason_of: Callable[[int], str | None],
    ) -> None:
        self._children = [_Child(worker) for worker in workers]
        self._environ = {**environ, PARENT.name: str(os.getpid())}
        self._on_line = on_line
        self._step_of = step_of
        self._limits = limits
        self._on_start, self._reason_of = on_start, reason_of
        self._ended: queue.Queue[tuple[_Child, int]] = queue.Queue()

    def run(self) -> Failure | None:
        try:
            for child in self._children:
                self._start(child)
            while any(child.process or child.restart_at for child in self._children if not child.worker.helps):
                failure = self._step()
                if failure is not None:
                    return self._await_others(failure)
            return None
        finally:
            self._end_all()

    def _step(self) -> Failure | None:
        """Wait for the next event, an exit or a restart that is due, and act on it."""
        due = [child.restart_at for child in self._children if child.restart_at is not None]
        try:
            child, code = self._ended.get(timeout=max(0.0, min(due) - time.monotonic()) if due else None)
        except queue.Empty:
            now = time.monotonic()
            for waiting in self._children:
                if waiting.restart_at is not None and waiting.restart_at <= now:
                    self._start(waiting)
            return None
        if child.process is not None:
            _signal(child.process, signal.SIGKILL)  # whatever it may have left in its group
        child.process = None
        if code == 0:
            return None
        if not _worth_a_restart(code):
            return Failure(child.worker.name, code, self._reason(child))
        return self._restart_later(child, code)

    def _reason(self, child: _Child) -> str:
        return self._reason_of(child.pid) or child.last_line or "it said nothing"

    def _restart_later(self, child: _Child, code: int) -> Failure | None:
        step = self._step_of(child.worker.name)
        child.crashes = child.crashes + 1 if step == child.step else 1
        child.step = step
        if child.crashes >= self._limits.crashes:
            where = "before its first commit" if step is None or step < 0 else f"after step {step}"
            loop = f"ended {child.crashes} times in a row {where} ({_ending(code)}): {self._reason(child)}"
            error = TransportError if code == TransportError.exit_code else SlQueueError
            return Failure(child.worker.name, error.exit_code, loop)
        pause_s = self._pause_s(child.crashes)
        child.restart_at = time.monotonic() + pause_s
        self._on_line(child.worker.name, f"{_ending(code)}; restarting in {pause_s:g} s")
        return None

    def _pause_s(self, crashes: int) -> float:
        """Return the pause before a restart: none for a worker that got further since it crashed last."""
        if crashes == 1:
            return 0.0
        return min(self._limits.first_pause_s * 2.0 ** (crashes - 2), self._limits.longest_pause_s)

    def _start(self, child: _Child) -> None:
        child.restart_at = None
        child.last_line = ""
        process = subprocess.Popen(
            child.worker.command,
            env={**self._environ, **child.worker.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children in order
        )
        child.process, child.pid = process, process.pid
        self._on_start(child.worker.name, process.pid)
        reader = threading.Thread(target=self._read, args=(child, process), daemon=True)
        reader.start()
        threading.Thread(target=self._watch, args=(child, process, reader), daemon=True).start()

    def _read(self, child: _Child, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                text = line.rstrip()
                if not text:
                    continue
                child.last_line = text
                self._on_line(child.worker.name, text)

    def _watch(self, child: _Child, process: subprocess.Popen[str], reader: threading.Thread) -> None:
        code = process.wait()
        reader.join(timeout=1.0)  # longer only if a grandchild holds the pipe
        self._ended.put((child, code))

    def _await_others(self, failure: Failure) -> Failure:
        """Give the others the time to end by themselves; returns the failure of the worker that ended them.

        The scheduler stops the run at every party with the reason, and these may be gone before the one that failed.
        """
        deadline = time.monotonic() + self._limits.grace_s
        while any(child.process for child in self._children) and time.monotonic() < deadline:
            try:
                child, code = self._ended.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            child.process = None
            own = code not in (0, PeerFailed.exit_code) and not _worth_a_restart(code)
            if own and failure.exit_code == PeerFailed.exit_code:
                failure = Failure(child.worker.name, code, self._reason(child))
        return failure

    def _end_all(self) -> None:
        for child in self._children:
            if child.process is not None:
                _signal(child.process, signal.SIGTERM)
                try:
                    child.process.wait(self._limits.grace_s)
                except subprocess.TimeoutExpired:
                    pass
                _signal(child.process, signal.SIGKILL)  # the whole group: what the worker itself may have started
                child.process.wait()


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _worth_a_restart(code: int) -> bool:
    """Return True for a signal (as the kernel says it, or as a shell or container does), or no way to the broker."""
    return code < 0 or code > 128 or code == TransportError.exit_code


def _ending(code: int) -> str:
    number = -code if code < 0 else code - 128
    try:
        return f"ended by {signal.Signals(number).name}"
    except ValueError:
        return f"exited with {code}"


def die_with_parent() -> None:
    """End this process when the one that supervises it is gone, however that ended. Linux; elsewhere nothing."""
    parent = PARENT.read()
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the kernel was asked
        os._exit(128 + signal.SIGKILL)

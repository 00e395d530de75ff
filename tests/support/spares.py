"""Workers that a command starts, forked instead of started: `sl-queue local` needs a second of computing less for each.

Before the command begins, it forks processes that wait, from one with everything loaded and a single thread. When it
then starts `python -m workers.…`, one of them becomes that worker: a child of the command with its own process id,
session, streams, environment and command line, to be signalled, frozen, killed and waited for as any other. When all
have been used, workers are started as a user's are; and wherever the installed command itself is run, always.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

COUNT = 24  # as many as the longest story of kills uses; each costs 25 ms of computing, used or not
FEW = 8  # for a command that kills nobody itself
LONGEST = 1 << 16
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Become = Callable[[list[str]], None]


class Spares:
    """Processes that wait to become workers. Mutable: it uses them up."""

    def __init__(self, become: Become, count: int = COUNT) -> None:
        self._waiting: list[tuple[int, socket.socket]] = []
        for _ in range(count):
            self._waiting.append(self._spare(become))

    def use(self, words: list[str], environ: dict[str, str], own_session: bool, streams: list[int]) -> int | None:
        """Have one become this worker, with these streams; returns its process id, or None if there is none left."""
        if not self._waiting:
            return None
        pid, line = self._waiting.pop(0)
        with line:
            socket.send_fds(line, [json.dumps([words, environ, own_session, str(Path.cwd())]).encode()], streams)
        return pid

    def _spare(self, become: Become) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            for line in (ours, *(line for _, line in self._waiting)):
                line.close()
            _wait(theirs, become)
        theirs.close()
        return pid, ours


def _wait(line: socket.socket, become: Become) -> NoReturn:
    """Wait for what to become; end with the command if it needs no more workers."""
    code = 70
    try:
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        told, streams, _, _ = socket.recv_fds(line, LONGEST, 3)
        line.close()
        if not told:
            os._exit(0)
        prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
        words, environ, own_session, cwd = json.loads(told)
        _dress(words, environ, own_session, cwd, streams)
        become(words[2:])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # wait for its threads, as the interpreter does
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _dress(words: list[str], environ: dict[str, str], own_session: bool, cwd: str, streams: list[int]) -> None:
    """Take on the streams, the session, the environment, the folder and the command line of the worker."""
    if own_session:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, "r", closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, closefd=False)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    _show(words)


def _show(words: list[str]) -> None:
    """Write the words over the command line that the kernel shows of this process."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5), counted from the state
    shown = b"".join(word.encode() + b"\0" for word in words)
    assert len(shown) <= end - begin, "the command line of the process that forks is too short for a worker's"
    ctypes.memmove(begin, shown.ljust(end - begin, b"\0"), end - begin)


def use_for_workers(spares: Spares) -> None:
    """Have the workers that this process starts be forked."""

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def _execute_child(self, args: Any, *more: Any) -> None:
            """Start a process, as the base does; `more`: as Python 3.11 to 3.14 pass them."""
            cwd, env, pipes, own_session = more[4], more[5], more[9:15], more[19]
            if _is_worker(args) and cwd is None and env is not None:
                streams = [pipes[0], pipes[3], pipes[5]]  # the child's ends
                pid = spares.use(list(args), dict(env), bool(own_session), streams)
                if pid is not None:
                    self.pid, self._child_created = pid, True
                    self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
                    return
            super()._execute_child(args, *more)  # type: ignore[misc]

    subprocess.Popen = Popen  # type: ignore[misc]


def _is_worker(words: Any) -> bool:
    return (
        isinstance(words, tuple | list)
        and list(words[:2]) == [sys.executable, "-m"]
        and words[2].startswith("workers.")
    )

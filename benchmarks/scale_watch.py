"""Processor seconds, memory and open files of a broker while others use it, as Linux and the broker count them."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sl_queue.testing.private_broker import PrivateBroker

FULL, LOOKED_AT = "full", "looked at"  # files by which who fills a broker waits until it has been looked at
POLL_S = 0.02
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def broker_pid(private: PrivateBroker) -> int:
    """Return the process of a broker."""
    return int(re.sub(r"\D", "", private.evaluate("os:getpid()")))


def cpu_of(pid: int) -> float:
    """Read the processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def memory_of(pid: int, name: str = "VmRSS:") -> int:
    """Read the memory of a process in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _files_of(pid: int) -> tuple[int, int]:
    """Count the open files of a process, and the sockets among them."""
    targets = []
    for link in os.scandir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # it has been closed meanwhile
            targets.append(os.readlink(link.path))
    return len(targets), sum(target.startswith("socket:") for target in targets)


@dataclass(slots=True)
class Seen:
    """Memory and files that a broker has more than before. Mutable while it is watched."""

    memory: float = 0.0
    files: int = 0
    sockets: int = 0


@contextmanager
def watched(private: PrivateBroker, pid: int, folder: Path) -> Iterator[Seen]:
    """Look at a broker's memory, as it counts it itself, and at its files, when the label holder says so."""
    seen, ended = Seen(), threading.Event()
    memory, (files, sockets) = _held_by(private), _files_of(pid)

    def watch() -> None:
        while not (folder / FULL).exists():
            if ended.wait(POLL_S):
                return
        now = _files_of(pid)
        seen.files, seen.sockets = now[0] - files, now[1] - sockets
        seen.memory = _held_by(private) - memory
        (folder / LOOKED_AT).touch()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _held_by(private: PrivateBroker) -> int:
    """Return the bytes of memory that a broker's data take."""
    return int(private.evaluate("erlang:memory(total)"))

"""Files of a state folder: after a crash either the old one or the new one, whole, and nobody's but their owner's."""

import errno
import json
import logging
import os
import platform
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from sl_queue.errors import CheckpointError, ResourceShortage, SlQueueError

PRIVATE = 0o600

T = TypeVar("T")

log = logging.getLogger("sl_queue")

_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS, errno.EINTR})


def write_durably(path: Path, body: bytes) -> None:
    """Write a temporary file, fsync, rename, fsync the folder. Raises OSError; then the old file is untouched."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE), "wb") as file:
            os.fchmod(file.fileno(), PRIVATE)  # a leftover of an earlier version keeps its mode
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Held(Exception):
    """A lock that another worker holds.

    `holder`: its process number, or "unknown"; `elsewhere`: it runs on another machine, or ran before this one was
    booted and is being replaced.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        holder, _, machine = text.partition(" ")
        self.holder = holder[:20] or "unknown"
        self.elsewhere = bool(machine) and machine != this_machine()


def this_machine() -> str:
    """Name this machine, as it was booted last: the same in all of its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def read_kept(path: Path, version: int, make: Callable[[Any], T]) -> T | None:
    """Read a JSON file of a state folder as what `make` makes of it; None if there is none.

    Raises CheckpointError, with the file's name, for another format or a file that cannot be used.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != version:
            raise CheckpointError(f"{path} has format {found['format']!r}, this version of sl_queue reads {version}")
        return make(found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be used ({type(error).__name__}); restore it") from None


def lock(folder: Path) -> FileLock:
    """Lock a folder for this process until `release`, or until the process ends in whatever way.

    Raises Held if another process, or another caller in this one, has it; OSError if its file cannot be used.
    """
    path = folder / "lock"
    taken = FileLock(path, blocking=False, mode=PRIVATE, thread_local=False, fallback_to_soft=False)
    try:
        taken.acquire()
    except Timeout:
        raise Held(path.read_text(errors="replace")[:100]) from None
    try:
        path.write_text(f"{os.getpid()} {this_machine()}")
    except OSError:
        taken.release()
        raise
    return taken


def is_passing(error: BaseException) -> bool:
    """Return True for a shortage of descriptors or memory, which says nothing of the file."""
    return isinstance(error, OSError) and error.errno in _PASSING


def unusable(folder: Path, error: OSError) -> SlQueueError:
    """Make the error of a state folder that cannot be used: a shortage is worth a restart, all else needs a person."""
    what = f"the state folder {folder} cannot be used: {error.strerror or error}; what was saved before is intact: "
    if is_passing(error):
        return ResourceShortage(
            f"{what}start the worker again, it resumes; if this repeats, raise its limit of open files or memory"
        )
    return CheckpointError(f"{what}make room or fix the permissions, then start the worker again")


def warn_of_readers(folder: Path) -> None:
    """Log that others on this machine may look into a folder that was there before; its mode is its owner's choice."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning(
            "the state folder %s may be read by others on this machine (mode %o): chmod 700 %s", folder, mode, folder
        )

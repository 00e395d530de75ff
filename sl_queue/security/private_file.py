"""Files that only their owner may read: private keys, and URLs with a password."""

import os
import stat
from pathlib import Path

from sl_queue.errors import JobError


def read_secret(path: Path, what: str, *, again: bool = False) -> bytes:
    """Read a file with a secret. Raises JobError if others on this machine may read it; OSError.

    A pipe (`/dev/fd/63` of a shell) has no other readers; it gives its contents once, so `again` is a JobError there.
    """
    if "\0" in str(path):
        raise JobError(f"{str(path)!r}: a path holds no NUL character")
    mode = path.stat().st_mode
    if again and not stat.S_ISREG(mode):
        raise JobError(f"{path}: not a file that can be read again")
    if os.name == "posix" and stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        shown_mode = f"{stat.S_IMODE(mode):o}"
        raise JobError(f"{path}: others may read this {what} (mode {shown_mode}); run: chmod 600 {path}")
    return path.read_bytes()

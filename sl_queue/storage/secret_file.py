"""The file with a party's secret: 32 random bytes that key its models' draws, so that no peer can repeat them.

It is as lasting as the checkpoints: a run goes on only with the secret that it was begun with.
"""

import os
import secrets
import stat
from pathlib import Path

from sl_queue.errors import CheckpointError, JobError
from sl_queue.storage.files import write_durably

NAME = "secret"  # in a party's state folder
SECRET_BYTES = 32


def read_secret(path: Path) -> bytes:
    """Read a secret. Raises JobError if there is none, or if others on this machine may read it."""
    try:
        mode, found = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise JobError(
            f"{path}: the secret of [privacy] cannot be read ({error.strerror}); make one with "
            f"`sl-queue key --private --out {path}`, or restore it if a run was begun with it"
        ) from None
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise JobError(f"{path}: others may read this secret (mode {stat.S_IMODE(mode):o}); run: chmod 600 {path}")
    if len(found) != SECRET_BYTES:
        raise JobError(
            f"{path}: a secret has {SECRET_BYTES} bytes, this file has {len(found)}; restore it, or make another with "
            "`sl-queue key --private`"
        )
    return found


def write_secret(path: Path) -> None:
    """Make a new secret that only its owner may read. Raises JobError rather than overwrite a file."""
    if path.exists():
        raise JobError(f"{path}: there is a file already; move it away first, or use it")
    try:
        _write(path)
    except OSError as error:
        raise JobError(f"{path}: the secret cannot be written ({error.strerror})") from None


def secret_in(state: Path) -> bytes:
    """Return the secret of a state folder that the caller has locked; made, and on disk, if there is none yet."""
    path = state / NAME
    if not path.exists():
        try:
            _write(path)
        except OSError as error:
            raise CheckpointError(
                f"the state folder {state} cannot be used: {error.strerror or error}; free space or fix permissions, "
                "then start the worker again"
            ) from error
    return read_secret(path)


def _write(path: Path) -> None:
    write_durably(path, secrets.token_bytes(SECRET_BYTES))

"""The file `ended.json` of a party's state folder: the error with which its last worker ended for good.

For a standby, which has the folder's lock as soon as a worker is gone: the lock does not say whether it was killed.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from sl_queue.errors import SlQueueError, TransportError, named
from sl_queue.storage.files import read_kept, write_durably

NAME = "ended.json"
FORMAT = 1


def note_end(state: Path, error: SlQueueError) -> None:
    """Note the error with which the worker that has locked the folder ends, unless a restart is worth its while."""
    if isinstance(error, TransportError):
        return
    body = json.dumps({"format": FORMAT, "error": type(error).__name__, "message": str(error)})
    with suppress(OSError):  # a disk that is full, for instance, which is the error
        write_durably(state / NAME, body.encode())


def read_end(state: Path) -> SlQueueError | None:
    """Return what was noted; None if the last worker was killed, or is to be started again."""

    def made(found: Any) -> SlQueueError:
        return named(found["error"])(found["message"])

    return read_kept(state / NAME, FORMAT, made)


def forget_end(state: Path) -> None:
    """Remove what was noted. Raises OSError."""
    (state / NAME).unlink(missing_ok=True)

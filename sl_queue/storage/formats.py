"""The version of what lies in a state folder, in every file that a later start reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sl_queue.errors import CheckpointError

FORMAT = 1  # as it is written; raised when an earlier sl_queue could not go on with it
OLDEST = 1  # that is read


def require_format(found: Mapping[str, Any], path: Path, remedy: str, default: int | None = None) -> None:
    """Raise CheckpointError naming both versions for a file that is of a format too new, too old, or unknown.

    `default` is the format of a file that does not say which one it is of.
    """
    version = found.get("format", default)
    if type(version) is int and OLDEST <= version <= FORMAT:
        return
    reads = f"format {FORMAT}" if OLDEST == FORMAT else f"formats {OLDEST} to {FORMAT}"
    raise CheckpointError(
        f"{path} was written by another version of sl_queue: it is of format {version!r:.20}, and this version reads "
        f"{reads}; install the version that wrote it, or {remedy}"
    )

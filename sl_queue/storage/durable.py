"""Writing a file so that after a crash it is either the old one or the new one, whole."""

import os
from pathlib import Path


def write_durably(path: Path, body: bytes, mode: int = 0o666) -> None:
    """Temp file, fsync, rename, fsync of the folder. Raises OSError; then the old file is untouched.

    `mode` is that of a new file, less the process's umask.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
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

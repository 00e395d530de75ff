"""`privacy.jsonl`: what a party has released, a line each, on disk before anything of it is sent, never taken back.

One copy lies in the state folder. Where the party's secret is a file of its own, another lies beside that, so that
runs in other folders, and a state folder that was deleted, count as well. Each is read, and missing lines are taken
from the other.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sl_queue.errors import CheckpointError
from sl_queue.protocol.releases import Release
from sl_queue.storage.files import PRIVATE, unusable

NAME = "privacy.jsonl"
SUFFIX = ".privacy.jsonl"  # of the copy beside a secret


class Ledger:
    """All copies of one party's releases. Mutable: it remembers what is in them."""

    def __init__(self, state: Path, secret: Path | None = None) -> None:
        self._paths = [state / NAME] + ([] if secret is None else [secret.with_name(f"{secret.name}{SUFFIX}")])
        self._known: dict[Path, set[Release]] = {}

    def releases(self) -> list[Release]:
        """Return every release of every copy, once. Raises CheckpointError for a file that is altered."""
        found: dict[Release, None] = {}
        for path in self._paths:
            with _using(path):
                body = path.read_bytes() if path.exists() else b""
            own = _parsed(body, path)
            self._known[path] = set(own)
            found |= dict.fromkeys(own)
        return list(found)

    def enter(self, release: Release) -> None:
        """Have a release in every copy, on disk. Nothing is done for one that is there."""
        if not self._known:
            self.releases()
        for path in self._paths:
            if release not in self._known[path]:
                self._append(path, release)
                self._known[path].add(release)

    def _append(self, path: Path, release: Release) -> None:
        line = json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), **release.line()})
        with _using(path):
            is_new = not path.exists()
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # two runs may share a secret
                body = file.read()
                file.seek(body.rfind(b"\n") + 1)  # a line that a crash tore was followed by no message
                file.truncate()
                file.write(f"{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)


@contextmanager
def _using(path: Path) -> Iterator[None]:
    """Turn an error of the system into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise unusable(path.parent, error) from error


def _parsed(body: bytes, path: Path) -> list[Release]:
    """Read whole lines; the last may be torn, and nothing was sent for it."""
    found = []
    for number, line in enumerate(body[: body.rfind(b"\n") + 1].splitlines(), 1):
        try:
            found.append(Release.of_line(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}, line {number} cannot be read ({type(error).__name__}): it holds what was released so far, "
                "and no budget can be kept without it; restore the file"
            ) from None
    return found

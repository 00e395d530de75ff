"""A run's history on disk: one JSON line an epoch, appended to.

The law: an epoch costs one line, however many there were; what was written before is touched only where a run went
back, and a line that a crash tore is cut off before the next one is written.
"""

import json
import os
from array import array
from pathlib import Path

from sl_queue.protocol.history import History
from sl_queue.protocol.scheduler.state import history_line, result_of
from sl_queue.storage.files import PRIVATE, unusable


class HistoryFile:
    """One file of epochs. Mutable: it remembers what is in the file, and where each line ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = History()
        self._ends = array("Q")  # bytes up to the end of each line
        self._size: int | None = None  # None: not looked at yet

    def load(self) -> History:
        """Read the epochs that are whole and follow one another. Raises OSError."""
        self._written, self._ends = History(), array("Q")
        body = self._path.read_bytes() if self._path.exists() else b""
        self._size, end = len(body), 0
        for line in body.splitlines(keepends=True):
            try:
                result = result_of(json.loads(line))
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n") or (self._written and result.epoch != self._written[-1].epoch + 1):
                break
            end += len(line)
            self._written = self._written.after(result)
            self._ends.append(end)
        return self._written

    def write(self, history: History) -> None:
        """Have the file hold these epochs and no others, durably. Raises OSError; then it holds the first of them."""
        if self._size is None:
            self.load()
        common = history.in_common(self._written)
        end = self._ends[common - 1] if common else 0
        if common == len(history) and end == self._size:
            self._written = history
            return
        self._written = history.first(common)
        del self._ends[common:]
        lines = [f"{json.dumps(history_line(result))}\n".encode() for result in history[common:]]
        self._size = self._replace(end, b"".join(lines))
        for line in lines:
            end += len(line)
            self._ends.append(end)
        self._written = history

    def _replace(self, start: int, body: bytes) -> int:
        """Write `body` from byte `start` on, and nothing after it; returns the size of the file."""
        is_new, self._size = not self._path.exists(), None
        with os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, PRIVATE), "r+b") as file:
            file.truncate(start)
            file.seek(start)
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return start + len(body)


class Journal:
    """The label holder's own history. Mutable as the file that it is."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, HistoryFile(path)

    def load(self) -> History:
        """Read the epochs that are whole and follow one another. Raises as `unusable`."""
        try:
            return self._file.load()
        except OSError as error:
            raise unusable(self._path.parent, error) from None

    def write(self, history: History) -> None:
        """Have the file hold these epochs and no others, durably. Raises as `unusable`."""
        try:
            self._file.write(history)
        except OSError as error:
            raise unusable(self._path.parent, error) from None

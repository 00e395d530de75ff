"""Digests of the columns of a table as they come, one at a time.

A wide table has one digest of all its rows, in which the columns are side by side. Until all columns are there they
wait in a file without a name, so that memory holds a few rows of them and not the table.
"""

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from sl_queue.protocol.digests import digest_begun, digest_of
from sl_queue.protocol.fingerprints import ONE_BY_ONE

_PART_BYTES = 2**22  # of the rows that are put side by side at a time


@dataclass(slots=True)
class ColumnDigests:
    """Digests of each column, or of all together if there are more than ONE_BY_ONE. Mutable: columns are added to it.

    `folder`: for the file of a wide table; None: that for temporary files. All of it raises OSError.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    folder: Path | None = None
    _each: list[str] = field(init=False, default_factory=list)
    _file: BinaryIO | None = field(init=False, default=None, repr=False)
    _open: ExitStack = field(init=False, default_factory=ExitStack, repr=False)

    def __enter__(self) -> Self:
        if self.shape[1] > ONE_BY_ONE:
            self._file = self._open.enter_context(tempfile.TemporaryFile(prefix="sl_queue-table-", dir=self.folder))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._open.close()

    def add(self, values: npt.NDArray[Any]) -> None:
        """Add the next column."""
        body = np.ascontiguousarray(values, self._little).data
        if self._file is None:
            self._each.append(digest_of(body))
        else:
            self._file.write(body)

    def found(self) -> tuple[str, ...]:
        """Return the digests, once all columns are there."""
        return tuple(self._each) if self._file is None else (self._together(self._file),)

    def _together(self, file: BinaryIO) -> str:
        file.flush()
        (rows, width), item, digest = self.shape, self._little.itemsize, digest_begun()
        part = max(1, _PART_BYTES // (width * item))
        for first in range(0, rows, part):
            block = np.empty((width, min(part, rows - first)), self._little)
            for place, values in enumerate(block):
                if os.preadv(file.fileno(), [values.data], (place * rows + first) * item) != values.nbytes:
                    raise OSError("a column is shorter than it was")
            digest.update(np.ascontiguousarray(block.T).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def _little(self) -> np.dtype[Any]:
        return self.dtype.newbyteorder("<")

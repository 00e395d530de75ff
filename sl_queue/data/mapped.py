"""Numbers of a table in a file that is mapped into memory: the system keeps in memory what is used, and drops the rest.

They are written column by column, as [features] makes them, and then turned into rows, a part at a time: both ways the
disk is used in order. The file has no name any more once it is mapped, so that it goes with the process.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from sl_queue.data.spec import FileSpec, TableSpec

_PART_BYTES = 2**24  # of the rows that are turned at a time


def scratch_of(spec: TableSpec) -> Path | None:
    """Return the folder for the numbers of a table that is to be mapped; None for one that lies in memory."""
    if not isinstance(spec.data, FileSpec) or not spec.data.mapped:
        return None
    return spec.scratch or Path(tempfile.gettempdir())


@dataclass(slots=True)
class MappedColumns:
    """An array in a file without a name. Mutable: it is written to, and then read by row."""

    folder: Path
    _file: BinaryIO = field(init=False, repr=False)
    _columns: npt.NDArray[Any] = field(init=False, repr=False)

    def __enter__(self) -> Self:
        self._file = self._unnamed()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._file.close()

    def _unnamed(self) -> BinaryIO:
        return tempfile.TemporaryFile(prefix="sl_queue-table-", dir=self.folder)

    def columns(self, shape: tuple[int, int], dtype: Any) -> npt.NDArray[Any]:
        """Return an array of zeros (rows, columns) whose columns are contiguous in the file."""
        rows, width = shape
        self._columns = _mapped(self._file, (width, rows), dtype).T
        return self._columns

    def by_row(self) -> npt.NDArray[Any]:
        """Return what was written with contiguous rows, mapped from a file of its own."""
        with self._unnamed() as file:
            found = _mapped(file, self._columns.shape, self._columns.dtype)
            part = max(1, _PART_BYTES // max(1, self._columns.shape[1] * self._columns.itemsize))
            for first in range(0, len(found), part):
                found[first : first + part] = self._columns[first : first + part]
        return found


def _mapped(file: BinaryIO, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    if not all(shape):
        return np.zeros(shape, dtype)
    return np.asarray(np.memmap(file, dtype, "w+", shape=shape))

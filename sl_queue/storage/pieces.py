"""Pieces of a prediction's outputs on disk: one file for each commit, whole or not there."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sl_queue.errors import CheckpointError
from sl_queue.storage.files import unusable, write_durably

_PREFIX: Final = "rows-"


@dataclass(frozen=True, slots=True)
class PieceFolder:
    """compute.predicting.Pieces in a folder."""

    path: Path

    def write(self, first_row: int, outputs: npt.NDArray[Any]) -> None:
        """Write durably the outputs of the rows from `first_row` on; once more, it replaces the same piece."""
        body = io.BytesIO()
        np.save(body, outputs, allow_pickle=False)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durably(self.path / f"{_PREFIX}{first_row:012d}.npy", body.getvalue())
        except OSError as error:
            raise unusable(self.path, error) from error

    def read(self, n_rows: int) -> npt.NDArray[Any]:
        """Return the outputs of all rows, shape (n_rows, *outputs). Raises CheckpointError if a piece is missing."""
        found: list[npt.NDArray[Any]] = []
        next_row = 0
        for path in sorted(self.path.glob(f"{_PREFIX}*.npy")):
            first_row = int(path.stem.removeprefix(_PREFIX))
            if first_row > next_row:
                break
            piece: npt.NDArray[Any] = np.load(path, allow_pickle=False)[next_row - first_row :]
            found.append(piece)
            next_row += len(piece)
        if next_row != n_rows:
            raise CheckpointError(
                f"{self.path} holds outputs of {next_row} of {n_rows} rows; remove the folder and predict again"
            )
        return np.concatenate(found)

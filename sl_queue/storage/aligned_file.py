"""The file `aligned.json` of a party's state folder: which of its rows all parties hold."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sl_queue.errors import CheckpointError
from sl_queue.storage.files import read_kept, unusable, write_durably

NAME = "aligned.json"
FORMAT = 1
_PART = 10_000  # positions that are Python numbers at a time


@dataclass(frozen=True, slots=True)
class Aligned:
    """The outcome of an alignment at one party."""

    positions: npt.NDArray[np.int64] = field(repr=False)  # of the shared rows in the own canonical order, ascending
    table: str  # the digest of the own ids that were aligned
    rows: int  # how many there were
    session: str

    def require(self, table: str, where: str) -> None:
        """Raise CheckpointError if the own ids are no longer those that were aligned."""
        if self.table != table:
            raise CheckpointError(
                f"{where}: the table's ids differ from those that were aligned; restore the table, or give "
                "every party and the scheduler a new state folder to align and train from scratch"
            )


def read_aligned(state: Path) -> Aligned | None:
    """Read the outcome; None if there is none yet. Raises CheckpointError for a file that cannot be used."""

    def made(found: Any) -> Aligned:
        return Aligned(np.array(found["positions"], np.int64), found["table"], found["rows"], found["session"])

    return read_kept(state / NAME, FORMAT, made)


def write_aligned(state: Path, aligned: Aligned) -> None:
    """Have the outcome on disk. Raises CheckpointError, ResourceShortage."""
    found = {"format": FORMAT, "rows": aligned.rows, "shared": len(aligned.positions), "table": aligned.table}
    head = json.dumps({**found, "session": aligned.session, "positions": []}).removesuffix("]}").encode()
    firsts = range(0, len(aligned.positions), _PART)
    parts = [", ".join(map(str, aligned.positions[at : at + _PART].tolist())).encode() for at in firsts]
    try:
        write_durably(state / NAME, b"".join((head, b", ".join(parts), b"]}")))
    except OSError as error:
        raise unusable(state, error) from error

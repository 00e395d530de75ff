"""The file `held_out.json` of a party's state folder: rows that the label holder chose, where it chooses them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sl_queue.errors import CheckpointError
from sl_queue.protocol.holdout import Chosen
from sl_queue.storage.files import read_kept, unusable, write_durably

NAME = "held_out.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """A choice of rows, and whom the label holder has told of it."""

    rows: str  # digest of the ids of all rows
    chosen: Chosen = field(repr=False)
    told: tuple[str, ...] = ()  # parties that have it on disk; only at the label holder

    def require(self, rows: str, where: str) -> None:
        """Raise CheckpointError if the own rows are not those among which was chosen."""
        if self.rows != rows:
            raise CheckpointError(
                f"{where}: its rows differ from those of which some were held out; restore the table, or give every "
                "party and the scheduler a new state folder to train from scratch"
            )


def read_held_out(state: Path) -> HeldOut | None:
    """Read the choice; None if there is none yet. Raises CheckpointError for a file that cannot be used."""

    def made(found: Any) -> HeldOut:
        held_out, test = (np.array(found[name], np.int64) for name in ("held_out", "test"))
        return HeldOut(str(found["rows"]), Chosen(held_out, test), tuple(map(str, found["told"])))

    return read_kept(state / NAME, FORMAT, made)


def chosen_before(state: Path) -> Chosen | None:
    """Return the rows that were chosen in this state folder, by whoever does; None if none were."""
    held = read_held_out(state)
    return None if held is None else held.chosen


def write_held_out(state: Path, held: HeldOut) -> None:
    """Have the choice on disk. Raises CheckpointError, ResourceShortage."""
    positions = {"held_out": held.chosen.held_out.tolist(), "test": held.chosen.test.tolist()}
    body = json.dumps({"format": FORMAT, "rows": held.rows, "told": list(held.told), **positions})
    try:
        write_durably(state / NAME, body.encode())
    except OSError as error:
        raise unusable(state, error) from error

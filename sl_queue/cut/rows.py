"""The rows of one micro-batch, as both sides of the cut know them."""

from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from sl_queue.protocol.schedule.row_order import Positions

RowKeys = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class CutRows:
    """Rows in the order in which they cross, by the secret keyed hash of each id; the same at every party."""

    keys: RowKeys = field(repr=False)
    digest: bytes
    held_out: bool = False  # forwarded in evaluation mode, and answered with no gradient

    @classmethod
    def of(cls, keys: RowKeys, positions: Positions, *, held_out: bool = False) -> "CutRows":
        """Take these positions of a table's row keys."""
        taken = keys[positions]
        return cls(taken, blake2b(taken.tobytes(), digest_size=8).digest(), held_out)

    @property
    def told(self) -> str:
        """Return what errors add to the place of a micro-batch."""
        return " (held-out rows)" if self.held_out else ""

    def __len__(self) -> int:
        return len(self.keys)

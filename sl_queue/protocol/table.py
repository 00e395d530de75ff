"""A party's own rows, in the order in which every party has them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sl_queue.protocol.fingerprints import BY_POSITION
from sl_queue.protocol.holdout import Chosen


@dataclass(frozen=True, slots=True, eq=False)
class Narrowed:
    """The numbers of a table before they became float32: in the dtype that holds what its file says."""

    dtype: np.dtype[Any]
    digests: tuple[str, ...]  # of each column in that dtype; of more than ONE_BY_ONE columns that of all rows
    rounded: Mapping[str, int]  # rows with whole numbers that float32 rounds, by what has them: "column 'age'"
    exact: Callable[[], npt.NDArray[Any]] = field(repr=False)  # reads them again, for a model of another dtype


@dataclass(frozen=True, slots=True)
class Table:
    """A party's own rows in canonical order (ascending id); nothing of it is ever sent."""

    features: npt.NDArray[Any] | None = field(repr=False)  # (rows, *anything); None: the label holder has labels only
    labels: npt.NDArray[Any] | None = field(repr=False)  # (rows,) or (rows, *anything)
    row_keys: npt.NDArray[np.uint64] = field(repr=False)  # a secret keyed hash of each id, the same at every party
    digest: str  # of all ids; what parties compare when they join, hexadecimal
    id_type: str  # "integer" or "text"
    columns: tuple[str, ...] | None = None  # the names of the features, in order, where they have any
    hashes: npt.NDArray[np.uint64] | None = field(default=None, repr=False)  # of the ids, to choose held-out rows by
    notes: tuple[str, ...] = ()  # what a person should know of how the table was read; no values
    tokens: npt.NDArray[np.uint64] | None = field(default=None, repr=False)  # of the ids, by a key of this party alone
    truth: npt.NDArray[Any] | None = field(default=None, repr=False)  # the labels, where others stand in their place
    weights: npt.NDArray[Any] | None = field(default=None, repr=False)  # (rows,): how much each counts; None: all alike
    chosen: Chosen | None = None  # rows that the label holder chose to hold out or for a test; None: their ids choose
    fitted: str | None = field(default=None, repr=False)  # JSON: what [features] learned of the training rows
    narrowed: Narrowed | None = (
        None  # what the features were before they became float32, where they were something else
    )

    @property
    def n_rows(self) -> int:
        return len(self.row_keys)

    @property
    def features_dtype(self) -> np.dtype[Any] | None:
        """The dtype that holds the numbers of the features as they were given."""
        if self.narrowed is not None:
            return self.narrowed.dtype
        return None if self.features is None else self.features.dtype

    def chosen_by(self, rules: int) -> npt.NDArray[np.uint64] | Chosen | None:
        """Return what chooses the held-out rows in a run of these rules; None: their positions."""
        if self.chosen is not None:
            return self.chosen
        return None if rules == BY_POSITION else self.hashes

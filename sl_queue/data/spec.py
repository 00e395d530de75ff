"""Specifications of a party's table, and the rows that may be given in its place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sl_queue.data.feature_specs import Spec
from sl_queue.ports import UserCode
from sl_queue.protocol.holdout import Chosen
from sl_queue.protocol.schedule.row_order import Hashes, Positions

FileKind = Literal["csv", "parquet", "arrow", "svmlight", "tag:value"]


def all_rows(n_rows: int, _: Hashes | Chosen | None) -> Positions:
    """Return the positions of all rows: none is held out."""
    return np.arange(n_rows)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A party's rows in any order, given in code or returned by the `source` of a party file.

    Arrays of NumPy, torch or Arrow, lists, and data frames of pandas or polars, without gaps. `features` may have any
    shape after the first axis; None for a label holder without a base model.
    """

    ids: Any = field(repr=False)  # (rows,): whole numbers or text, the same for the same sample at every party
    features: Any = field(default=None, repr=False)  # (rows, *anything); floating ones are cast to the model's dtype
    labels: Any = field(default=None, repr=False)  # (rows,) or (rows, *anything)
    weights: Any = field(default=None, repr=False)  # (rows,): how much each row counts in loss and metrics


@dataclass(frozen=True, slots=True)
class CsvSpec:
    """The dialect of a CSV file."""

    delimiter: str = ","
    encoding: str = "utf-8"
    decimal: str = "."
    thousands: str = ""
    missing: tuple[str, ...] = ()  # texts that stand for a gap, besides the usual
    delimiter_given: bool = False


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A table in a file with an id column, or a callable that returns Rows."""

    path: Path | None = None
    ids: tuple[str, ...] = ()  # the names of columns, which are one id together
    features: tuple[str, ...] | None = None  # None: all but id and label
    label: str | tuple[str, ...] | None = None
    id_type: Literal["text", "integer", "uuid"] | None = None
    source: Any = None  # module:callable, or the callable itself
    format: FileKind | None = None  # None: as the name of the file ends
    csv: CsvSpec = CsvSpec()
    exclude: tuple[str, ...] = ()  # names or patterns
    duplicates: Literal["refuse", "first"] = "refuse"
    weight: str | None = None  # of the column that says how much each row counts
    unseen: Literal["refuse", "other"] = "refuse"  # at prediction: what becomes of many categories unknown to training
    mapped: bool = False  # what [features] makes lies in a file that is mapped into memory
    set_aside: tuple[str, ...] = ()  # columns that choose rows, and are no features

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the label columns."""
        return (self.label,) if isinstance(self.label, str) else self.label or ()

    @property
    def taken(self) -> tuple[str, ...]:
        """The columns that are no features."""
        return (*self.ids, *self.labels, *([] if self.weight is None else [self.weight]), *self.set_aside)


@dataclass(frozen=True, slots=True)
class ByColumn:
    """Rows by their values in a column of the label holder: within bounds, or among some values."""

    column: str
    first: int | float | str | None = None  # text: a date in ISO 8601, or its beginning
    before: int | float | str | None = None
    values: tuple[str | int | float | bool, ...] | None = None


@dataclass(frozen=True, slots=True)
class Stratified:
    """The same share of the rows of each class."""

    share: float


Choice = float | ByColumn | Stratified  # a number: the share of all rows, by their ids


@dataclass(frozen=True, slots=True)
class Choices:
    """Choices of rows to hold out and for a test, by the label holder."""

    holdout: Choice
    test: Choice

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it looks at."""
        found = [each.column for each in (self.holdout, self.test) if isinstance(each, ByColumn)]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class TableSpec:
    """The table of one party, and what the job needs of it."""

    party: str
    data: FileSpec | Rows
    features: bool  # the party has a base model
    labels: bool  # the party is the label holder
    holdout_seed: int | None  # chooses the held-out rows; None: no row is held out
    code: UserCode  # finds a source that is named as module:callable
    declared: Mapping[str, Spec] | None = None  # [features]; None: all columns are numbers without gaps
    normalise: tuple[str, ...] = ()  # done to ids that are text
    training: Callable[[int, Hashes | Chosen | None], Positions] = all_rows  # the rows that are trained on, ascending
    choices: Choices | None = None  # what the label holder chooses rows by; None: ids choose
    missing_labels: bool = False  # a label may be missing: NaN in the table
    scratch: Path | None = None  # folder for the numbers of a table that is mapped; None: one for temporary files

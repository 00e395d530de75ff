"""Specifications of a party's table, and the rows that may be given in its place."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sl_queue.ports import UserCode


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A party's rows in any order, given in code or returned by the `source` of a party file.

    Arrays of NumPy, torch or Arrow, lists, and data frames of pandas or polars, without gaps. `features` may have any
    shape after the first axis; None for a label holder without a base model.
    """

    ids: Any = field(repr=False)  # (rows,): whole numbers or text, the same for the same sample at every party
    features: Any = field(default=None, repr=False)  # (rows, *anything); floating ones are cast to the model's dtype
    labels: Any = field(default=None, repr=False)  # (rows,) or (rows, *anything)


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A table in a file with an id column, or a callable that returns Rows."""

    path: Path | None = None
    id: str | None = None  # the names of columns
    features: tuple[str, ...] | None = None  # None: all but id and label
    label: str | None = None
    id_type: Literal["text", "integer"] | None = None
    source: Any = None  # module:callable, or the callable itself


@dataclass(frozen=True, slots=True)
class TableSpec:
    """The table of one party, and what the job needs of it."""

    party: str
    data: FileSpec | Rows
    features: bool  # the party has a base model
    labels: bool  # the party is the label holder
    holdout_seed: int | None  # chooses the held-out rows; None: no row is held out
    code: UserCode  # finds a source that is named as module:callable

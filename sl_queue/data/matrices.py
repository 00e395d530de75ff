"""Arrow columns as the arrays that a model is trained on.

Whole numbers stay whole: a table of them alone is int64, as in `Rows`. Beside floating columns they are float32 only if
float32 holds every one of them, else float64, so that no column is rounded to suit another.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sl_queue.data import decimals
from sl_queue.data.column_digests import ColumnDigests
from sl_queue.data.csv_file import text_kind
from sl_queue.data.faults import listed
from sl_queue.protocol.exactness import rounded, rounded_whole
from sl_queue.protocol.schedule.row_order import Positions
from sl_queue.protocol.table import Narrowed
from sl_queue.protocol.text import counted

REMEDY = "replace those values, or leave out those rows at every party"
_COUNTING_ROWS = 10  # a shorter column that counts may be anything
_AS_CODES = "if they are codes, number them 0, 1, 2, ..., else scale them, or leave the column out"

log = logging.getLogger("sl_queue")

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """An array, or what is wrong with what should have become one."""

    array: Array | None = field(repr=False)
    names: tuple[str, ...] | None = None  # of its columns, if they have names
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Columns of numbers without gaps, which become one array when the order of its rows is known."""

    columns: Mapping[str, Any] = field(repr=False)  # Arrow arrays, which may be read from a file at each use
    shape: tuple[int, int]
    dtype: Any  # that holds all of them exactly

    def array(self, order: Positions | None = None) -> Array:
        """Put the columns side by side, (rows, columns), in this order of the rows."""
        found = np.empty(self.shape if order is None else (len(order), self.shape[1]), self.dtype)
        for place, values in enumerate(self._values(order)):
            found[:, place] = values
        return found

    def narrowed(
        self, order: Positions, exact: Callable[[], Array], folder: Path | None = None
    ) -> tuple[Array, Narrowed | None]:
        """Put the columns side by side as float32, unless some numbers are lost there that a model could use.

        `exact` reads the same table again as `array` would. Numbers that are infinite in float32, and tables of whole
        numbers that it rounds, stay as they are; so do wide ones if `folder` has no room for them.
        """
        if self.dtype not in (np.float64, np.int64):
            return self.array(order), None
        try:
            with ColumnDigests((len(order), self.shape[1]), np.dtype(self.dtype), folder) as digests:
                found, lossy = self._narrow(order, digests)
                if found is not None:
                    again = exact if self.dtype == np.float64 else partial(found.astype, np.int64)
                    return found, Narrowed(np.dtype(self.dtype), digests.found(), lossy, again)
        except OSError as error:
            log.warning("a table takes twice its memory: %s", error.strerror or error)
        return self.array(order), None

    def _narrow(self, order: Positions, digests: ColumnDigests) -> tuple[Array | None, Mapping[str, int]]:
        """Return the columns as float32, or None where a model could use what is lost; and the numbers it rounds."""
        found, lossy = np.empty((len(order), self.shape[1]), np.float32), dict[str, int]()
        for (place, name), values in zip(enumerate(self.columns), self._values(order), strict=True):
            values = values.astype(self.dtype, copy=False)
            digests.add(values)
            if count := int(rounded_whole(values, "float32").sum()):
                lossy[f"column {name!r}"] = count
            with np.errstate(over="ignore"):
                found[:, place] = values
            if not np.isfinite(found[:, place]).all() or (lossy and self.dtype == np.int64):
                return None, lossy
        return found, lossy

    def _values(self, order: Positions | None) -> Iterator[Array]:
        """Yield the values of each column, one in memory at a time."""
        for name in self.columns:
            values = _values(self.columns[name])
            yield values if order is None else values[order]
            del values


@dataclass(frozen=True, slots=True)
class Beside:
    """A matrix of columns, or what is wrong with them."""

    matrix: Matrix | None
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()  # columns with missing values, as `gaps` tells them


def beside(columns: Mapping[str, Any], instead: str, *, keep: bool = False) -> Beside:
    """Look at plain columns, one at a time, to put them side by side.

    `instead`: another remedy than encoding for columns that are not numbers. `keep`: let integers of one type keep it.
    Gaps are not among the faults: see `gaps`.
    """
    looked = {name: _looked_at(columns[name]) for name in columns}
    others = [f"{name!r} ({one.kind})" for name, one in looked.items() if not one.is_number]
    faults = []
    if others:
        faults.append(
            f"columns must be numbers, these are not: {listed(others)}; make numbers of them with [features], "
            f"which `sl-queue features` proposes, or {instead}"
        )
    full = {name: one for name, one in looked.items() if one.is_number and not one.gaps and one.rows}
    dtype, wrong = _shared_dtype(full, keep=keep)
    bad = [in_rows(name, one.not_finite) for name, one in full.items() if one.not_finite]
    if bad and not wrong:
        faults.append(f"NaN or infinity in column {listed(bad)} of {full[next(iter(full))].rows}; {REMEDY}")
    faults += wrong
    if wide := [in_rows(name, one.wide) for name, one in full.items() if one.wide]:
        faults.append(
            f"whole numbers beyond 2**53 are decimals in column {listed(wide)}, and float64 rounds them; {_AS_CODES}"
        )
    found = None
    if len(full) == len(columns) and not wrong:
        found = Matrix(columns, (next(iter(full.values())).rows, len(full)), dtype)
    missing = tuple(_gaps_of(name, one.gaps, one.rows) for name, one in looked.items() if one.is_number and one.gaps)
    return Beside(found, tuple(columns), tuple(_counting(full)), tuple(faults), missing)


@dataclass(frozen=True, slots=True)
class _Looked:
    """A column as one look at its values tells of it."""

    type: Any
    kind: str  # for people, if it is no number
    rows: int
    gaps: int
    rounded: tuple[int, int] = (0, 0)  # whole numbers that float32 rounds, and that float64 does
    large: int = 0  # whole numbers that int64 does not hold
    wide: int = 0  # decimals that float64 rounds
    not_finite: int = 0
    counts: bool = False  # the rows of the file, and does nothing else

    @property
    def is_number(self) -> bool:
        return is_number(self.type)


def _looked_at(column: Any) -> _Looked:
    types, number = pa.types, is_number(column.type)
    about = (column.type, "" if number else _kind(column), len(column), column.null_count)
    if not number or column.null_count or not len(column) or types.is_boolean(column.type):
        return _Looked(*about)
    values = _values(column)
    if types.is_decimal(column.type):
        return _Looked(pa.float64(), *about[1:], wide=decimals.rounded(column))
    if types.is_floating(column.type):
        return _Looked(*about, not_finite=len(values) - int(np.isfinite(values).sum()))
    lossy = (int(rounded(values, "float32").sum()), int(rounded(values, "float64").sum()))
    large = int((values > np.iinfo(np.int64).max).sum()) if types.is_uint64(column.type) else 0
    return _Looked(*about, rounded=lossy, large=large, counts=_counts(values))


def label_array(column: Any, where: str, *, missing: bool = False) -> tuple[Array | None, list[str]]:
    """Make a plain column an array of labels; its gaps are not among the faults, and NaN if they may be `missing`."""
    if not is_number(column.type):
        kind = _kind(column)
        return None, [f"{where} holds {kind}; write labels as numbers, classes as 0, 1, 2, ..."]
    if wide := decimals.rounded(column):
        return None, [f"{where} holds {wide} whole numbers beyond 2**53, and float64 rounds them; {_AS_CODES}"]
    if column.null_count and not missing:
        return None, []
    has_no_nan = column.null_count and not pa.types.is_floating(column.type)
    return _values(column.cast(pa.float64(), safe=False) if has_no_nan else column), []


def gaps(found: Sequence[str]) -> list[str]:
    """Say in which columns of numbers values are missing."""
    remedy = "fill them or leave them out; [features], which `sl-queue features` proposes, fills those of features"
    return [f"values are missing in column {listed(found)}; {remedy}"] if found else []


def gaps_of_labels(columns: Mapping[str, Any]) -> list[str]:
    """Say in which label columns values are missing."""
    remedy = 'fill them, leave those rows out, or have them count for nothing: [fuse] missing_labels = "mask"'
    found = gaps_in(columns)
    return [f"values are missing in label column {listed(found)}; {remedy}"] if found else []


def gaps_in(columns: Mapping[str, Any]) -> list[str]:
    """Count the missing values of columns of numbers, for `gaps`."""
    numbers = {name: column for name, column in columns.items() if column.null_count and is_number(column.type)}
    return [_gaps_of(name, column.null_count, len(column)) for name, column in numbers.items()]


def in_rows(name: str, count: int) -> str:
    """Return "'age' in 3 rows"."""
    return f"{name!r} in {counted(count, 'row', 'rows')}"


def _gaps_of(name: str, count: int, rows: int) -> str:
    return f"{name!r} in {count} of {rows} rows"


def not_finite(array: Array, names: tuple[str, ...] | None) -> list[str]:
    """Say how many rows hold NaN or infinity, by column if columns have names."""
    if array.dtype.kind != "f":
        return []
    finite = np.isfinite(array)
    if names is None or array.ndim != 2:
        bad = len(array) - int(finite.reshape(len(array), -1).all(axis=1).sum())
        return [f"NaN or infinity in {bad} of {len(array)} rows; {REMEDY}"] if bad else []
    counts = len(array) - finite.sum(axis=0)
    found = [in_rows(name, count) for name, count in zip(names, counts, strict=True) if count]
    return [f"NaN or infinity in column {listed(found)} of {len(array)}; {REMEDY}"] if found else []


def _shared_dtype(columns: Mapping[str, _Looked], *, keep: bool) -> tuple[Any, list[str]]:
    """Choose the dtype that holds all columns exactly; if there is none, say which columns it would round."""
    types = {column.type for column in columns.values()}
    whole = {name: column for name, column in columns.items() if pa.types.is_integer(column.type)}
    if not any(pa.types.is_floating(kind) for kind in types):
        if not whole:
            return np.float32, []  # booleans
        if keep and len(types) == 1:
            return types.pop().to_pandas_dtype(), []
        found = [in_rows(name, column.large) for name, column in whole.items() if column.large]
        return np.int64, [f"whole numbers above 2**63 - 1 in column {listed(found)}; {_AS_CODES}"] if found else []
    if not any(pa.types.is_float64(kind) for kind in types) and not any(column.rounded[0] for column in whole.values()):
        return np.float32, []
    found = [in_rows(name, column.rounded[1]) for name, column in whole.items() if column.rounded[1]]
    if not found:
        return np.float64, []
    told = f"whole numbers beyond 2**53 stand beside floating ones in column {listed(found)}"
    return np.float64, [f"{told}, and float64 rounds them; {_AS_CODES}"]


def _counts(values: Array) -> bool:
    """Return True for a column that does nothing but count the rows of the file."""
    if len(values) < _COUNTING_ROWS or values[0] not in (0, 1):
        return False
    last = int(values[0]) + len(values) - 1
    return int(values[-1]) == last and np.array_equal(values, np.arange(int(values[0]), last + 1))


def _counting(columns: Mapping[str, _Looked]) -> Iterator[str]:
    found = [repr(name) for name, column in columns.items() if column.counts]
    if found:
        yield (
            f"column {listed(found)} counts the rows in their order; if it is a row number, leave it out, since the "
            "order may tell the outcome"
        )


def _values(column: Any) -> Array:
    column = column.cast(pa.float64()) if pa.types.is_decimal(column.type) else column
    found: Array = column.to_numpy(zero_copy_only=False)
    return found


def is_number(kind: Any) -> bool:
    """Return True for numbers, and for a column without any value: that is a column of gaps."""
    types = pa.types
    known = (types.is_integer, types.is_floating, types.is_boolean, types.is_null, types.is_decimal)
    return any(is_a(kind) for is_a in known)


def _kind(column: Any) -> str:
    types = pa.types
    if any(is_a(column.type) for is_a in (types.is_string, types.is_large_string, types.is_string_view)):
        return text_kind(column.cast(pa.large_string()))
    return str(column.type)

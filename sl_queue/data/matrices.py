"""Arrow columns as the arrays that a model is trained on.

Whole numbers stay whole: a table of them alone is int64, as in `Rows`. Beside floating columns they are float32 only if
float32 holds every one of them, else float64, so that no column is rounded to suit another.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sl_queue.data.csv_file import text_kind
from sl_queue.data.faults import listed
from sl_queue.protocol.exactness import rounded

REMEDY = "replace those values, or leave out those rows at every party"
_COUNTING_ROWS = 10  # a shorter column that counts may be anything
_AS_CODES = "if they are codes, number them 0, 1, 2, ..., else scale them, or leave the column out"

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """An array, or what is wrong with what should have become one."""

    array: Array | None = field(repr=False)
    names: tuple[str, ...] | None = None  # of its columns, if they have names
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def plain(column: Any) -> Any:
    """Take off encodings that NumPy does not know; a decimal without a fraction is a whole number."""
    types = pa.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not types.is_decimal(column.type):
        return column
    if column.type.scale <= 0:
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:  # of more than 64 bits
            pass
    return column.cast(pa.float64())


def matrix(columns: Mapping[str, Any], instead: str, *, keep: bool = False) -> Numbers:
    """Put plain columns side by side, (rows, columns).

    `instead`: another remedy than encoding for columns that are not numbers. `keep`: let integers of one type keep it.
    Gaps are not among the faults: see `gaps`.
    """
    numbers = {name: column for name, column in columns.items() if _is_number(column.type)}
    others = [f"{name!r} ({_kind(column)})" for name, column in columns.items() if name not in numbers]
    faults = []
    if others:
        faults.append(f"columns must be numbers, these are not: {listed(others)}; encode them as numbers, or {instead}")
    full = {name: column for name, column in numbers.items() if not column.null_count and len(column)}
    dtype, wrong = _shared_dtype(full, keep=keep)
    faults += wrong
    array = None
    if full and (not wrong):
        array = np.empty((len(next(iter(full.values()))), len(full)), dtype)
        for position, column in enumerate(full.values()):
            array[:, position] = _values(column)
        faults += not_finite(array, tuple(full))
    if len(full) < len(columns):
        array = None
    return Numbers(array, tuple(columns), tuple(_counting(full)), tuple(faults))


def label_array(column: Any, where: str, *, missing: bool = False) -> tuple[Array | None, list[str]]:
    """Make a plain column an array of labels; its gaps are not among the faults, and NaN if they may be `missing`."""
    if not _is_number(column.type):
        kind = _kind(column)
        return None, [f"{where} holds {kind}; write labels as numbers, classes as 0, 1, 2, ..."]
    return (None, []) if column.null_count and not missing else (_values(column), [])


def gaps(columns: Mapping[str, Any]) -> list[str]:
    """Say in which columns of numbers values are missing."""
    found = [
        f"{name!r} in {column.null_count} of {len(column)} rows"
        for name, column in columns.items()
        if column.null_count and _is_number(column.type)
    ]
    return [f"values are missing in column {listed(found)}; fill them or leave them out"] if found else []


def not_finite(array: Array, names: tuple[str, ...] | None) -> list[str]:
    """Say how many rows hold NaN or infinity, by column if columns have names."""
    if array.dtype.kind != "f":
        return []
    finite = np.isfinite(array)
    if names is None or array.ndim != 2:
        bad = len(array) - int(finite.reshape(len(array), -1).all(axis=1).sum())
        return [f"NaN or infinity in {bad} of {len(array)} rows; {REMEDY}"] if bad else []
    counts = len(array) - finite.sum(axis=0)
    found = [f"{name!r} in {count} rows" for name, count in zip(names, counts, strict=True) if count]
    return [f"NaN or infinity in column {listed(found)} of {len(array)}; {REMEDY}"] if found else []


def _shared_dtype(columns: Mapping[str, Any], *, keep: bool) -> tuple[Any, list[str]]:
    """Choose the dtype that holds all columns exactly; if there is none, say which columns it would round."""
    types = {column.type for column in columns.values()}
    whole = {name: column for name, column in columns.items() if pa.types.is_integer(column.type)}
    if not any(pa.types.is_floating(kind) for kind in types):
        if not whole:
            return np.float32, []  # booleans
        if keep and len(types) == 1:
            return types.pop().to_pandas_dtype(), []
        return np.int64, _too_large(whole)
    if not any(pa.types.is_float64(kind) for kind in types) and not _rounded(whole, "float32"):
        return np.float32, []
    found = [f"{name!r} in {count} rows" for name, count in _rounded(whole, "float64").items()]
    if not found:
        return np.float64, []
    told = f"whole numbers beyond 2**53 stand beside floating ones in column {listed(found)}"
    return np.float64, [f"{told}, and float64 rounds them; {_AS_CODES}"]


def _rounded(columns: Mapping[str, Any], dtype: str) -> dict[str, int]:
    counts = {name: int(rounded(_values(column), dtype).sum()) for name, column in columns.items()}
    return {name: count for name, count in counts.items() if count}


def _too_large(columns: Mapping[str, Any]) -> list[str]:
    limit = np.iinfo(np.int64).max
    large = {n: _values(c) > limit for n, c in columns.items() if pa.types.is_uint64(c.type)}
    found = [f"{name!r} in {is_large.sum()} rows" for name, is_large in large.items() if is_large.any()]
    return [f"whole numbers above 2**63 - 1 in column {listed(found)}; {_AS_CODES}"] if found else []


def _counting(columns: Mapping[str, Any]) -> Iterator[str]:
    """Note columns that do nothing but count the rows of the file."""
    found = []
    for name, column in columns.items():
        if len(column) >= _COUNTING_ROWS and pa.types.is_integer(column.type) and column[0].as_py() in (0, 1):
            count = np.arange(column[0].as_py(), column[0].as_py() + len(column))
            if column[-1].as_py() == count[-1] and np.array_equal(_values(column), count):
                found.append(repr(name))
    if found:
        yield (
            f"column {listed(found)} counts the rows in their order; if it is a row number, leave it out, since the "
            "order may tell the outcome"
        )


def _values(column: Any) -> Array:
    found: Array = column.to_numpy(zero_copy_only=False)
    return found


def _is_number(kind: Any) -> bool:
    """Return True for numbers, and for a column without any value: that is a column of gaps."""
    types = pa.types
    return any(is_a(kind) for is_a in (types.is_integer, types.is_floating, types.is_boolean, types.is_null))


def _kind(column: Any) -> str:
    types = pa.types
    if any(is_a(column.type) for is_a in (types.is_string, types.is_large_string, types.is_string_view)):
        return text_kind(column.cast(pa.large_string()))
    return str(column.type)

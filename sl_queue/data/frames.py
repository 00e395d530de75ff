"""Data frames of pandas, polars, Arrow and their like, known by what they can do: their columns as Arrow arrays."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sl_queue.data.encodings import plain, unpacked
from sl_queue.data.faults import listed
from sl_queue.protocol.text import counted

NO_COLUMN = (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeEncodeError)


def is_frame(values: Any) -> bool:
    """Return True for what has columns with names, and is computed."""
    if isinstance(values, pa.Table | pa.RecordBatch):
        return True
    return not hasattr(type(values), "collect") and hasattr(values, "columns") and hasattr(values, "dtypes")


def is_series(values: Any) -> bool:
    """Return True for one column."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return True
    known = hasattr(values, "dtype") and (hasattr(values, "to_numpy") or hasattr(values, "to_arrow"))
    return known and not isinstance(values, np.ndarray) and getattr(values, "ndim", 1) == 1


def named_columns(frame: Any) -> list[tuple[str, Any]]:
    """Return the columns of a data frame, in order, each with its name; two may have the same."""
    if isinstance(frame, pa.Table | pa.RecordBatch):
        return list(zip(frame.schema.names, frame.columns, strict=True))
    by_place = hasattr(frame, "iloc")
    return [(str(name), frame.iloc[:, i] if by_place else frame[name]) for i, name in enumerate(frame.columns)]


def arrow(series: Any) -> Any:
    """Return a column of one type as Arrow, missing values null."""
    if isinstance(series, pa.Array | pa.ChunkedArray):
        return unpacked(series)
    if hasattr(series, "to_arrow"):
        return unpacked(series.to_arrow())
    return pa.array(native(series), from_pandas=True)


def native(values: Any) -> Any:
    """Return an array or a column of NumPy's with its bytes in this machine's order, which alone Arrow takes."""
    dtype = getattr(values, "dtype", None)
    if not isinstance(dtype, np.dtype) or dtype.isnative:
        return values
    return np.asanyarray(values).astype(dtype.newbyteorder("="))


def repeated(names: Iterable[str], what: str) -> list[str]:
    """Say which names stand for more than one of a frame's columns, or of several arrays."""
    found = [f"{count} {what} are called {name!r}" for name, count in Counter(names).items() if count > 1]
    return [f"{listed(found)}; rename them"] if found else []


def raw_columns(values: Any) -> tuple[dict[str, Any], list[str]]:
    """Make Arrow columns of a data frame, missing values null, for [features] to make numbers of."""
    if not is_frame(values):
        return {}, ["[features] needs columns with names; let features be a data frame of pandas, polars or Arrow"]
    columns = named_columns(values)
    if not columns:
        return {}, ["features: there are no columns"]
    found, faults = _as_arrow(columns)
    return ({}, list(faults.values())) if faults else (found, [])


def frame_columns(values: Any, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return those of these columns that a data frame has, as Arrow arrays or what is wrong; of anything else none."""
    if not is_frame(values):
        return {}, {}
    return _as_arrow([(name, column) for name, column in named_columns(values) if name in names])


def _as_arrow(columns: Sequence[tuple[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Make Arrow arrays of columns, and say of others what is wrong."""
    found, faults = dict[str, Any](), dict[str, str]()
    for name, column in columns:
        if name in found:
            faults[name] = f"features: {repeated([one for one, _ in columns if one == name], 'columns')[0]}"
            continue
        try:
            found[name] = plain(arrow(column))
        except NO_COLUMN:
            faults[name] = f"column {name!r} holds {_held(column)}; make it a column of numbers, or of text"
    return found, faults


def _held(column: Any) -> str:
    """Say what a column holds that Arrow does not know."""
    dtype = column.type if isinstance(column, pa.Array | pa.ChunkedArray) else column.dtype
    if str(dtype) != "object":
        return f"values of type {dtype}"
    types = Counter(type(value).__name__ for value in np.asarray(column).tolist())
    return f"objects of {counted(len(types), 'type', 'types')} ({listed(types)})"


def has_names(values: Any) -> bool:
    """Return True for a data frame, and for several arrays by name."""
    return isinstance(values, Mapping) or is_frame(values)


def without(values: Any, left_out: Callable[[str], bool]) -> Any:
    """Return a data frame without columns of such names, several arrays by name too, and anything else as it is."""
    if isinstance(values, Mapping):
        return {name: array for name, array in values.items() if not left_out(str(name))}
    known = frame_names(values) or []
    return _at(values, [place for place, name in enumerate(known) if not left_out(name)], known)


def only(values: Any, names: Sequence[str]) -> Any:
    """Return a data frame with these of its columns, in this order; anything else as it is."""
    known = frame_names(values) or []
    places = [place for name in dict.fromkeys(names) for place, one in enumerate(known) if one == name]
    return _at(values, places, known)


def _at(values: Any, places: Sequence[int], known: Sequence[str]) -> Any:
    """Return a data frame with the columns at these places."""
    if list(places) == list(range(len(known))):
        return values
    if isinstance(values, pa.Table | pa.RecordBatch):
        return values.select(places)
    return values.iloc[:, places] if hasattr(values, "iloc") else values[:, places]


def frame_names(values: Any) -> list[str] | None:
    """Return the names of the columns of a data frame; None of anything else."""
    if not is_frame(values):
        return None
    return list(map(str, values.schema.names if isinstance(values, pa.Table | pa.RecordBatch) else values.columns))

"""A party's rows as arrays that training will not stumble over, in the order in which they were given.

Complaints name the party, the file, the column and the count of bad rows, and never show a value.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sl_queue.data.columns import listed, read_columns
from sl_queue.errors import JobError
from sl_queue.party_file import DataFile, PartyFile, Rows
from sl_queue.user_code import imported

__all__ = ["Arrays", "Rows", "read_rows"]

Array = npt.NDArray[Any]

_REMEDY = "replace those values, or leave out those rows at every party"
_FLOATS = {"f2": np.float32, "f16": np.float64}  # too narrow to compute with, and unknown to torch
_FEATURES = {**_FLOATS, "b1": np.float32, "u2": np.int64, "u4": np.int64, "u8": np.int64}


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """Rows as they were given; features and labels are finite numbers."""

    where: str  # what complaints begin with: the party, and its file or callable
    ids: Any = field(repr=False)  # an Arrow array of any type
    ids_are_csv: bool  # text of which nobody said whether it means numbers
    features: Array | None = field(repr=False)  # (rows, *anything)
    labels: Array | None = field(repr=False)  # (rows,) or (rows, *anything)
    names: tuple[str, ...] | None = None  # of the feature columns, where they have any


def read_rows(party_file: PartyFile, *, features: bool, labels: bool) -> Arrays:
    """The rows of a party; features and labels only if they are asked for. Raises JobError."""
    data, where = party_file.data, f"party {party_file.party!r}"
    if isinstance(data, Rows):
        return _given(data, f"{where}, data", features=features, labels=labels)
    if data.source is not None:
        name = data.source if isinstance(data.source, str) else getattr(data.source, "__qualname__", "a callable")
        where = f"{where}, data.source = {name!r}"
        return _given(_returned(data.source, party_file, where), where, features=features, labels=labels)
    return _read(data, f"{where}, {data.path}", features=features, labels=labels)


def read_ids(ids: Any, where: str) -> Arrays:
    """Ids given in code, without rows. Raises JobError."""
    return Arrays(where, _ids(ids, where), ids_are_csv=False, features=None, labels=None)


def _read(data: DataFile, where: str, *, features: bool, labels: bool) -> Arrays:
    """From a file."""
    columns = read_columns(data, where, features=features, labels=labels)
    _require_rows(len(columns.ids), where)
    if columns.features is not None:
        bad = len(columns.features) - np.isfinite(columns.features).sum(axis=0)
        found = [f"{name!r} in {count} rows" for name, count in zip(columns.names, bad, strict=True) if count]
        if found:
            raise JobError(f"{where}: NaN or infinity in column {listed(found)} of {len(columns.ids)}; {_REMEDY}")
    found_labels = _labels(columns.labels, f"{where}, label column {data.label!r}")
    names = None if columns.features is None else columns.names
    return Arrays(where, columns.ids, columns.ids_are_csv, columns.features, found_labels, names)


def _given(rows: Rows, where: str, *, features: bool, labels: bool) -> Arrays:
    """From Rows, built in code or returned by a source."""
    ids = _ids(rows.ids, where)
    _require_rows(len(ids), where)
    arrays: dict[str, Any] = {
        "features": _features(_array(rows.features, f"{where}, features"), where) if features else None,
        "labels": _labels(_array(rows.labels, f"{where}, labels"), f"{where}, labels") if labels else None,
    }
    for name, array in arrays.items():
        if array is not None and len(array) != len(ids):
            raise JobError(f"{where}: there are {len(ids)} ids, but {name} for {len(array)} rows")
    return Arrays(where, ids, ids_are_csv=False, **arrays)


def _returned(source: Any, party_file: PartyFile, where: str) -> Rows:
    """What the party's callable returns."""
    function = imported(source, party_file.folder) if isinstance(source, str) else source
    try:
        rows = function()
    except Exception as error:
        raise JobError(f"{where} fails: {type(error).__name__}: {error}") from error
    if not isinstance(rows, Rows):
        raise JobError(f"{where} returns a {type(rows).__name__}; it must return sl_queue.Rows")
    return rows


def _require_rows(n_rows: int, where: str) -> None:
    if n_rows == 0:
        raise JobError(f"{where}: there are no rows")


def _ids(ids: Any, where: str) -> Any:
    """Ids as an Arrow array."""
    array = np.asarray(ids) if hasattr(ids, "__array__") else np.array(list(ids), dtype=object)
    if array.ndim != 1:
        raise JobError(f"{where}: ids have the shape {array.shape}; they must have one axis")
    if array.dtype.kind == "T":  # NumPy's own text, which Arrow does not know
        array = array.astype(object)
    try:
        return pa.array(array, from_pandas=True)  # NaN is a missing id
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        raise JobError(f"{where}: ids must be whole numbers of 64 bits, or all be text") from None


def _array(values: npt.ArrayLike | None, where: str) -> Array | None:
    """As a NumPy array of numbers with an axis of rows."""
    if values is None:
        return None
    try:
        array = np.asarray(values)
    except ValueError:
        raise JobError(f"{where}: rows have different shapes; they must be one array") from None
    if array.dtype.kind not in "biuf":
        raise JobError(f"{where} are of dtype {array.dtype}; they must be numbers: encode text as numbers")
    if array.ndim == 0:
        raise JobError(f"{where}: one number is no array of rows")
    return array


def _features(array: Array | None, where: str) -> Array | None:
    """Finite, in a dtype that torch computes with: integers stay what they are, for embeddings and images."""
    if array is None:
        raise JobError(f"{where}: features are missing; the job gives this party a cut, so its base model needs them")
    _require_finite(array, f"{where}, features")
    return array.astype(_FEATURES.get(array.dtype.str[1:], array.dtype.newbyteorder("=")), copy=False)


def _labels(array: Array | None, where: str) -> Array | None:
    """Finite; whole numbers and booleans as int64."""
    if array is None:
        return None
    _require_finite(array, where)
    if array.dtype.kind == "u" and array.max(initial=0) > np.iinfo(np.int64).max:
        raise JobError(f"{where}: labels go up to {array.max()}; they must fit into 64 bits with a sign")
    if array.dtype.kind in "biu":
        return array.astype(np.int64)
    return array.astype(_FLOATS.get(array.dtype.str[1:], array.dtype.newbyteorder("=")), copy=False)


def _require_finite(array: Array, where: str) -> None:
    if array.dtype.kind != "f":
        return
    bad = len(array) - int(np.isfinite(array).reshape(len(array), -1).all(axis=1).sum())
    if bad:
        raise JobError(f"{where}: NaN or infinity in {bad} of {len(array)} rows; {_REMEDY}")

"""Ids, features and labels as they are given in code: NumPy arrays and lists, torch tensors, Arrow, pandas, polars.

Libraries that sl_queue does not depend on are known by what their objects can do. A value that is masked or missing is
never taken as data.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data.decimals import is_rounded
from sl_queue.data.encodings import plain
from sl_queue.data.faults import listed
from sl_queue.data.frames import NO_COLUMN, arrow, is_frame, is_series, named_columns, native, repeated
from sl_queue.data.matrices import Array, Numbers, beside, gaps, not_finite

_FLOATS = {"f2": np.float32, "f16": np.float64}  # too narrow to compute with, and unknown to torch
_WHOLE = {"u2": np.int64, "u4": np.int64, "u8": np.int64}
_NOT_NUMBERS = {"M": "dates", "m": "durations", "c": "complex numbers", "V": "records with fields"}
_GAPS = ("NAType", "NaTType", "NoneType", "MaskedConstant")
_MIXED_IDS = "ids must be whole numbers of 64 bits, or all be text"
_ROUNDED = "whole numbers beyond 2**53 are decimals, or stand beside fractions, and float64 rounds them"
_FILL = "fill them, or leave out those rows at every party"


def ids_of(ids: Any) -> tuple[Any, list[str]]:
    """Make ids an Arrow array, missing ones null; or None and what is wrong with them."""
    if is_series(ids):
        try:
            return arrow(ids), []
        except NO_COLUMN:
            return None, [_MIXED_IDS]
    if not hasattr(ids, "__array__"):
        if not isinstance(ids, Iterable) or isinstance(ids, Set | Mapping):
            return None, [f"ids are of type {type(ids).__name__}; they must be a list or an array"]
        ids = list(ids)
        array = np.ma.array(ids) if any(map(np.ma.isMaskedArray, ids)) else np.array(ids, dtype=object)
    else:
        array = native(np.asanyarray(ids))
    if array.ndim != 1:
        return None, [f"ids have the shape {array.shape}; they must have one axis"]
    mask = np.ma.getmaskarray(array) if np.ma.isMaskedArray(array) else None
    array = np.ma.getdata(array)
    if array.dtype.kind in "TU":  # NumPy's own texts: Arrow does not know the one, and ends the other at a NUL
        array = array.astype(object)
    try:
        return pa.array(array, mask=mask, from_pandas=True), []  # NaN is a missing id
    except NO_COLUMN:
        return None, [_MIXED_IDS]


def features_of(values: Any, n_rows: int | None = None) -> Numbers:
    """Make features finite numbers in a dtype that torch computes with; integers stay what they are.

    Several arrays, a dict of them or a list, become one array of records, (rows,). `n_rows` tells a list of arrays of
    so many rows from a list of rows.
    """
    several = _several(values, n_rows)
    if isinstance(values, Mapping) and (wrong := repeated(map(str, values), "arrays")):
        return Numbers(None, faults=tuple(f"features: {fault}" for fault in wrong))
    if several is not None:
        return _records({name: features_of(array) for name, array in several.items()})
    found = _numbers(values, "features")
    if found.array is None or found.faults:
        return found
    return _finite(found, "features", {**_FLOATS, **_WHOLE, "b1": np.float32})


def _several(values: Any, n_rows: int | None) -> dict[str, Any] | None:
    """Return several arrays by name, those of a list as "[0]", "[1]"; None for a single one."""
    if isinstance(values, Mapping):
        return {str(name): array for name, array in values.items()}
    if not isinstance(values, list | tuple) or not values or n_rows is None or len(values) == n_rows:
        return None
    if not all(hasattr(array, "__len__") and len(array) == n_rows for array in values):
        return None
    return {f"[{place}]": array for place, array in enumerate(values)}


def _records(several: Mapping[str, Numbers]) -> Numbers:
    """Put arrays of as many rows side by side, each with its own dtype and shape."""
    faults = [f"{name}: {fault}" for name, found in several.items() for fault in found.faults]
    arrays = {name: found.array for name, found in several.items() if found.array is not None}
    lengths = {name: len(array) for name, array in arrays.items()}
    if not several or len(set(lengths.values())) > 1:
        faults.append(f"features: the arrays have different numbers of rows: {lengths}" if several else "no features")
    if faults or len(arrays) < len(several):
        return Numbers(None, faults=tuple(faults))
    fields: Any = [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()]
    found = np.empty(next(iter(lengths.values())), fields)
    for name, array in arrays.items():
        found[name] = array
    return Numbers(found)


def labels_of(values: Any, what: str = "labels", *, missing: bool = False) -> Numbers:
    """Make labels finite numbers; whole numbers and booleans become int64.

    Where labels may be `missing`, gaps are NaN, and whole numbers with gaps are float64.
    """
    values, unknown = _filled(values) if missing else (values, None)
    found = _numbers(values, what)
    if found.array is None or found.faults:
        return found
    whole = dict.fromkeys(("b1", "i1", "i2", "i4", "u1"), np.int64)
    found = _finite(found, what, {**_FLOATS, **_WHOLE, **whole}, missing=missing)
    if unknown is None or found.array is None:
        return found
    array = found.array if found.array.dtype.kind == "f" else found.array.astype(np.float64)
    return replace(found, array=np.where(unknown, array.dtype.type(np.nan), array))


def _filled(values: Any) -> tuple[Any, Array | None]:
    """Put something in the place of what is missing, and say where; None if nothing is."""
    if values is None or hasattr(values, "detach") or hasattr(type(values), "collect"):  # a tensor has no gaps but NaN
        return values, None
    if is_frame(values):
        columns = [(name, *_filled_column(column)) for name, column in named_columns(values)]
        if not any(unknown.any() for _, _, unknown in columns):
            return values, None
        names, filled = [name for name, _, _ in columns], [column for _, column, _ in columns]
        return pa.Table.from_arrays(filled, names), np.stack([unknown for _, _, unknown in columns], axis=1)
    if is_series(values):
        column, unknown = _filled_column(values)
        return (column, unknown) if unknown.any() else (values, None)
    try:
        array = np.ma.array(values) if _masked_rows(values) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return values, None
    unknown, array = np.ma.getmaskarray(array), np.ma.getdata(array)
    if array.dtype.kind == "O" and array.ndim:
        unknown = unknown | np.fromiter(map(_is_gap, array.flat), np.bool_, array.size).reshape(array.shape)
    return (np.where(unknown, array.dtype.type(0), array), unknown) if unknown.any() else (values, None)


def _filled_column(series: Any) -> tuple[Any, Array]:
    """Put a value of a column in the place of those that are missing or NaN, and say where."""
    column = _column(series)
    unknown = pc.is_null(column, nan_is_null=True).to_numpy(zero_copy_only=False)
    if unknown.all():
        return pa.array(np.zeros(len(column))), unknown
    return column.take(pa.array(np.where(unknown, np.argmin(unknown), np.arange(len(column))))), unknown


def _finite(found: Numbers, what: str, dtypes: dict[str, Any], *, missing: bool = False) -> Numbers:
    """Cast, after and before looking at the values: a cast must change none of them."""
    array = found.array
    assert array is not None
    if array.dtype.kind == "u" and array.max(initial=0) > np.iinfo(np.int64).max:
        return Numbers(None, faults=(f"{what} go up to {array.max()}; they must fit into 64 bits with a sign",))
    with np.errstate(over="ignore"):
        array = array.astype(dtypes.get(array.dtype.str[1:], array.dtype.newbyteorder("=")), copy=False)
    looked_at = np.where(np.isnan(array), 0, array) if missing and array.dtype.kind == "f" else array
    faults = tuple(f"{what}: {fault}" for fault in not_finite(looked_at, found.names))
    return Numbers(array, found.names, found.notes, faults)


# From whatever it is to NumPy -----------------------------------------------------------------------------------


def _numbers(values: Any, what: str) -> Numbers:
    """Make an array of numbers with an axis of rows of anything that holds one."""
    if values is None:
        return Numbers(None)
    if hasattr(values, "detach"):
        values = _of_tensor(values)
    if hasattr(type(values), "collect"):
        return _refused(what, f"a {type(values).__name__} is not computed yet; give .collect()")
    if is_frame(values):
        return _of_frame(values, what)
    if is_series(values):
        column = _column(values)
        if column.null_count:
            return _refused(what, f"values are missing in {column.null_count} of {len(column)} rows; {_FILL}")
        values = column.to_numpy(zero_copy_only=False)
    if masked := _masked_rows(values):
        return _refused(what, f"values are masked in {masked} of {len(values)} rows; {_FILL}")
    try:
        array = np.asarray(values)
    except ValueError:
        return _refused(what, "rows have different shapes; they must be one array")
    except (TypeError, RuntimeError) as error:
        told = f"{type(values).__name__} cannot be made a NumPy array ({type(error).__name__})"
        return _refused(what, f"{told}; give an array on the CPU")
    if array.ndim == 0:
        sparse = "; it is sparse: give .toarray()" if hasattr(values, "toarray") else ""
        return _refused(what, f"one {type(values).__name__} is not an array of rows{sparse}")
    if array.dtype.kind == "O":
        return _of_objects(array, what)
    listed_ones = isinstance(values, list | tuple) and array.dtype.kind == "f" and (np.abs(array) >= 2.0**53).any()
    if listed_ones and (count := sum(map(is_rounded, np.asarray(values, object).flat))):
        return _refused(what, f"{count} {_ROUNDED}")
    return _of_array(array, what)


def _refused(what: str, fault: str) -> Numbers:
    return Numbers(None, faults=(f"{what}: {fault}",))


def _of_array(array: Array, what: str) -> Numbers:
    if array.dtype.kind in "biuf":
        return Numbers(array)
    kind = _NOT_NUMBERS.get(array.dtype.kind, "text")
    return Numbers(None, faults=(f"{what} are of dtype {array.dtype}; they must be numbers: encode {kind} as numbers",))


def _of_objects(array: Array, what: str) -> Numbers:
    """Take Python's objects as numbers if every one is, as in an array of booleans beside floats."""
    per_row = array.reshape(len(array), -1)
    missing = sum(any(map(_is_gap, row)) for row in per_row)
    if missing:
        return _refused(what, f"values are missing in {missing} of {len(array)} rows; {_FILL}")
    kinds = Counter(type(value).__name__ for value in per_row.flat if not isinstance(value, (Real, Decimal, np.bool_)))
    if kinds:
        told = listed(f"{count} of type {kind}" for kind, count in kinds.items())
        return _refused(what, f"they are of dtype object and must be numbers, but hold {told}; encode text as numbers")
    whole = all(isinstance(value, (int, np.integer, np.bool_)) for value in per_row.flat)
    try:
        exact = array.astype(np.int64 if whole else np.float64)
    except OverflowError:
        return _refused(what, "whole numbers need more than 64 bits; scale them, or number codes 0, 1, 2, ...")
    if not whole and (count := sum(map(is_rounded, array.flat))):
        return _refused(what, f"{count} {_ROUNDED}")
    return Numbers(exact)


def _is_gap(value: Any) -> bool:
    return type(value).__name__ in _GAPS or (isinstance(value, float | np.floating | Decimal) and value != value)


def _masked_rows(values: Any) -> int:
    """Count the rows that hold a masked value, also in a list of masked arrays, whose masks NumPy forgets."""
    if np.ma.isMaskedArray(values):
        mask = np.ma.getmaskarray(values)
        return int(mask.reshape(len(mask), -1).any(axis=1).sum()) if mask.ndim else int(mask)
    return sum(map(_is_masked, values)) if isinstance(values, list | tuple) else 0


def _is_masked(value: Any) -> bool:
    if isinstance(value, np.ma.MaskedArray):
        return bool(np.ma.getmaskarray(value).any())
    return isinstance(value, list | tuple) and any(map(_is_masked, value))


def _of_tensor(tensor: Any) -> Any:
    """Return a torch tensor's numbers, whatever device, layout and graph it belongs to."""
    tensor = tensor.detach().cpu()
    tensor = tensor if str(tensor.layout) == "torch.strided" else tensor.to_dense()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    narrow = tensor.is_floating_point() and tensor.element_size() < 4  # some of which NumPy does not know
    return (tensor.float() if narrow else tensor).resolve_conj().resolve_neg().numpy()


# Columns of Arrow, pandas, polars and their like ----------------------------------------------------------------


def _of_frame(frame: Any, what: str) -> Numbers:
    columns = named_columns(frame)
    if not columns:
        return _refused(what, "there are no columns")
    if wrong := repeated([name for name, _ in columns], "columns"):
        return Numbers(None, faults=tuple(f"{what}: {fault}" for fault in wrong))
    found = {name: _column(column) for name, column in columns}
    numbers = beside(found, "leave them out", keep=True)
    faults = (*numbers.faults, *gaps(numbers.gaps))
    array = numbers.matrix.array() if not faults and numbers.matrix is not None else None
    return Numbers(array, numbers.names, numbers.notes, tuple(f"{what}: {fault}" for fault in faults))


def _column(series: Any) -> Any:
    """Build as `arrow`, and plainly; numbers of several types as numbers, and objects of other types as text."""
    try:
        return plain(arrow(series))
    except NO_COLUMN:
        array = np.asarray(series)
    missing = np.array([_is_gap(value) for value in array.tolist()], np.bool_)
    filled = np.where(missing, 0, array)
    found = _of_objects(filled, "").array if filled.dtype.kind == "O" else filled
    if found is not None and found.dtype.kind in "biuf":
        return pa.array(found, mask=missing)
    return pa.array([None if gap else type(v).__name__ for v, gap in zip(array.tolist(), missing, strict=True)])

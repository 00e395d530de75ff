"""The form in which a base model gets the features of its table: as floating numbers, or as whole ones.

A table of whole numbers suits nn.Linear as floating numbers and nn.Embedding as whole ones, and only a trial tells
which. A file's whole numbers are offered as floating ones first, unless the model's dtype would round them; arrays
given in code are offered as they are first. The choice follows from the table and the model alone, so that it is the
same at every start.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sl_queue.compute.spec import ComputeSpec
from sl_queue.cut.tensors import dtype_name
from sl_queue.protocol.exactness import BITS, rounded
from sl_queue.protocol.table import Table

Array = npt.NDArray[Any]

_LISTED = 5  # columns


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """Features in a form that a model may take."""

    features: Array = field(repr=False)  # (rows, *anything)
    remark: str | None = None  # what a person should know of it
    fault: str | None = None  # why it cannot be trained on, even if the model takes it


def n_offers(features: Array) -> int:
    """Count the forms, which no model's dtype changes."""
    return 2 if features.dtype.kind in "iu" else 1


def offers(spec: ComputeSpec, table: Table, dtype: torch.dtype) -> tuple[Offer, ...]:
    """Return the forms of the features to try on a model of `dtype`, the one to prefer first."""
    features = table.features
    assert features is not None
    if spec.base is not None and spec.base.inputs != "tensor" and features.ndim == 2:
        features = _by_column(features, table.columns if spec.base.inputs == "dict" else None)
    if features.dtype.names:
        assert table.features is not None
        return tuple(map(Offer, (features, _floating(features))[: n_offers(table.features)]))
    remark, fault = _looked_at(features, table.columns, dtype_name(dtype), f"party {spec.party!r}: features")
    if features.dtype.kind not in "iu":
        return (Offer(features, remark, fault),)
    floating = Offer(features.astype(np.float64 if dtype == torch.float64 else np.float32), remark, fault)
    whole = Offer(features)
    return (floating, whole) if spec.table_is_file and remark is fault is None else (whole, floating)


def _floating(records: Array) -> Array:
    """Make floating numbers of all fields."""
    return records.astype([(name, np.float32) for name in records.dtype.names or ()])


def _by_column(features: Array, columns: tuple[str, ...] | None) -> Array:
    """Make a record of each row, a field a column: by name, or by place."""
    names = columns or tuple(f"[{place}]" for place in range(features.shape[1]))
    found = np.empty(len(features), [(name, features.dtype) for name in names])
    for place, name in enumerate(names):
        found[name] = features[:, place]
    return found


def _looked_at(
    features: Array, columns: tuple[str, ...] | None, dtype: str, where: str
) -> tuple[str | None, str | None]:
    """Say which whole numbers are rounded in the model's dtype, and which numbers are infinite there."""
    bits, limit = BITS.get(dtype, 53), torch.finfo(getattr(torch, dtype)).max
    own = np.finfo(features.dtype) if features.dtype.kind == "f" else None
    if own is not None and own.nmant < bits and float(own.max) <= limit:  # at least as wide: nothing to look for
        return None, None
    largest = _largest(features)
    remark = fault = None
    if largest > 2**bits and (found := _counted(features, columns, lambda part: _rounded(part, dtype))):
        remark = (
            f"{where}: whole numbers beyond 2**{bits} are rounded in {dtype}, in which the base model computes: "
            f"{found}; if they are codes, number them 0, 1, 2, ..., else scale them"
        )
    if largest > limit and (found := _counted(features, columns, lambda part: np.isinf(_cast(part, dtype)))):
        fault = (
            f"{where}: numbers larger than {limit:.3g} are infinite in {dtype}, in which the base model computes: "
            f"{found}; scale them, or use a model of a wider dtype"
        )
    return remark, fault


def _counted(features: Array, columns: tuple[str, ...] | None, is_bad: Callable[[Array], npt.NDArray[np.bool_]]) -> str:
    """Name the columns with bad values and count their rows."""
    found = []
    for name, part in _parts(features, columns):
        bad = is_bad(part)
        if count := int(bad.reshape(len(bad), -1).any(axis=1).sum()):
            found.append(f"{name} in {count} of {len(features)} rows")
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def _rounded(part: Array, dtype: str) -> npt.NDArray[np.bool_]:
    """Return True for the whole numbers that are rounded; in a column with fractions all numbers are rounded anyway."""
    if part.dtype.kind == "f":
        if _largest(part) >= 2**63 or not (part == np.floor(part)).all():
            return np.zeros(part.shape, np.bool_)
        part = part.astype(np.int64)
    return rounded(part, dtype)


def _parts(features: Array, columns: tuple[str, ...] | None) -> Iterator[tuple[str, Array]]:
    """Yield columns by name, or all features at once if they are not a table."""
    if features.ndim != 2:
        yield "values", features
        return
    for position in range(features.shape[1]):
        yield f"column {columns[position]!r}" if columns else f"column {position}", features[:, position]


def _largest(array: Array) -> float:
    """Return the largest absolute value, found without a copy of the array."""
    return max(float(array.max()), -float(array.min())) if array.size else 0.0


def _cast(array: Array, dtype: str) -> Array:
    found: Array = torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype)).double().numpy()
    return found

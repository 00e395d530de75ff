"""The form in which a base model gets the features of its table: as floating numbers, or as whole ones.

A table of whole numbers suits nn.Linear as floating numbers and nn.Embedding as whole ones, and only a trial tells
which. A file's whole numbers are offered as floating ones first, unless the model's dtype would round them; arrays
given in code are offered as they are first. The choice follows from the table and the model alone, so that it is the
same at every start.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sl_queue.compute.spec import ComputeSpec
from sl_queue.cut.tensors import dtype_name
from sl_queue.protocol.exactness import BITS, rounded_whole
from sl_queue.protocol.table import Narrowed, Table

Array = npt.NDArray[Any]

_LISTED = 5  # columns


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """Features in a form that a model may take."""

    features: Array = field(repr=False)  # (rows, *anything)
    remark: str | None = None  # what a person should know of it
    fault: str | None = None  # why it cannot be trained on, even if the model takes it


def n_offers(table: Table) -> int:
    """Count the forms, which no model's dtype changes."""
    dtype = table.features_dtype
    return 2 if dtype is not None and dtype.kind in "iu" else 1


def offer(spec: ComputeSpec, table: Table, dtype: torch.dtype, choice: int) -> Offer:
    """Return one of the forms of the features to try on a model of `dtype`; the first, 0, is the one to prefer."""
    features, narrowed = table.features, table.narrowed
    if narrowed is not None and dtype != torch.float32:
        features, narrowed = narrowed.exact(), None
    assert features is not None
    inputs = "tensor" if spec.base is None else spec.base.inputs
    if features.dtype.names or (inputs != "tensor" and features.ndim == 2):
        return Offer(_records(table, features, narrowed, by_name=inputs == "dict", choice=choice))
    where, name = f"party {spec.party!r}: features", dtype_name(dtype)
    if narrowed is None:
        remark, fault = _looked_at(features, table.columns, name, where)
    else:
        remark, fault = _remark(narrowed.rounded, len(features), name, where), None
    if n_offers(table) == 1:
        return Offer(features, remark, fault)
    floating_first = spec.table_is_file and remark is fault is None
    if floating_first != (choice == 0):
        return Offer(features if narrowed is None else narrowed.exact())
    if narrowed is None:
        features = features.astype(np.float64 if dtype == torch.float64 else np.float32)
    return Offer(features, remark, fault)


def _records(table: Table, features: Array, narrowed: Narrowed | None, *, by_name: bool, choice: int) -> Array:
    """Make a record of each row; whole numbers are whole in the first form, and floating in the second."""
    if narrowed is not None and n_offers(table) == 2 and choice == 0:
        features = narrowed.exact()
    if not features.dtype.names:
        features = _by_column(features, table.columns if by_name else None)
    return _floating(features) if choice else features


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
    if largest > 2**bits:
        remark = _remark(
            _counted(features, columns, lambda part: rounded_whole(part, dtype)), len(features), dtype, where
        )
    if largest > limit and (bad := _counted(features, columns, lambda part: np.isinf(_cast(part, dtype)))):
        fault = (
            f"{where}: numbers larger than {limit:.3g} are infinite in {dtype}, in which the base model computes: "
            f"{_told(bad, len(features))}; scale them, or use a model of a wider dtype"
        )
    return remark, fault


def _remark(found: Mapping[str, int], rows: int, dtype: str, where: str) -> str | None:
    """Say which columns have whole numbers that are rounded."""
    if not found:
        return None
    return (
        f"{where}: whole numbers beyond 2**{BITS.get(dtype, 53)} are rounded in {dtype}, in which the base model "
        f"computes: {_told(found, rows)}; if they are codes, number them 0, 1, 2, ..., else scale them"
    )


def _counted(
    features: Array, columns: tuple[str, ...] | None, is_bad: Callable[[Array], npt.NDArray[np.bool_]]
) -> dict[str, int]:
    """Count the rows with bad values, by what has them."""
    found = {}
    for name, part in _parts(features, columns):
        bad = is_bad(part)
        if count := int(bad.reshape(len(bad), -1).any(axis=1).sum()):
            found[name] = count
    return found


def _told(found: Mapping[str, int], rows: int) -> str:
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(f"{name} in {count} of {rows} rows" for name, count in list(found.items())[:_LISTED]) + more


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

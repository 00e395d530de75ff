"""Remembered values compared, bit for bit."""

from operator import is_
from typing import Any
from weakref import ReferenceType

import torch

from sl_queue.compute.modules.remembered import (
    HARMLESS,
    SCALARS,
    Fixed,
    Instance,
    Items,
    Many,
    Numbers,
    Remembered,
    Scalar,
)


def same(one: Remembered, other: Remembered) -> bool:
    """Return True if two memories are of equal values, bit for bit."""
    match one, other:
        case Scalar(a), Scalar(b):
            return type(a) is type(b) and (repr(a) == repr(b) if type(a) is float else bool(a == b))
        case Fixed(a, inside), Fixed(b, other_inside):
            alike = a is b or _alike(a, b)
            return alike and (inside is None or other_inside is None or same(inside, other_inside))
        case Many(), Many():
            return type(one.held) is type(other.held) and one.size == other.size and _same_items(one, other)
        case Numbers(), Numbers():
            return one.kind == other.kind and _same_numbers(one, other)
        case Items(), Items():
            about = (one.kind, one.longest, len(one.items)) == (other.kind, other.longest, len(other.items))
            return about and all(map(same, one.items, other.items))
        case Instance(a), Instance(b):
            return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return False


def _alike(one: Any, other: Any) -> bool:
    """Return True if values that are no state are the same: two references to one object, two names of a device."""
    if isinstance(one, ReferenceType) and isinstance(other, ReferenceType):
        return True
    return isinstance(one, HARMLESS) and type(one) is type(other) and bool(one == other)


def _same_items(one: Many, other: Many) -> bool:
    if one.items is None or other.items is None:
        return one.held is other.held
    if isinstance(one.items, frozenset):
        return bool(one.items == other.items)
    return all(map(is_, one.items, other.items)) or all(
        a is b or same(_known(a), _known(b)) for a, b in zip(one.items, other.items, strict=True)
    )


def _known(item: Any) -> Remembered:
    return Scalar(item) if type(item) in SCALARS else item


def _same_numbers(one: Numbers, other: Numbers) -> bool:
    a, b = one.copy, other.copy
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and bool(torch.equal(a, b))

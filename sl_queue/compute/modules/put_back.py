"""Remembered values put back in place: into the objects that held them, as far as those are still there."""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sl_queue.compute.modules.inner import inner_name, set_inner
from sl_queue.compute.modules.remembered import (
    CONTAINERS,
    HOOKS,
    Fixed,
    Instance,
    Items,
    Many,
    Numbers,
    Remembered,
    Scalar,
    attributes_of,
    is_named_tuple,
    is_plain,
    of_a_library,
    remove_attributes,
    set_attributes,
)


def put_back(memory: Remembered, current: Any = None) -> Any:
    """Return the value as it was: in the object that held it, or in `current` where that has the shape of it."""
    match memory:
        case Scalar(value):
            return value
        case Fixed(held, inside):
            if inside is not None:
                put_back(inside)
            return held
        case Many():
            return _many_back(memory)
        case Numbers():
            return _numbers_back(memory, current if memory.held is None else memory.held)
        case Items():
            return items_back(memory, current if memory.held is None else memory.held)
        case Instance():
            return _instance_back(memory, current if memory.held is None else memory.held)


def _numbers_back(memory: Numbers, target: Any) -> Any:
    copy = memory.copy
    if memory.kind == "number":
        return copy.numpy()[()]
    if memory.kind == "array":
        if (
            not isinstance(target, np.ndarray)
            or target.shape != tuple(copy.shape)
            or target.dtype != copy.numpy().dtype
        ):
            return copy.numpy().copy()
        if target.flags.writeable:
            target[...] = copy.numpy()
        return target
    if not isinstance(target, Tensor) or not is_plain(target):
        return copy.clone()
    overwrite(target, copy)
    return target


def overwrite(tensor: Tensor, numbers: Tensor) -> None:
    """Give a tensor these numbers, and their dtype, shape and device, whatever it has now."""
    with torch.no_grad():
        if tensor.dtype != numbers.dtype or tensor.shape != numbers.shape or tensor.layout != torch.strided:
            tensor.data = numbers.detach().clone().to(tensor.device)
        elif not _holds(tensor, numbers):
            tensor.copy_(numbers)


def _holds(tensor: Tensor, numbers: Tensor) -> bool:
    """Return True if a tensor need not be written to; then its version does not change for others either."""
    try:
        return torch.equal(tensor, numbers.to(tensor.device))
    except (RuntimeError, NotImplementedError):  # of a dtype or device that cannot be compared
        return False


def items_back(memory: Items, target: Any) -> Any:
    named = memory.kind == "tuple" and is_named_tuple(target) and len(target) == len(memory.items)
    fits = (named or type(target) is CONTAINERS[memory.kind]) and getattr(target, "maxlen", None) == memory.longest
    if memory.kind in ("dict", "OrderedDict"):
        keys = [put_back(key) for key in memory.items[::2]]
        before = target if fits else {}
        values = [put_back(value, before.get(k)) for k, value in zip(keys, memory.items[1::2], strict=True)]
        return _refilled(target if fits else CONTAINERS[memory.kind](), dict(zip(keys, values, strict=True)))
    there = list(target) if fits and len(target) == len(memory.items) else [None] * len(memory.items)
    items = list(map(put_back, memory.items, there))
    if memory.kind == "tuple" and fits and len(items) == len(target) and all(map(_is, items, target)):
        return target
    if memory.kind in ("tuple", "Size", "frozenset"):
        return type(target)._make(items) if named else CONTAINERS[memory.kind](items)
    if not fits:
        target = deque(maxlen=memory.longest) if memory.kind == "deque" else CONTAINERS[memory.kind]()
    target.clear()
    target.update(items) if memory.kind == "set" else target.extend(items)
    return target


def _many_back(memory: Many) -> Any:
    held, items = memory.held, memory.items
    if items is None:
        return held
    if not isinstance(items, frozenset):
        items = [put_back(item) if isinstance(item, Remembered) else item for item in items]
    if isinstance(held, dict):
        half = len(items) // 2
        return _refilled(held, dict(zip(items[:half], items[half:], strict=True)))
    if isinstance(held, list | deque):
        held.clear()
        held.extend(items)
    return _refilled(held, items) if isinstance(held, set) else held


def _is(one: Any, other: Any) -> bool:
    return one is other


def _refilled(target: Any, items: Any) -> Any:
    target.clear()
    target.update(items)
    return target


def _instance_back(memory: Instance, target: Any) -> Any:
    if target is None:
        raise TypeError("an object that is not there")
    there = attributes_of(target)
    values = {name: put_back(value, there.get(name)) for name, value in memory.attributes.items()}
    if (inner := inner_name(target)) in values:
        target = set_inner(target, values.pop(inner))
        if of_a_library(target):
            return target
    remove_attributes(target, [name for name in there if name not in values and name not in HOOKS])
    set_attributes(target, values)
    return target

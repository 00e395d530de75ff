"""Plain values that a module keeps in its attributes: remembered as they are, compared, saved, and put back in place.

Numbers, text, tensors, arrays, generators of random numbers, containers of those, and objects that are made of those.
Everything else is `Fixed`: it can be put back as the object that it was, but not saved.
"""

import enum
import io
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

MOST_ITEMS = 1000  # of a container that a checkpoint carries
_LARGE_BYTES = 16 * 2**20  # a tensor that is compared by its version instead of its numbers
_SCALARS = (type(None), bool, int, float, str)
CONTAINERS: Mapping[str, type] = {
    c.__name__: c for c in (list, tuple, torch.Size, deque, set, frozenset, dict, OrderedDict)
}
_HARMLESS = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, enum.Enum, torch.dtype, torch.device)
NOT_OURS = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy", "builtins"}


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """A number, a text, or None."""

    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """A value of which only the identity is known, and the size of a container that is too large to carry."""

    held: Any = field(repr=False)
    size: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """A tensor or an array."""

    copy: Tensor = field(repr=False)
    kind: str  # "tensor", "array" or "number", NumPy's
    held: Any = field(repr=False, default=None)
    mark: tuple[int, int] | None = None  # address and version of a large tensor


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """A container; the items of a dict are its keys and values in turn."""

    kind: str  # a name in CONTAINERS
    items: "tuple[Remembered, ...]"
    held: Any = field(repr=False, default=None)
    longest: int | None = None  # of a deque


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """An object with attributes of its own, or a generator of random numbers with its state."""

    attributes: "Mapping[str, Remembered]"
    held: Any = field(repr=False, default=None)


Remembered = Scalar | Fixed | Numbers | Items | Instance


class Memory:
    """One pass over a module's attributes. Mutable: it knows what it has met, so that nothing is looked at twice."""

    def __init__(self, registered: Mapping[int, object]) -> None:
        self._registered = registered  # by id: what is saved elsewhere, parameters, buffers and submodules
        self._met: dict[int, Remembered] = {}

    def remember(self, value: Any) -> Remembered:
        """Return a copy of what can change in `value`."""
        if type(value) in _SCALARS:
            return Scalar(value)
        if id(value) in self._registered or isinstance(value, _HARMLESS):
            return Fixed(value)
        if id(value) not in self._met:
            self._met[id(value)] = Fixed(value)  # of a cycle
            self._met[id(value)] = self._looked_at(value)
        return self._met[id(value)]

    def _looked_at(self, value: Any) -> Remembered:
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, np.ndarray | np.generic):
            return _array(value)
        if is_named_tuple(value):
            return Items("tuple", tuple(map(self.remember, value)), value)
        if type(value).__name__ in CONTAINERS and type(value) is CONTAINERS[type(value).__name__]:
            return self._container(value)
        if (generator := generator_state(value)) is not None:
            return Instance({"state": self.remember(generator)}, value)
        names = _own_names(value)
        return Fixed(value) if names is None else self._instance(value, names)

    def _container(self, value: Any) -> Remembered:
        if len(value) > MOST_ITEMS:
            return Fixed(value, len(value))
        flat = [each for pair in value.items() for each in pair] if isinstance(value, dict) else list(value)
        if isinstance(value, set | frozenset):
            flat.sort(key=repr)
        items = tuple(self.remember(item) for item in flat)
        keys = items[::2] if isinstance(value, dict) else items if isinstance(value, set | frozenset) else ()
        if not all(map(_is_key, keys)):
            return Fixed(value, len(value))
        return Items(type(value).__name__, items, value, value.maxlen if isinstance(value, deque) else None)

    def _instance(self, value: Any, names: list[str]) -> Remembered:
        """Remember an object that holds plain values only; leave one with a lock, a file or a thread alone."""
        own = attributes_of(value)
        attributes = {name: self.remember(own[name]) for name in names}
        plain = all(not isinstance(a, Fixed) or self._is_harmless(a.held) for a in attributes.values())
        return Instance(attributes, value) if plain else Fixed(value)

    def _is_harmless(self, held: Any) -> bool:
        return id(held) in self._registered or isinstance(held, (*_HARMLESS, nn.Module, OrderedDict, list, dict))


def _tensor(value: Tensor) -> Remembered:
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        return Fixed(value)
    if not isinstance(value, nn.Parameter) and type(value) is not Tensor:
        return Fixed(value)
    mark = (value.data_ptr(), value._version) if value.nbytes > _LARGE_BYTES else None
    return Numbers(value.detach().clone(), "tensor", value, mark)


def _array(value: Any) -> Remembered:
    kind = "array" if isinstance(value, np.ndarray) else "number"
    try:
        return Numbers(torch.from_numpy(np.array(value)), kind, value)
    except (TypeError, ValueError):  # text, objects, another byte order
        return Fixed(value)


def _is_key(key: Remembered) -> bool:
    return isinstance(key, Scalar) or (isinstance(key, Items) and key.kind == "tuple" and all(map(_is_key, key.items)))


def _own_names(value: Any) -> list[str] | None:
    """Return the attributes of an object of the user's own or of a library built on torch; None of any other."""
    if isinstance(value, nn.Module):
        return [n for n in vars(value) if n not in HOOKS]
    root = type(value).__module__.partition(".")[0]
    if (
        (root in NOT_OURS and not isinstance(value, LRScheduler))
        or is_iterator(value)
        or not (hasattr(value, "__dict__") or _slots_of(value))
    ):
        return None
    return None if isinstance(value, BaseException | dict | list | tuple | set) else list(attributes_of(value))


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots among them."""
    slots = {name: getattr(value, name) for name in _slots_of(value) if hasattr(value, name)}
    return slots | getattr(value, "__dict__", {})


def set_attributes(value: Any, attributes: Mapping[str, Any]) -> None:
    """Give an object these attributes, a frozen one too."""
    slots = _slots_of(value)
    for name, attribute in attributes.items():
        if name in slots:
            object.__setattr__(value, name, attribute)
        else:
            vars(value)[name] = attribute


def _slots_of(value: Any) -> set[str]:
    each = (found for kind in type(value).__mro__ for found in vars(kind).items())
    return {name for name, found in each if isinstance(found, MemberDescriptorType)}


def is_named_tuple(value: Any) -> bool:
    """Tell whether a value is a tuple whose items have names."""
    return isinstance(value, tuple) and hasattr(type(value), "_make") and type(value) is not tuple


HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)


def is_iterator(value: Any) -> bool:
    """Return True for an iterator: it stands somewhere in a sequence, which nothing can save."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase)


# Generators of random numbers -----------------------------------------------------------------------------------


def generator_state(value: Any) -> Any:
    """Return the state of a generator of random numbers in plain values; None of anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if type(value) is Random:
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return value.get_state(legacy=False) if isinstance(value, np.random.RandomState) else None


def set_generator_state(value: Any, state: Any) -> None:
    if isinstance(value, torch.Generator | np.random.RandomState):
        value.set_state(state)
    elif isinstance(value, Random):
        value.setstate(state)
    else:
        value.bit_generator.state = state


# Comparing ------------------------------------------------------------------------------------------------------


def same(one: Remembered, other: Remembered) -> bool:
    """Return True if two memories are of equal values, bit for bit."""
    match one, other:
        case Scalar(a), Scalar(b):
            return type(a) is type(b) and (repr(a) == repr(b) if type(a) is float else bool(a == b))
        case Fixed(a, n), Fixed(b, m):
            return (a is b or _alike(a, b)) and n == m
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
    return isinstance(one, _HARMLESS) and type(one) is type(other) and bool(one == other)


def _same_numbers(one: Numbers, other: Numbers) -> bool:
    if one.mark is not None and one.mark == other.mark and one.held is other.held:
        return True
    a, b = one.copy, other.copy
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and bool(torch.equal(a, b))

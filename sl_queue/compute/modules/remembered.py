"""Plain values that a module keeps in its attributes: remembered as they are, to be compared, saved, and put back.

Numbers, text, tensors, arrays, generators of random numbers, containers of those, and objects that are made of those.
Everything else is `Fixed`, or `Many`: it can be put back as the object that it was, but not saved.
"""

import enum
import io
import sys
from argparse import Namespace
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from sl_queue.compute.modules.inner import inner_name, inner_of

MOST_ITEMS = 1000  # of a container that a checkpoint carries
_MOST_LOOKED_AT = 10_000  # items of a larger one that are looked into, where they are more than scalars
SCALARS = (type(None), bool, int, float, str)
CONTAINERS: Mapping[str, type] = {
    c.__name__: c for c in (list, tuple, torch.Size, deque, set, frozenset, dict, OrderedDict)
}
_OF_LIBRARIES = (
    LRScheduler,
    SimpleNamespace,
    Namespace,
    UserDict,
    UserList,
    ChainMap,
    torch.distributions.Distribution,
    torch.distributions.Transform,
)
HARMLESS = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, enum.Enum, torch.dtype, torch.device)
NOT_OURS = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy", "builtins"}


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """A number, a text, or None."""

    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """A value that no checkpoint carries; of most only the identity is known."""

    held: Any = field(repr=False)
    inside: "Remembered | None" = None  # what in it may change


@dataclass(frozen=True, slots=True, eq=False)
class Many:
    """A container that no checkpoint carries: it has too many items, or keys that are no values."""

    held: Any = field(repr=False)
    size: int
    items: Any = field(repr=False)  # scalars and memories; a set's as they are; None: too many to look into


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """A tensor or an array."""

    copy: Tensor = field(repr=False)
    kind: str  # "tensor", "array" or "number", NumPy's
    held: Any = field(repr=False, default=None)


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """A container; the items of a dict are its keys and values in turn."""

    kind: str  # a name in CONTAINERS
    items: "tuple[Remembered, ...]"
    held: Any = field(repr=False, default=None)
    longest: int | None = None  # of a deque


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """An object with attributes of its own; what it keeps elsewhere is the one called INNER, of a generator STATE."""

    attributes: "Mapping[str, Remembered]"
    held: Any = field(repr=False, default=None)


Remembered = Scalar | Fixed | Many | Numbers | Items | Instance


class Memory:
    """One pass over a module's attributes. Mutable: it knows what it has met, so that nothing is looked at twice."""

    def __init__(self, registered: Mapping[int, object], copies: bool = True) -> None:
        self._registered = registered  # by id: what is saved elsewhere, parameters, buffers and submodules
        self._copies = copies  # of tensors; without, for a memory that is gone before they change
        self._met: dict[int, Remembered] = {}

    def remember(self, value: Any) -> Remembered:
        """Return a copy of what can change in `value`."""
        if type(value) in SCALARS:
            return Scalar(value)
        if id(value) in self._registered or isinstance(value, HARMLESS):
            return Fixed(value)
        if id(value) not in self._met:
            self._met[id(value)] = Fixed(value)  # of a cycle
            self._met[id(value)] = self._looked_at(value)
        return self._met[id(value)]

    def _looked_at(self, value: Any) -> Remembered:
        if isinstance(value, Tensor) and is_plain(value):
            return Numbers(value.detach().clone() if self._copies else value.detach(), "tensor", value)
        if isinstance(value, np.ndarray | np.generic) and (numbers := _array(value)) is not None:
            return numbers
        if is_named_tuple(value):
            return Items("tuple", tuple(map(self.remember, value)), value)
        if type(value).__name__ in CONTAINERS and type(value) is CONTAINERS[type(value).__name__]:
            return self._container(value)
        if (inner := inner_of(value)) is not None:
            return self._with_inner(value, inner)
        if (parts := _parts(value)) is not None:
            return Fixed(value, self.remember(parts))
        names = _own_names(value)
        return Fixed(value) if names is None else self._instance(value, names)

    def _container(self, value: Any) -> Remembered:
        if len(value) > MOST_ITEMS:
            return self._many(value)
        flat = [each for pair in value.items() for each in pair] if isinstance(value, dict) else list(value)
        if isinstance(value, set | frozenset):
            flat.sort(key=repr)
        items = tuple(self.remember(item) for item in flat)
        keys = items[::2] if isinstance(value, dict) else items if isinstance(value, set | frozenset) else ()
        may_refer = isinstance(value, dict)
        if not all(_is_key(k) or (may_refer and isinstance(k, Fixed) and self._knows(k.held)) for k in keys):
            return self._many(value)
        return Items(type(value).__name__, items, value, value.maxlen if isinstance(value, deque) else None)

    def _many(self, value: Any) -> Many:
        if isinstance(value, set | frozenset):
            return Many(value, len(value), frozenset(value))
        flat = (*value, *value.values()) if isinstance(value, dict) else tuple(value)
        if set(map(type, flat)).issubset(SCALARS):
            return Many(value, len(value), flat)
        if len(flat) > _MOST_LOOKED_AT:
            return Many(value, len(value), None)
        return Many(value, len(value), tuple(v if type(v) in SCALARS else self.remember(v) for v in flat))

    def _with_inner(self, value: Any, inner: Any) -> Instance:
        """Remember an object by what it keeps elsewhere, and by its attributes."""
        own = {} if of_a_library(value) else {n: self.remember(v) for n, v in attributes_of(value).items()}
        return Instance({inner_name(value): self.remember(inner), **own}, value)

    def _instance(self, value: Any, names: list[str]) -> Remembered:
        """Remember an object that holds plain values only; leave one with a lock, a file or a thread alone."""
        own = attributes_of(value)
        attributes = {name: self.remember(own[name]) for name in names}
        plain = all(not isinstance(a, Fixed) or self._is_harmless(a.held) for a in attributes.values())
        return Instance(attributes, value) if plain else Fixed(value)

    def _is_harmless(self, held: Any) -> bool:
        return self._knows(held) or isinstance(held, (*HARMLESS, partial, nn.Module, OrderedDict, list, dict))

    def _knows(self, held: Any) -> bool:
        return id(held) in self._registered


def is_plain(value: Tensor) -> bool:
    """Tell whether a tensor is dense numbers, and of no class of its own."""
    dense = value.layout == torch.strided and not value.is_quantized and value.device.type != "meta"
    return dense and not is_lazy(value) and (type(value) is Tensor or isinstance(value, nn.Parameter))


def _array(value: Any) -> Numbers | None:
    kind = "array" if isinstance(value, np.ndarray) else "number"
    try:
        return Numbers(torch.from_numpy(np.array(value)), kind, value)
    except (TypeError, ValueError):  # text, objects, another byte order
        return None


def _parts(value: Any) -> tuple[Any, ...] | None:
    """Return what may change in a value that cannot be saved or made again; None of one that is left alone."""
    if isinstance(value, partial):
        return (value.args, value.keywords)
    if isinstance(value, np.random.SeedSequence):
        return (value.state,)
    return tuple(value) if isinstance(value, tuple) else None


def _is_key(key: Remembered) -> bool:
    return isinstance(key, Scalar) or (isinstance(key, Items) and key.kind == "tuple" and all(map(_is_key, key.items)))


def _own_names(value: Any) -> list[str] | None:
    """Return the attributes of an object of the user's own or of a library built on torch; None of any other."""
    if isinstance(value, nn.Module):
        return [n for n in vars(value) if n not in HOOKS]
    if (
        (of_a_library(value) and not isinstance(value, _OF_LIBRARIES))
        or is_iterator(value)
        or not (hasattr(value, "__dict__") or _slots_of(value))
    ):
        return None
    return None if isinstance(value, BaseException) else list(attributes_of(value))


def of_a_library(value: Any) -> bool:
    """Tell whether a value is of a class of Python's, NumPy's or torch's."""
    return type(value).__module__.partition(".")[0] in NOT_OURS


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


def remove_attributes(value: Any, names: Iterable[str]) -> None:
    """Take attributes from an object, a frozen one too."""
    slots = _slots_of(value)
    for name in names:
        if name in slots:
            object.__delattr__(value, name)
        else:
            vars(value).pop(name, None)


def _slots_of(value: Any) -> set[str]:
    each = (found for kind in type(value).__mro__ for found in vars(kind).items())
    return {name for name, found in each if isinstance(found, MemberDescriptorType) and not name.startswith("__")}


def is_named_tuple(value: Any) -> bool:
    """Tell whether a value is a tuple whose items have names."""
    return isinstance(value, tuple) and hasattr(type(value), "_make") and type(value) is not tuple


HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)


def is_iterator(value: Any) -> bool:
    """Return True for an iterator: it stands somewhere in a sequence, which nothing can save."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase)

"""Remembered values as a checkpoint holds them: JSON values, with tensors beside."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sl_queue.compute.modules.inner import INNER, inner_name, inner_of, set_inner
from sl_queue.compute.modules.put_back import items_back, put_back
from sl_queue.compute.modules.remembered import (
    CONTAINERS,
    Fixed,
    Instance,
    Items,
    Many,
    Numbers,
    Remembered,
    Scalar,
    attributes_of,
    is_named_tuple,
    set_attributes,
)
from sl_queue.compute.modules.sameness import same

MOST_BYTES = 4 * 2**20  # of a tensor that was not there when the module was built


class NotCarriedError(Exception):
    """A value at `path` that no checkpoint can carry."""

    def __init__(self, path: str, value: object) -> None:
        super().__init__(path)
        self.path, self.value = path, value


def saved(memory: Remembered, built: Remembered | None, path: str, keep: Callable[[str, Tensor], None]) -> Any:
    """Return a memory as JSON values; its tensors are handed to `keep` by their paths. Raises NotCarriedError.

    `built` is what was there when the module was built: objects are carried only in the place of their like, and large
    tensors only where there was one before, since what a forward newly makes is most often made to be looked at.
    """
    match memory:
        case Scalar(value):
            return value
        case Numbers():
            if memory.copy.nbytes > MOST_BYTES and not isinstance(built, Numbers):
                raise NotCarriedError(path, memory.held)
            keep(path, memory.copy)
            return {memory.kind: path}
        case Items():
            before = _of_as_many(built, len(memory.items))
            items = [
                saved(m, b, f"{path}[{i}]", keep) for i, (m, b) in enumerate(zip(memory.items, before, strict=True))
            ]
            return {memory.kind: items} | ({"longest": memory.longest} if memory.kind == "deque" else {})
        case Instance():
            if not isinstance(built, Instance) or type(built.held) is not type(memory.held):
                raise NotCarriedError(path, memory.held)
            found = {}
            for name, value in _carried(memory, built).items():
                where = path if name == INNER else f"{path}.{name}"
                found[name] = saved(value, built.attributes.get(name), where, keep)
            return {"object": found}
        case Fixed(held) | Many(held):
            raise NotCarriedError(path, held)


def _of_as_many(built: Remembered | None, n: int) -> tuple[Remembered | None, ...]:
    return built.items if isinstance(built, Items) and len(built.items) == n else (None,) * n


def _carried(memory: Instance, built: Instance) -> Mapping[str, Remembered]:
    """Return what an object holds, without what cannot be saved and is what it was: its code brings that."""

    def stays(name: str, value: Remembered) -> bool:
        return isinstance(value, Fixed | Many) and name in built.attributes and same(value, built.attributes[name])

    return {name: value for name, value in memory.attributes.items() if not stays(name, value)}


def read(value: Any, tensor_of: Callable[[str], Tensor], current: Any = None) -> Any:
    """Return what `saved` was called for, put into `current` where that is of the same kind."""
    if not isinstance(value, dict):
        return value
    kind, content = next((k, v) for k, v in value.items() if k != "longest")
    if kind in ("tensor", "array", "number"):
        return put_back(Numbers(tensor_of(content), kind), current)
    if kind != "object":
        return _read_items(kind, content, value.get("longest"), tensor_of, current)
    if current is None:
        raise NotCarriedError("", None)
    there, inner = attributes_of(current), inner_name(current)
    found = {n: read(attribute, tensor_of, there.get(n)) for n, attribute in content.items() if n != inner}
    if inner in content:
        current = set_inner(current, read(content[inner], tensor_of, inner_of(current)))
    set_attributes(current, found)
    return current


def _read_items(kind: str, content: Any, longest: int | None, tensor_of: Callable[[str], Tensor], current: Any) -> Any:
    fits = type(current) is CONTAINERS[kind] or (kind == "tuple" and is_named_tuple(current))
    if kind in ("dict", "OrderedDict"):
        keys = [read(key, tensor_of) for key in content[::2]]
        there: list[Any] = [current.get(key) if fits else None for key in keys]
        content = content[1::2]
    else:
        there = list(current) if fits and len(current) == len(content) else [None] * len(content)
    items = [read(item, tensor_of, before) for item, before in zip(content, there, strict=True)]
    if kind in ("dict", "OrderedDict"):
        items = [each for pair in zip(keys, items, strict=True) for each in pair]
    memory = Items(kind, tuple(map(Fixed, items)), None, longest)
    return items_back(memory, current)

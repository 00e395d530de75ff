"""Remembered values as a checkpoint holds them: JSON values, with tensors beside."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sl_queue.compute.modules.put_back import items_back, put_back
from sl_queue.compute.modules.remembered import (
    CONTAINERS,
    Fixed,
    Instance,
    Items,
    Numbers,
    Remembered,
    Scalar,
    attributes_of,
    generator_state,
    is_named_tuple,
    set_attributes,
    set_generator_state,
)

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
            return {
                "object": {
                    n: saved(a, built.attributes.get(n), f"{path}.{n}", keep) for n, a in _carried(memory).items()
                }
            }
        case Fixed(held):
            raise NotCarriedError(path, held)


def _of_as_many(built: Remembered | None, n: int) -> tuple[Remembered | None, ...]:
    return built.items if isinstance(built, Items) and len(built.items) == n else (None,) * n


def _carried(memory: Instance) -> Mapping[str, Remembered]:
    """Return what an object holds, without functions, classes and submodules, which its code or module brings."""
    return {name: value for name, value in memory.attributes.items() if not isinstance(value, Fixed)}


def read(value: Any, tensor_of: Callable[[str], Tensor], current: Any = None) -> Any:
    """Return what `saved` was called for, put into `current` where that is of the same kind."""
    if not isinstance(value, dict):
        return value
    kind, content = next((k, v) for k, v in value.items() if k != "longest")
    if kind in ("tensor", "array", "number"):
        return put_back(Numbers(tensor_of(content), kind), current)
    if kind != "object":
        return _read_items(kind, content, value.get("longest"), tensor_of, current)
    if generator_state(current) is not None:
        set_generator_state(current, read(content["state"], tensor_of))
        return current
    if current is None:
        raise NotCarriedError("", None)
    there = attributes_of(current)
    set_attributes(current, {n: read(attribute, tensor_of, there.get(n)) for n, attribute in content.items()})
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

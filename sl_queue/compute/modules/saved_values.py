"""Remembered values as a checkpoint holds them: JSON values, with tensors beside."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
    remove_attributes,
    set_attributes,
)
from sl_queue.compute.modules.sameness import same
from sl_queue.compute.modules.shared_objects import SharedObjects, changeable, in_order

MOST_BYTES = 4 * 2**20  # of a tensor that was not there when the module was built
_DICTS = ("dict", "OrderedDict")
_BESIDE = ("longest", "gone")  # about a value, beside its kind


class NotCarriedError(Exception):
    """A value at `path` that no checkpoint can carry."""

    def __init__(self, path: str, value: object) -> None:
        super().__init__(path)
        self.path, self.value = path, value


@dataclass(frozen=True, slots=True)
class Before:
    """Values as they were, by name, to tell which of them have changed."""

    values: Mapping[str, Remembered]
    shared: SharedObjects

    @classmethod
    def of(cls, values: Mapping[str, Remembered]) -> "Before":
        """Take what one pass has remembered."""
        return cls(values, SharedObjects.of(values))

    @property
    def apart(self) -> bool:
        """Tell whether a checkpoint must say that its objects are apart where it does not say that they are one."""
        return bool(self.shared.again)

    def changes(
        self, now: Mapping[str, Remembered], writing: "Writing"
    ) -> tuple[dict[str, Any], list[NotCarriedError]]:
        """Return what has changed as JSON values, and what of that cannot be carried."""
        shared = SharedObjects.of(now)
        changed = self._changed(now, shared)
        writing.first = dict(shared.first)
        for name in now.keys() - changed:
            writing.leave(self.values[name], now[name])
        found, lost = {}, []
        for name in sorted(changed):
            writing.owner = name
            try:
                found[name] = writing.saved(now[name], self.values.get(name), name)
            except NotCarriedError as error:
                lost.append(error)
                writing.absent.add(name)
        return found, lost

    def _changed(self, now: Mapping[str, Remembered], shared: SharedObjects) -> set[str]:
        """Name what is not what it was, shares other objects than before, or shares one with such."""
        changed = set[str]()
        for name in sorted(now):
            before, links = self.values.get(name), shared.again.get(name, ())
            stays = before is not None and same(now[name], before) and links == self.shared.again.get(name, ())
            if not stays or any(owner in changed for _, owner, _ in links):
                changed.add(name)
        return changed


@dataclass(slots=True)
class Writing:
    """One checkpoint, written. Mutable: it knows what it has met."""

    keep: Callable[[str, Tensor], None]  # takes tensors by their paths
    names: Mapping[int, str]  # of parameters, buffers and submodules, by id
    absent: set[str] = field(default_factory=set)  # names of values that will not be there to refer to
    most_bytes: float = MOST_BYTES  # of a new tensor
    first: dict[int, tuple[str, str]] = field(default_factory=dict)  # as of SharedObjects
    owner: str = ""  # the name of what is being written
    _places: dict[int, int] = field(default_factory=dict)  # by id of what was built: which memory goes in its place

    def leave(self, built: Remembered, memory: Remembered) -> None:
        """Keep the places of a value that is what it was."""
        pairs = zip(changeable(built, ""), changeable(memory, ""), strict=True)
        self._places |= {id(before): id(after) for (_, before), (_, after) in pairs}

    def saved(self, memory: Remembered, built: Remembered | None, path: str) -> Any:
        """Return a memory as JSON values. Raises NotCarriedError.

        `built` is what was there when the module was built: objects are carried only in the place of their like, and
        large tensors only where there was one before, since what a forward newly makes is most often made to be looked
        at. An object that was met before is referred to.
        """
        owner, where = self.first.get(id(memory), ("", path))
        if where != path and owner not in self.absent:
            return {"same": where}
        if where != path:
            self.first[id(memory)] = (self.owner, path)
        match memory:
            case Scalar(value):
                return value
            case Numbers():
                if memory.copy.nbytes > self.most_bytes and not isinstance(built, Numbers):
                    raise NotCarriedError(path, memory.held)
                self.keep(path, memory.copy)
                return {memory.kind: path}
            case Items():
                before = _of_as_many(built, len(memory.items))
                pairs = enumerate(zip(memory.items, before, strict=True))
                items = [self.saved(m, b, f"{path}[{i}]") for i, (m, b) in pairs]
                return {memory.kind: items} | ({"longest": memory.longest} if memory.kind == "deque" else {})
            case Instance():
                return self._object(memory, built, path)
            case Fixed(held) | Many(held):
                if id(held) in self.names:
                    return {"same": self.names[id(held)]}
                raise NotCarriedError(path, held)

    def _object(self, memory: Instance, built: Remembered | None, path: str) -> Any:
        like = isinstance(built, Instance) and type(built.held) is type(memory.held)
        if not isinstance(built, Instance) or not like or self._places.setdefault(id(built), id(memory)) != id(memory):
            raise NotCarriedError(path, memory.held)
        found = {}
        for name, value in in_order(memory.attributes):
            before = built.attributes.get(name)
            if isinstance(value, Fixed | Many) and before is not None and same(value, before):
                continue  # its code brings it
            found[name] = self.saved(value, before, path if name == INNER else f"{path}.{name}")
        gone = sorted(built.attributes.keys() - memory.attributes.keys(), key=str)
        return {"object": found} | ({"gone": gone} if gone else {})


def _of_as_many(built: Remembered | None, n: int) -> tuple[Remembered | None, ...]:
    return built.items if isinstance(built, Items) and len(built.items) == n else (None,) * n


@dataclass(slots=True)
class Reading:
    """One checkpoint, read. Mutable: it knows what it has read, and where that went."""

    tensor_of: Callable[[str], Tensor]
    known: dict[str, Any]  # parameters, buffers and submodules by name; then all that is read, by path
    apart: bool  # what is not said to be one object is two, even if it was one: not so in older checkpoints
    _taken: dict[int, Any] = field(default_factory=dict)  # by id
    _registered: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._registered = {id(each) for each in self.known.values()}

    def leave(self, values: Mapping[str, Remembered]) -> None:
        """Know what is what it was."""
        for name, memory in values.items():
            for path, each in changeable(memory, name):
                self._know(path, getattr(each, "held", None))

    def read(self, value: Any, path: str, current: Any = None) -> Any:
        """Return what `saved` was called for at `path`, put into `current` where that is of the same kind."""
        if not isinstance(value, dict):
            return value
        kind, content = next((k, v) for k, v in value.items() if k not in _BESIDE)
        if kind == "same":
            return self.known[content]
        if id(current) in self._registered or (self.apart and id(current) in self._taken):
            current = None  # it is another's
        if kind in ("tensor", "array", "number"):
            found = put_back(Numbers(self.tensor_of(content), kind), current)
        elif kind == "object":
            found = self._read_object(content, value.get("gone", ()), path, current)
        else:
            found = self._read_items(kind, content, value.get("longest"), path, current)
        return found if kind in ("number", "tuple", "Size", "frozenset") else self._know(path, found)

    def _know(self, path: str, found: Any) -> Any:
        self.known[path] = found
        self._taken[id(found)] = found
        return found

    def _read_object(self, content: Mapping[str, Any], gone: Iterable[str], path: str, current: Any) -> Any:
        if current is None:
            raise NotCarriedError(path, None)
        there, inner = attributes_of(current), inner_name(current)
        found = {n: self.read(content[n], f"{path}.{n}", there.get(n)) for n in sorted(content) if n != inner}
        if inner in content:
            current = set_inner(current, self.read(content[inner], path, inner_of(current)))
        remove_attributes(current, gone)
        set_attributes(current, found)
        return current

    def _read_items(self, kind: str, content: Any, longest: int | None, path: str, current: Any) -> Any:
        fits = type(current) is CONTAINERS[kind] or (kind == "tuple" and is_named_tuple(current))
        there: list[Any] = list(current) if fits and len(current) == len(content) else [None] * len(content)
        if kind in _DICTS:
            keys = [self.read(key, path) for key in content[::2]]
            there = [each for key in keys for each in (None, current.get(key) if fits else None)]
        items = [self.read(v, f"{path}[{i}]", b) for i, (v, b) in enumerate(zip(content, there, strict=True))]
        return items_back(Items(kind, tuple(map(Fixed, items)), None, longest), current)

"""Objects that several attributes hold: found, so that a checkpoint says of them that they are one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sl_queue.compute.modules.inner import INNER
from sl_queue.compute.modules.remembered import Instance, Items, Numbers, Remembered, Scalar

_CHANGEABLE = frozenset({"list", "deque", "set", "dict", "OrderedDict"})


@dataclass(frozen=True, slots=True)
class SharedObjects:
    """Objects by the place at which each is met first, attributes taken by name; and where they are met again."""

    first: Mapping[int, tuple[str, str]] = field(repr=False)  # attribute and path, by the id of a memory
    again: Mapping[str, tuple[tuple[str, str, str], ...]]  # by attribute: a path in it, attribute and path of the first

    @classmethod
    def of(cls, values: Mapping[str, Remembered]) -> "SharedObjects":
        """Look through what one pass has remembered."""
        first: dict[int, tuple[str, str]] = {}
        again = {}
        for name in sorted(values):
            met = [(path, *first.setdefault(id(each), (name, path))) for path, each in changeable(values[name], name)]
            if links := tuple(link for link in met if link[0] != link[2]):
                again[name] = links
        return cls(first, again)


def in_order(attributes: Mapping[str, Remembered]) -> list[tuple[str, Remembered]]:
    """Return attributes in the order in which they are written and read: what an object keeps elsewhere comes last."""
    return sorted(attributes.items(), key=lambda each: (each[0] == INNER, str(each[0])))


def changeable(memory: Remembered, path: str, met: set[int] | None = None) -> Iterator[tuple[str, Remembered]]:
    """Yield what can be changed in place, with its path; not again what is in an object that was met before."""
    met = set() if met is None else met
    if isinstance(memory, Numbers):
        if memory.kind != "number":
            yield path, memory
    elif isinstance(memory, Items | Instance):
        if isinstance(memory, Instance) or memory.kind in _CHANGEABLE:
            yield path, memory
            if id(memory) in met:
                return
            met.add(id(memory))
        yield from _within(memory, path, met)


def _within(memory: Items | Instance, path: str, met: set[int]) -> Iterator[tuple[str, Remembered]]:
    if isinstance(memory, Items):
        for place, item in enumerate(memory.items):
            if not isinstance(item, Scalar):
                yield from changeable(item, f"{path}[{place}]", met)
        return
    for name, value in in_order(memory.attributes):
        if name == INNER and isinstance(value, Items):
            yield from _within(value, path, met)
        elif name != INNER:
            yield from changeable(value, f"{path}.{name}", met)

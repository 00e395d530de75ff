"""Plain values beside a module: in its classes, and in what its methods close over or name.

All modules of a class share them, and so may other parties of this process: no checkpoint of one module can carry them.
They are looked at in each commit, so only what is small: numbers and text, short containers of these, small tensors.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn

from sl_queue.compute.modules.remembered import MOST_ITEMS, NOT_OURS, Memory, Remembered
from sl_queue.compute.modules.sameness import same
from sl_queue.compute.modules.saved_values import MOST_BYTES, NotCarriedError

_SCALARS = (type(None), bool, int, float, str)


@dataclass(frozen=True, slots=True)
class SharedValues:
    """Values as they were before the module's first step, to tell which of them a step changes."""

    module: nn.Module = field(repr=False)
    before: dict[str, Remembered] = field(repr=False)

    @classmethod
    def of(cls, module: nn.Module) -> "SharedValues":
        """Remember them as they are now."""
        memory = Memory({})
        return cls(module, {name: memory.remember(value) for name, value in _found(module)})

    def changed(self) -> Iterator[NotCarriedError]:
        """Yield those that differ now."""
        memory = Memory({}, copies=False)
        for name, value in _found(self.module):
            before = self.before.get(name)
            if before is None or not same(memory.remember(value), before):
                yield NotCarriedError(name, value)


def _is_small(value: Any) -> bool:
    if isinstance(value, np.ndarray | Tensor):
        return value.nbytes <= MOST_BYTES
    if isinstance(value, list | tuple | set | deque | dict):
        items = (*value, *value.values()) if isinstance(value, dict) else value
        return len(value) <= MOST_ITEMS and all(isinstance(item, _SCALARS) for item in items)
    return isinstance(value, _SCALARS)


def _found(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield names and values, of classes that are not torch's."""
    kinds = dict.fromkeys(kind for each in module.modules() for kind in type(each).__mro__)
    for kind in (kind for kind in kinds if kind.__module__.partition(".")[0] not in NOT_OURS):
        for name, value in tuple(vars(kind).items()):
            if isinstance(value, FunctionType):
                yield from _beside(value)
            elif _is_small(value) and not name.startswith("__"):
                yield f"{kind.__name__}.{name}", value


def _beside(method: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the plain values that a method closes over, and the global ones that it names."""
    code = method.__code__
    for name, cell in zip(code.co_freevars, method.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue
        if _is_small(value):
            yield f"{name} of {method.__qualname__}", value
    for name in code.co_names:
        if _is_small(value := method.__globals__.get(name, len)) and not name.startswith("__"):
            yield f"{method.__module__}.{name}", value

"""One side of a module that was split: layers under the names of the whole, and the steps that call them.

The steps are plain values, so that a part is copied, saved and written down as any other module is.
"""

import builtins
import math
import operator
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from sl_queue.errors import JobError

Step = dict[str, Any]  # name, op, target, args, kwargs
Names = Any  # of values that enter or leave: one name, a list of such, or a dict of them
_HOMES = {
    "operator": operator,
    "torch": torch,
    "torch.nn.functional": nn.functional,
    "math": math,
    "builtins": builtins,
}
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout)


class Part(nn.Module):
    """Steps over layers. A base model's part takes its party's rows, a fuse model's a list of what the bases return."""

    def __init__(self, takes: Names, steps: Sequence[Step], returns: Any) -> None:
        super().__init__()
        self.takes, self.steps, self.returns = takes, list(steps), returns

    def forward(self, inputs: Any) -> Any:
        """Compute the part's outputs."""
        values: dict[str, Any] = {}
        _bind(self.takes, inputs, values)
        for step in self.steps:
            args, kwargs = _read(step["args"], values), _read(step["kwargs"], values)
            values[step["name"]] = self._do(step["op"], step["target"], args, kwargs)
        return _read(self.returns, values)

    def _do(self, op: str, target: str, args: Any, kwargs: Any) -> Any:
        match op:
            case "call_module":
                return self.get_submodule(target)(*args, **kwargs)
            case "call_function":
                return _function(target)(*args, **kwargs)
            case "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
        found: Any = self
        for name in target.split("."):
            found = getattr(found, name)
        return found


def _bind(names: Names, given: Any, values: dict[str, Any]) -> None:
    """Note what has entered under its names."""
    if isinstance(names, str):
        values[names] = given
        return
    pairs = [(n, given[k]) for k, n in names.items()] if isinstance(names, Mapping) else zip(names, given, strict=True)
    for name, value in pairs:
        _bind(name, value, values)


# Steps as plain values --------------------------------------------------------------------------------------------


def step_of(node: Node) -> Step:
    """Write a node of a graph down as a step. Raises JobError for an argument that is no plain value."""
    target = function_name(node.target) if node.op == "call_function" else str(node.target)
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": written(tuple(node.args)),
        "kwargs": written(dict(node.kwargs)),
    }


def written(value: Any) -> Any:
    """Return an argument as a plain value: nodes by name, in which alone a dict occurs."""
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [written(value.start), written(value.stop), written(value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, Mapping):
        return {"table": [[key, written(inner)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        items = [written(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, _PLAIN):
        return value
    raise JobError(f"a {type(value).__name__} stands in the module's code, which no split carries")


def _read(value: Any, values: Mapping[str, Any]) -> Any:
    """Undo `written`, with the values that the names have."""
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        match kind:
            case "node":
                return values[content]
            case "slice":
                return slice(*(_read(item, values) for item in content))
            case "table":
                return {key: _read(inner, values) for key, inner in content}
        return Ellipsis
    if isinstance(value, list | tuple):
        items = [_read(item, values) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def function_name(function: Any) -> str:
    """Return where a function is found, as module:name. Raises JobError for one without a name."""
    name = getattr(function, "__name__", "")
    for home, module in _HOMES.items():
        if getattr(module, name, None) is function:
            return f"{home}:{name}"
    told = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', name)}"
    try:
        found = _function(told)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not function:
        raise JobError(f"the module calls {told!r}, which cannot be found again by that name")
    return told


@cache
def _function(name: str) -> Any:
    home, _, path = name.partition(":")
    found: Any = _HOMES.get(home) or import_module(home)
    for part in path.split("."):
        found = getattr(found, part)
    return found

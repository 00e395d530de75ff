"""A module put back as it was, in the same process and in the same objects: after a trial, and after a run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sl_queue.compute.modules.put_back import overwrite, put_back
from sl_queue.compute.modules.remembered import Remembered
from sl_queue.compute.modules.state import LENT, OWN, Contents, plain_attributes, set_attribute


@dataclass(frozen=True, slots=True)
class _Kept:
    """A parameter or buffer, the memory that it had, and the numbers therein."""

    tensor: Tensor = field(repr=False)
    kind: type
    memory: Tensor | None = field(repr=False)  # None: a lazy one, without a shape
    numbers: Tensor | None = field(repr=False)
    learns: bool
    gradient: Tensor | None = field(repr=False)

    @classmethod
    def of(cls, tensor: Tensor) -> "_Kept":
        about = (tensor.requires_grad, tensor.grad if tensor.is_leaf else None)
        if is_lazy(tensor):
            return cls(tensor, type(tensor), None, None, *about)
        own = tensor.detach()
        return cls(tensor, type(tensor), own, own.clone(), *about)

    def put_back(self) -> None:
        tensor = self.tensor
        if self.memory is None or self.numbers is None:
            if type(tensor) is not self.kind:
                tensor.grad = None
                tensor.requires_grad_(self.learns)
                tensor.data = torch.empty(0, dtype=tensor.dtype)
                tensor.__class__ = self.kind
            return
        if _place(tensor) != _place(self.memory):
            tensor.data = self.memory
        _rewrite(self.memory, self.numbers)
        if tensor.is_leaf:
            tensor.requires_grad_(self.learns)
            tensor.grad = self.gradient


def _place(tensor: Tensor) -> tuple[object, ...]:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return (tensor.device, tensor.dtype, tensor.shape)
    return (tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr())


def _rewrite(memory: Tensor, numbers: Tensor) -> None:
    if memory.layout == torch.strided and not memory.is_quantized:
        overwrite(memory, numbers)
    else:
        with torch.no_grad():
            memory.copy_(numbers)


@dataclass(frozen=True, slots=True)
class _Shell:
    """One module without what is in it: its class, and what is registered under which name."""

    module: nn.Module
    kind: type
    tables: Mapping[str, Any] = field(repr=False)  # copies of torch's own dicts and sets by their names
    flags: Mapping[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> "_Shell":
        if isinstance(module, torch.jit.ScriptModule):
            buffers = dict(module.named_buffers(recurse=False))
            return cls(module, type(module), buffers, {"training": module.training})
        there = {name: value for name, value in vars(module).items() if name in OWN}
        tables = {name: value.copy() for name, value in there.items() if isinstance(value, dict | set)}
        return cls(module, type(module), tables, {n: v for n, v in there.items() if n not in tables and n != LENT})

    def put_back(self) -> None:
        if isinstance(self.module, torch.jit.ScriptModule):
            for name, buffer in self.tables.items():
                setattr(self.module, name, buffer)
            self.module.training = self.flags["training"]
            return
        if type(self.module) is not self.kind:  # a lazy one that has been given its shape
            self.module.__class__ = self.kind
        for name, table in self.tables.items():
            there = vars(self.module)[name]
            there.clear()
            there.update(table)
        vars(self.module).update(self.flags)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything of a module that training, or a single forward, may change."""

    module: nn.Module
    shells: tuple[_Shell, ...] = field(repr=False)
    kept: tuple[_Kept, ...] = field(repr=False)
    attributes: tuple[tuple[nn.Module, Mapping[str, Remembered]], ...] = field(repr=False)

    @classmethod
    def of(cls, module: nn.Module) -> "Snapshot":
        """Copy what can change."""
        now = Contents.of(module)
        memory, modules = now.memory(), tuple(now.modules.values())
        own = tuple((each, {name: memory.remember(v) for name, v in _all(each).items()}) for each in modules)
        tensors = (*now.parameters.values(), *now.buffers.values())
        return cls(module, tuple(map(_Shell.of, modules)), tuple(map(_Kept.of, tensors)), own)

    def put_back(self) -> None:
        """Let the module be what it was, in the same objects."""
        for shell in self.shells:
            shell.put_back()
        for kept in self.kept:
            kept.put_back()
        for module, own in self.attributes:
            for name in _all(module).keys() - own.keys():
                vars(module).pop(name, None)
            for name, memory in own.items():
                set_attribute(module, name, put_back(memory))


@contextmanager
def left_no_trace(module: nn.Module) -> Iterator[None]:
    """Let the module afterwards be what it was, whatever the body has done to it or raised."""
    before = Snapshot.of(module)
    try:
        yield
    finally:
        before.put_back()


def _all(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes, derived ones among them."""
    if isinstance(module, torch.jit.ScriptModule):
        return plain_attributes(module)
    return {name: value for name, value in vars(module).items() if name not in OWN}

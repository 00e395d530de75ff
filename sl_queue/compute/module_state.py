"""The state of a module as it is now: what a step may change besides the numbers in its parameters.

Training flags, what is frozen, buffers that come, go or take another shape, and plain attributes. A checkpoint carries
of it what differs from the module as it was built, so that most models carry nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sl_queue.compute.remembered import (
    Memory,
    NotCarriedError,
    Remembered,
    overwrite,
    put_back,
    read,
    same,
    saved,
)
from sl_queue.compute.tensors import described, from_payload, to_payload
from sl_queue.errors import CheckpointError
from sl_queue.ports import SAVABLE, State
from sl_queue.protocol.messages import Payload

LENT = "_sl_queue_lent"  # an attribute of a module while a run trains it
_OWN = frozenset(vars(nn.Module())) | {LENT}  # of torch, or ours: kept by other means


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each submodule is in the mode in which it was."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()
        for each, was in modes:
            if each.training != was:
                each.training = was


def begin_training(module: nn.Module) -> None:
    """Put a module into training mode, apart from submodules that were built in evaluation mode."""
    frozen = [each for each in module.modules() if not each.training]
    module.train()  # which may be the module's own, and keep some in evaluation mode
    for each in frozen:
        each.training = False


def attributes(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module and its submodules by their paths, as objects."""
    return {join(name, key): value for name, each in module.named_modules() for key, value in _own(each).items()}


def remembered(module: nn.Module) -> dict[str, Remembered]:
    """Copies of what can change in a module's plain attributes."""
    memory = Memory(registered(module))
    return {path: memory.remember(value) for path, value in attributes(module).items()}


def registered(module: nn.Module) -> dict[int, object]:
    """Parameters, buffers and submodules by id: what a state names in another way than as an attribute."""
    return {id(each): each for each in (*module.modules(), *module.parameters(), *module.buffers())}


def join(name: str, attribute: str) -> str:
    """The path of an attribute of a submodule."""
    return f"{name}.{attribute}" if name else attribute


def _own(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of one module."""
    if isinstance(module, torch.jit.ScriptModule):
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        return {name: getattr(module, name) for name in sorted(_scripted_names(module) - _OWN - tensors.keys())}
    derived = _derived(module)
    return {name: value for name, value in vars(module).items() if name not in _OWN and name not in derived}


def _scripted_names(module: nn.Module) -> set[str]:
    """The attributes of a scripted module, which live outside of Python."""
    kind = getattr(module, "_concrete_type", None)
    return set() if kind is None else set(kind.get_attributes()) - set(dict(module.named_children()))


def _derived(module: nn.Module) -> set[str]:
    """The attributes that torch's own weight_norm, spectral_norm and prune compute from parameters in each forward."""
    hooks = [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils.")]
    return {str(getattr(hook, "_tensor_name", getattr(hook, "name", ""))) for hook in hooks}


def _set(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        setattr(module, name, value)
    else:
        vars(module)[name] = value


# What a checkpoint carries --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Built:
    """A module as it was before its first step, to tell what has changed since."""

    attributes: Mapping[str, Remembered] = field(repr=False)
    buffers: Mapping[str, str]  # dtype and shape by name
    modes: Mapping[str, bool]  # training or not, by submodule
    learning: Mapping[str, bool]  # requires_grad by parameter

    @classmethod
    def of(cls, module: nn.Module) -> "Built":
        """Remember the module as it is now."""
        buffers = {name: described(buffer) for name, buffer in module.named_buffers()}
        return cls(remembered(module), buffers, _modes(module), _learning(module))

    def changes(self, module: nn.Module, prefix: str) -> tuple[State, list[NotCarriedError]]:
        """What differs now, apart from numbers in parameters and buffers; and what differs and cannot be carried."""
        tensors: dict[str, Payload] = {}
        found: dict[str, Any] = {}
        lost = []

        def keep(path: str, tensor: Tensor) -> None:
            if str(tensor.dtype).removeprefix("torch.") not in SAVABLE:
                raise NotCarriedError(path, tensor)
            tensors[f"{prefix}attributes/{path}"] = to_payload(tensor)

        now = remembered(module)
        for path, memory in now.items():
            if path in self.attributes and same(memory, self.attributes[path]):
                continue
            try:
                found[path] = saved(memory, path, keep)
            except NotCarriedError as error:
                lost.append(error)
        values: dict[str, Any] = {
            "attributes": found,
            "gone": [path for path in self.attributes if path not in now],
            "buffers": self._changed_buffers(module),
            "modes": _differing(_modes(module), self.modes),
            "learning": _differing(_learning(module), self.learning),
        }
        return State(tensors, {f"{prefix}{key}": value for key, value in values.items() if value}), lost

    def _changed_buffers(self, module: nn.Module) -> dict[str, bool | None]:
        """The buffers that are not as they were built: whether a state_dict has them, None for those that are gone."""
        now = dict(module.named_buffers())
        changed = {n: _is_persistent(module, n) for n, b in now.items() if self.buffers.get(n) != described(b)}
        return changed | {name: None for name in self.buffers if name not in now}

    def load(self, module: nn.Module, state: State, prefix: str, party: str) -> None:
        """Give back what `changes` found, and what was built where it found nothing; buffers get their shapes."""
        values = {key: state.values.get(f"{prefix}{key}", {}) for key in ("attributes", "buffers", "modes", "learning")}
        self._load_buffers(module, state, f"{prefix}module/", values["buffers"])
        gone = set(state.values.get(f"{prefix}gone", ()))
        owners = dict(module.named_modules())
        for path, value in attributes(module).items():
            owner, name = split(path)
            if path in gone or (path not in self.attributes and path not in values["attributes"]):
                vars(owners[owner]).pop(name, None)
            elif path in self.attributes:
                _set(owners[owner], name, put_back(self.attributes[path], value))

        def tensor_of(path: str) -> Tensor:
            return from_payload(state.tensors[f"{prefix}attributes/{path}"], _device(module))

        for path in self.attributes.keys() - attributes(module).keys() - gone:
            owner, name = split(path)
            _set(owners[owner], name, put_back(self.attributes[path]))
        for path, value in values["attributes"].items():
            self._load_attribute(owners, path, value, tensor_of, party)
        for name, each in owners.items():
            mode = values["modes"].get(name, self.modes.get(name, each.training))
            if each.training != mode:
                each.training = mode
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(values["learning"].get(name, self.learning.get(name, parameter.requires_grad)))

    def _load_attribute(self, owners: Mapping[str, nn.Module], path: str, value: Any, tensor_of: Any, party: str) -> None:
        owner, name = split(path)
        try:
            _set(owners[owner], name, read(value, tensor_of, _own(owners[owner]).get(name)))
        except (KeyError, NotCarriedError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"party {party!r}: the checkpoint holds the attribute {path!r}, which the model cannot take "
                f"({type(error).__name__}); restore the model, or start anew with another state folder"
            ) from None

    def _load_buffers(
        self, module: nn.Module, state: State, prefix: str, declared: Mapping[str, bool | None]
    ) -> None:
        """Let buffers have the shapes of a state; their numbers are the caller's to load."""
        own = dict(module.named_buffers())
        for name, persistent in declared.items():
            payload = state.tensors.get(f"{prefix}{name}")
            set_buffer(module, name, None if payload is None else from_payload(payload, _device(module)), persistent)
        for name in own.keys() - self.buffers.keys() - declared.keys():
            set_buffer(module, name, None, None)
        for name, told in self.buffers.items():
            payload = state.tensors.get(f"{prefix}{name}")
            now = own.get(name)
            if name not in declared and payload is not None and str(payload) == told:
                if now is None or described(now) != told:
                    set_buffer(module, name, from_payload(payload, _device(module)), None)


def split(path: str) -> tuple[str, str]:
    """The submodule and the attribute that a path names."""
    owner, _, name = path.rpartition(".")
    return owner, name


def set_buffer(module: nn.Module, path: str, tensor: Tensor | None, persistent: bool | None) -> None:
    """Let a buffer be `tensor`; one that was never registered is, None for `persistent` leaves that as it is."""
    owner, name = split(path)
    where = module.get_submodule(owner)
    if isinstance(where, torch.jit.ScriptModule):
        setattr(where, name, tensor)
        return
    if name not in where._buffers and tensor is not None:
        vars(where).pop(name, None)
        where.register_buffer(name, tensor, persistent is not False)
    elif name in where._buffers:
        where._buffers[name] = tensor


def _is_persistent(module: nn.Module, path: str) -> bool:
    owner, name = split(path)
    return name not in module.get_submodule(owner)._non_persistent_buffers_set


def _modes(module: nn.Module) -> dict[str, bool]:
    return {name: each.training for name, each in module.named_modules()}


def _learning(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def _differing(now: Mapping[str, bool], built: Mapping[str, bool]) -> dict[str, bool]:
    return {name: value for name, value in now.items() if built.get(name) != value}


def _device(module: nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


# Undoing in the same process ------------------------------------------------------------------------------------


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
                tensor.data = torch.empty(0, dtype=tensor.dtype)
                tensor.__class__ = self.kind
        else:
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
        there = {name: value for name, value in vars(module).items() if name in _OWN}
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
        modules = tuple(module.modules())
        memory = Memory(registered(module))
        own = tuple((each, {name: memory.remember(v) for name, v in _all(each).items()}) for each in modules)
        tensors = (*module.parameters(), *module.buffers())
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
                _set(module, name, put_back(memory))


def _all(module: nn.Module) -> dict[str, Any]:
    """Plain attributes, derived ones among them."""
    if isinstance(module, torch.jit.ScriptModule):
        return _own(module)
    return {name: value for name, value in vars(module).items() if name not in _OWN}


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

from sl_queue.compute.modules.put_back import put_back
from sl_queue.compute.modules.remembered import Memory, Remembered
from sl_queue.compute.modules.saved_values import Before, NotCarriedError, Reading, Writing
from sl_queue.cut.crossing import from_payload, to_payload
from sl_queue.cut.tensors import described, dtype_name
from sl_queue.errors import CheckpointError, JobError
from sl_queue.protocol.checkpoint import SAVABLE, State
from sl_queue.protocol.messages import Payload

LENT = "_sl_queue_lent"  # an attribute of a module while a run trains it
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
OWN = frozenset(vars(nn.Module())) | {LENT}  # of torch, or ours: kept by other means


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Enter evaluation mode without gradients; afterwards each submodule is in the mode in which it was."""
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


def begin_training(module: nn.Module, where: str) -> None:
    """Put a module into training mode, apart from submodules that were built in evaluation mode."""
    frozen = [each for each in module.modules() if not each.training]
    try:
        module.train()  # which may be the module's own, and keep some in evaluation mode
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise JobError(f"{where} has no training mode ({told}); give the module that it was made of") from error
    for each in frozen:
        each.training = False


@dataclass(frozen=True, slots=True)
class Contents:
    """Contents registered in a module, by name; gone through once, since torch does it again for each kind."""

    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> "Contents":
        """List submodules, parameters and buffers, each once, under its first name."""
        modules = dict(module.named_modules())
        parameters: dict[str, nn.Parameter] = {}
        buffers: dict[str, Tensor] = {}
        met: set[int] = set()
        for name, each in modules.items():
            for table, found in ((each._parameters, parameters), (each._buffers, buffers)):
                for key, tensor in table.items():
                    if tensor is not None and id(tensor) not in met:
                        met.add(id(tensor))
                        found[join(name, key)] = tensor
        return cls(modules, parameters, buffers)

    def attributes(self) -> dict[str, Any]:
        """Return the plain attributes of all submodules by their paths, as objects."""
        return {
            join(name, key): value
            for name, each in self.modules.items()
            for key, value in plain_attributes(each).items()
        }

    def remembered(self, copies: bool = True) -> dict[str, Remembered]:
        """Return what can change in the plain attributes, in copies or as it is now."""
        memory = self.memory(copies)
        return {path: memory.remember(value) for path, value in self.attributes().items()}

    def memory(self, copies: bool = True) -> Memory:
        """Return a memory that passes over what is registered: a state names that otherwise than as an attribute."""
        return Memory({id(each): each for each in self.named().values()}, copies)

    def named(self) -> dict[str, Any]:
        """Return submodules, parameters and buffers, as a checkpoint refers to them."""
        return {f":{n}": each for kind in (self.modules, self.parameters, self.buffers) for n, each in kind.items()}


def join(name: str, attribute: str) -> str:
    """Return the path of an attribute of a submodule."""
    return f"{name}.{attribute}" if name else attribute


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of one module."""
    if isinstance(module, torch.jit.ScriptModule):
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        return {name: getattr(module, name) for name in sorted(_scripted_names(module) - OWN - tensors.keys())}
    derived = _derived(module) if module._forward_pre_hooks else ()
    return {n: v for n, v in vars(module).items() if n not in OWN and n not in derived and "." not in n}


def _scripted_names(module: nn.Module) -> set[str]:
    """Return the attributes of a scripted module, which live outside of Python."""
    kind = getattr(module, "_concrete_type", None)
    return set() if kind is None else set(kind.get_attributes()) - set(dict(module.named_children()))


def _derived(module: nn.Module) -> set[str]:
    """Name attributes that torch's own weight_norm, spectral_norm and prune compute from parameters in each forward."""
    hooks = [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils.")]
    return {str(getattr(hook, "_tensor_name", getattr(hook, "name", ""))) for hook in hooks}


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        setattr(module, name, value)
    else:
        vars(module)[name] = value


# What a checkpoint carries --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Built:
    """A module as it was before its first step, to tell what has changed since."""

    attributes: Before = field(repr=False)
    buffers: Mapping[str, str]  # dtype and shape by name
    modes: Mapping[str, bool]  # training or not, by submodule
    learning: Mapping[str, bool]  # requires_grad by parameter

    @classmethod
    def of(cls, module: nn.Module) -> "Built":
        """Remember the module as it is now."""
        now = Contents.of(module)
        buffers = {name: described(buffer) for name, buffer in now.buffers.items()}
        return cls(Before.of(now.remembered()), buffers, _modes(now), _learning(now))

    def changes(self, module: nn.Module, prefix: str) -> tuple[State, list[NotCarriedError]]:
        """Return what differs now, apart from numbers in parameters and buffers, and what of it cannot be carried."""
        tensors: dict[str, Payload] = {}

        def keep(path: str, tensor: Tensor) -> None:
            if dtype_name(tensor.dtype) not in SAVABLE:
                raise NotCarriedError(path, tensor)
            tensors[f"{prefix}attributes/{path}"] = to_payload(tensor)

        now = Contents.of(module)
        remembered = now.remembered(copies=False)
        late = now.modules.keys() - self.modes.keys()  # which the forward makes again
        names = {id(each): name for name, each in now.named().items() if name[1:] not in late}
        absent = {path for path in remembered if split(path)[0] in late}
        found, lost = self.attributes.changes(remembered, Writing(keep, names, absent))
        lost += [NotCarriedError(name, now.modules.get(name)) for name in self._other_items(now)]
        values: dict[str, Any] = {
            "attributes": found,
            "apart": bool(found) and self.attributes.apart,
            "gone": [path for path in self.attributes.values if path not in remembered],
            "buffers": self._changed_buffers(now),
            "modes": _differing(_modes(now), self.modes),
            "learning": _differing(_learning(now), self.learning),
        }
        return State(tensors, {f"{prefix}{key}": value for key, value in values.items() if value}), lost

    def _other_items(self, now: Contents) -> Iterator[str]:
        """Yield the lists and dicts of submodules that have grown, or lost some of theirs."""
        for name, each in now.modules.items():
            if name in self.modes and isinstance(each, _LISTS):
                prefix = join(name, "")
                before = {key for key in self.modes if key.startswith(prefix) and key != name}
                if before != {key for key in now.modules if key.startswith(prefix) and key != name}:
                    yield name

    def _changed_buffers(self, now: Contents) -> dict[str, bool | None]:
        """Return buffers that are not as they were built: whether a state_dict has them, None for those now gone."""
        changed: dict[str, bool | None] = {}
        for name, buffer in now.buffers.items():
            if self.buffers.get(name) != described(buffer):
                owner, key = split(name)
                changed[name] = key not in now.modules[owner]._non_persistent_buffers_set
        return changed | {name: None for name in self.buffers if name not in now.buffers}

    def load(self, module: nn.Module, state: State, prefix: str, party: str) -> None:
        """Give back what `changes` found, and what was built where it found nothing; buffers get their shapes.

        Numbers in parameters and buffers are the caller's to load. Raises CheckpointError.
        """
        self._load_buffers(module, state, prefix)
        now = Contents.of(module)
        self._load_attributes(now, state, prefix, party)
        modes, learning = state.values.get(f"{prefix}modes", {}), state.values.get(f"{prefix}learning", {})
        for name, each in now.modules.items():
            mode = modes.get(name, self.modes.get(name, each.training))
            if each.training != mode:
                each.training = mode
        for name, parameter in now.parameters.items():
            parameter.requires_grad_(learning.get(name, self.learning.get(name, parameter.requires_grad)))

    def _load_attributes(self, now: Contents, state: State, prefix: str, party: str) -> None:
        values = state.values.get(f"{prefix}attributes", {})
        gone = set(state.values.get(f"{prefix}gone", ()))
        there, built = now.attributes(), self.attributes.values
        for path in there.keys() | built.keys():
            owner, name = split(path)
            if owner not in now.modules:
                continue
            if path in gone or (path not in built and path not in values):
                vars(now.modules[owner]).pop(name, None)
            elif path in built:
                set_attribute(now.modules[owner], name, put_back(built[path]))

        def tensor_of(path: str) -> Tensor:
            return from_payload(state.tensors[f"{prefix}attributes/{path}"], _device(now))

        reading = Reading(tensor_of, now.named(), state.values.get(f"{prefix}apart", False))
        reading.leave({path: each for path, each in now.remembered(copies=False).items() if path not in values})
        for path in sorted(values):
            owner, name = split(path)
            if owner not in now.modules:  # the forward makes it again
                continue
            try:
                current = plain_attributes(now.modules[owner]).get(name)
                set_attribute(now.modules[owner], name, reading.read(values[path], path, current))
            except (KeyError, NotCarriedError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"party {party!r}: the checkpoint holds the attribute {path!r}, which the model cannot take "
                    f"({type(error).__name__}); restore the model, or start from scratch with another state folder"
                ) from None

    def _load_buffers(self, module: nn.Module, state: State, prefix: str) -> None:
        own = Contents.of(module)
        declared: Mapping[str, bool | None] = state.values.get(f"{prefix}buffers", {})

        def saved_as(name: str) -> Tensor | None:
            payload = state.tensors.get(f"{prefix}module/{name}")
            return None if payload is None else from_payload(payload, _device(own))

        for name, persistent in declared.items():
            set_buffer(module, name, saved_as(name), persistent)
        for name in own.buffers.keys() - self.buffers.keys() - declared.keys():
            set_buffer(module, name, None, None)
        for name in self.buffers.keys() - declared.keys():
            now = own.buffers.get(name)
            if now is None or described(now) != self.buffers[name]:
                set_buffer(module, name, saved_as(name), None)


def split(path: str) -> tuple[str, str]:
    """Return the submodule and the attribute that a path names."""
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


def _modes(now: Contents) -> dict[str, bool]:
    return {name: each.training for name, each in now.modules.items()}


def _learning(now: Contents) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in now.parameters.items()}


def _differing(now: Mapping[str, bool], built: Mapping[str, bool]) -> dict[str, bool]:
    return {name: value for name, value in now.items() if name in built and built[name] != value}


def _device(now: Contents) -> torch.device:
    tensors = (*now.parameters.values(), *now.buffers.values())
    return tensors[0].device if tensors else torch.device("cpu")

"""The whole state of an optimizer, as a checkpoint holds it.

What it remembers of each parameter is saved always; the numbers of its groups and its own attributes where they are no
longer as they were built, which is what schedules and optimizers that adapt themselves change.
"""

import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sl_queue.compute.modules.put_back import put_back
from sl_queue.compute.modules.remembered import Memory, Remembered
from sl_queue.compute.modules.saved_values import Before, NotCarriedError, Reading, Writing
from sl_queue.compute.modules.state import Contents
from sl_queue.cut.crossing import from_payload, to_payload
from sl_queue.errors import CheckpointError, ComputeError, JobError
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.messages import Payload

log = logging.getLogger("sl_queue")
_SCALARS = (type(None), bool, int, float, str)


@dataclass(frozen=True, slots=True)
class BuiltOptimizer:
    """An optimizer as it was before its first step, to tell what has changed since."""

    optimizer: Optimizer
    module: nn.Module = field(repr=False)
    prefix: str  # of the names in a checkpoint
    where: str  # how errors about it begin
    built: Before = field(repr=False)  # by place: "groups[0].lr", "attributes.count"

    @classmethod
    def of(cls, optimizer: Optimizer, module: nn.Module, prefix: str, where: str) -> "BuiltOptimizer":
        """Remember the optimizer as it is now. Raises JobError for one that holds another."""
        for name, value in vars(optimizer).items():
            if isinstance(value, Optimizer) and value.state is not optimizer.state:
                raise JobError(
                    f"{where}: {type(optimizer).__name__} holds another optimizer in its attribute {name!r}, whose "
                    "state no checkpoint carries; let both share one state, as torch.optim.Optimizer keeps it"
                )
        for each in _beside(optimizer):
            if each is not module:
                log.warning(
                    "%s: a hook of the optimizer uses a %s, whose state no checkpoint carries, so a run that is "
                    "interrupted ends with other weights; keep it in an attribute of the optimizer",
                    where,
                    type(each).__name__,
                )
        return cls(optimizer, module, prefix, where, Before.of(_memories(optimizer, module)))

    def state(self) -> State:
        """Copy all that a step changes. Raises ComputeError for what no checkpoint can carry."""
        tensors: dict[str, Payload] = {}
        values: dict[str, Any] = {}
        more: dict[str, Any] = {}

        def keep(path: str, tensor: Tensor) -> None:
            tensors[f"{self.prefix}.more/{path}"] = to_payload(tensor)

        names = {id(each): name for name, each in _named(self.optimizer, self.module).items()}
        memory, writing = Memory(names, copies=False), Writing(keep, names, most_bytes=math.inf)
        try:
            for place, key, value in self._of_parameters():
                if isinstance(value, Tensor):
                    self._require_dense(place, key, value)
                    tensors[f"{self.prefix}/{place}/{key}"] = to_payload(value)
                elif type(value) in _SCALARS:
                    values[f"{self.prefix}/{place}/{key}"] = value
                else:
                    more[f"state.{place}/{key}"] = writing.saved(memory.remember(value), None, f"state.{place}/{key}")
            now = _memories(self.optimizer, self.module, copies=False)
            found, lost = self.built.changes(now, writing)
            if lost:
                raise lost[0]
        except NotCarriedError as error:
            raise ComputeError(
                f"{self.where}: {type(self.optimizer).__name__} keeps a {type(error.value).__name__} in its "
                f"{error.path}, which no checkpoint carries; keep it in numbers, tensors, or lists of them"
            ) from None
        gone = sorted(self.built.values.keys() - now.keys())
        apart = {"apart": True} if found and self.built.apart else {}
        more |= found
        extra = {"values": more} | ({"gone": gone} if gone else {}) | apart
        return State(tensors, values | ({f"{self.prefix}.more": extra} if more or gone else {}))

    def require_savable(self) -> None:
        """Raise ComputeError for a memory of a parameter that no checkpoint can carry."""
        for place, key, value in self._of_parameters():
            if isinstance(value, Tensor):
                self._require_dense(place, key, value)

    def _require_dense(self, place: str, key: str, value: Tensor) -> None:
        if value.layout != torch.strided:
            raise ComputeError(
                f"{self.where}: {type(self.optimizer).__name__} remembers {key!r} of {place!r} as a sparse tensor, "
                "which no checkpoint carries; let the layer have sparse = False, or take an optimizer without a memory "
                "of gradients, or SparseAdam"
            )

    def load(self, state: State) -> None:
        """Become what `state` returned, bit by bit: torch's own would cast everything to the parameter's dtype."""
        parameters = dict(self.module.named_parameters())
        optimizer, prefix = self.optimizer, f"{self.prefix}/"
        optimizer.state.clear()
        for place, memory in self.built.values.items():
            self._put(place, put_back(memory))
        for full_name, value in (*state.tensors.items(), *state.values.items()):
            if not full_name.startswith(prefix):
                continue
            name, _, key = full_name.removeprefix(prefix).rpartition("/")
            parameter = self._parameter(name, parameters)
            if full_name in state.tensors:
                value = from_payload(state.tensors[full_name], _device(optimizer, key, parameter))
            optimizer.state[parameter][key] = value
        self._load_more(state, parameters)

    def _load_more(self, state: State, parameters: Mapping[str, nn.Parameter]) -> None:
        extra = state.values.get(f"{self.prefix}.more", {"values": {}})
        for place in extra.get("gone", ()):
            self._drop(place)
        device = next(iter(parameters.values())).device

        def tensor_of(path: str) -> Tensor:
            return from_payload(state.tensors[f"{self.prefix}.more/{path}"], device)

        reading = Reading(tensor_of, _named(self.optimizer, self.module), extra.get("apart", False))
        now = _memories(self.optimizer, self.module, copies=False)
        reading.leave({place: each for place, each in now.items() if place not in extra["values"]})
        for place in sorted(extra["values"]):
            found = reading.read(extra["values"][place], place, self._current(place))
            if place.startswith("state."):
                name, _, key = place.removeprefix("state.").rpartition("/")
                self.optimizer.state[self._parameter(name, parameters)][key] = found
            else:
                self._put(place, found)

    def _of_parameters(self) -> list[tuple[str, str, Any]]:
        """List the memory of each parameter: its name, the key, the value. Raises ComputeError for strangers."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        strange = [key for key in self.optimizer.state if key not in names]
        if strange:
            raise ComputeError(
                f"{self.where}: {type(self.optimizer).__name__} keeps state for a {type(strange[0]).__name__} that is "
                "not a parameter of the model; keep it in an attribute, or in the state of a parameter"
            )
        return [
            (name, key, value)
            for parameter, name in names.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        ]

    def _parameter(self, name: str, parameters: Mapping[str, nn.Parameter]) -> nn.Parameter:
        if name not in parameters:
            raise CheckpointError(f"the checkpoint holds optimizer state for {name!r}, which the model does not have")
        return parameters[name]

    def _home(self, place: str) -> tuple[dict[str, Any], str]:
        """Return the dict that holds a place, and its key therein."""
        owner, _, name = place.partition(".")
        if owner == "attributes":
            return vars(self.optimizer), name
        return self.optimizer.param_groups[int(owner.removeprefix("groups[").removesuffix("]"))], name

    def _current(self, place: str) -> Any:
        if place.startswith("state."):
            return None
        home, name = self._home(place)
        return home.get(name)

    def _put(self, place: str, value: Any) -> None:
        home, name = self._home(place)
        home[name] = value

    def _drop(self, place: str) -> None:
        home, name = self._home(place)
        home.pop(name, None)


def _named(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return the optimizer and what its module holds, as a checkpoint refers to them."""
    return {**Contents.of(module).named(), "::": optimizer}


def _memories(optimizer: Optimizer, module: nn.Module, copies: bool = True) -> dict[str, Remembered]:
    """Remember the numbers of an optimizer's groups, and its own attributes."""
    memory = Memory({id(each): name for name, each in _named(optimizer, module).items()}, copies)
    found = {
        f"groups[{number}].{key}": memory.remember(value)
        for number, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params"
    }
    own = {name: value for name, value in vars(optimizer).items() if name not in _of_every_optimizer()}
    return found | {f"attributes.{name}": memory.remember(value) for name, value in own.items()}


def _beside(optimizer: Optimizer) -> Iterator[object]:
    """Yield what hooks of the optimizer use that has a state, and is neither the optimizer nor an attribute of it."""
    own = {id(each) for each in (optimizer, *vars(optimizer).values())}
    for hook in (*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()):
        plain = inspect.isfunction(hook) or inspect.ismethod(hook)
        used = [*(inspect.getclosurevars(hook).nonlocals.values() if plain else ()), getattr(hook, "__self__", hook)]
        yield from (each for each in used if hasattr(each, "load_state_dict") and id(each) not in own)


@cache
def _of_every_optimizer() -> frozenset[str]:
    """Return the attributes that torch gives each optimizer, and that are kept by other means or are no state."""
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)]))) | {"_opt_called", "_warned_capturable_if_run_uncaptured"}


def _device(optimizer: Optimizer, key: str, parameter: Tensor) -> torch.device:
    """Step counters live on the CPU unless the kernel reads them: torch's own rule."""
    group = optimizer.param_groups[0]
    on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
    return torch.device("cpu") if on_cpu else parameter.device

"""Any optimizer of torch.optim by its name in lower case, and its state as plain tensors and numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sl_queue.cut.tensors import from_payload, to_payload
from sl_queue.errors import CheckpointError, JobError
from sl_queue.protocol.checkpoint import State

_NEED_A_CLOSURE = {"lbfgs"}  # they evaluate the loss several times a step, and no party has the whole loss


def optimizer_names() -> dict[str, type[Optimizer]]:
    """The optimizers that a party file may name."""
    found = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, Optimizer)]
    return {c.__name__.lower(): c for c in found if c is not Optimizer and c.__name__.lower() not in _NEED_A_CLOSURE}


def build_optimizer(module: nn.Module, settings: Mapping[str, Any], key: str) -> Optimizer | None:
    """The optimizer that a party file describes at `key`; None for a module without parameters. Raises JobError."""
    named = dict(settings)
    name = named.pop("name", None)
    known = optimizer_names()
    if name in _NEED_A_CLOSURE:
        raise JobError(f"{key}: {name!r} evaluates the loss more than once a step, which no party can; use another")
    if name is not None and name not in known:
        raise JobError(f"{key}: {name!r} is unknown; allowed are {', '.join(sorted(known))}")
    parameters = list(module.parameters())
    if not parameters:
        return None
    if name is None:
        raise JobError(f'{key} is missing, and the model has parameters; for instance {{ name = "adam", lr = 1e-3 }}')
    try:
        return known[name](parameters, **named)
    except (TypeError, ValueError, RuntimeError) as error:
        raise JobError(f"{key} = {dict(settings)} is refused by torch.optim.{known[name].__name__}: {error}") from None


def optimizer_state(optimizer: Optimizer, module: nn.Module, prefix: str) -> State:
    """What the optimizer remembers of each parameter; its hyperparameters come from the party file."""
    tensors, values = {}, {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}/{key}"] = to_payload(value)
            else:
                values[f"{prefix}{name}/{key}"] = value
    return State(tensors, values)


def load_optimizer_state(optimizer: Optimizer, module: nn.Module, prefix: str, state: State) -> None:
    """The inverse of `optimizer_state`, bit by bit: torch's own would cast everything to the parameter's dtype."""
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for full_name, value in (*state.tensors.items(), *state.values.items()):
        if not full_name.startswith(prefix):
            continue
        name, _, key = full_name.removeprefix(prefix).rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"the checkpoint holds optimizer state for {name!r}, which the model does not have")
        parameter = parameters[name]
        if full_name in state.tensors:
            value = from_payload(state.tensors[full_name], _device(optimizer, key, parameter))
        optimizer.state[parameter][key] = value


def _device(optimizer: Optimizer, key: str, parameter: Tensor) -> torch.device:
    """Step counters live on the CPU unless the kernel reads them: torch's own rule."""
    group = optimizer.param_groups[0]
    on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
    return torch.device("cpu") if on_cpu else parameter.device

"""From a party file to a module: imported or given, built with keyed draws, on the device that the party has."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sl_queue.compute.code_digest import named
from sl_queue.compute.final_weights import settled
from sl_queue.compute.modules.handover import Copies, Take
from sl_queue.compute.modules.state import in_evaluation
from sl_queue.compute.seeds import key, seeded
from sl_queue.compute.spec import ComputeSpec, ModelSpec, Part
from sl_queue.cut.several import Outputs
from sl_queue.cut.tensors import Inputs, described
from sl_queue.errors import ComputeError, JobError, SlQueueError
from sl_queue.protocol.text import shortened

LAST = "-last"  # of a file in `final/`: the weights of the last step, where those of the part itself are averages
__all__ = ["Inputs"]

Sample = Callable[[torch.dtype], Inputs]  # two rows of input, for trying a model out before anything is trained


def called(module: nn.Module, inputs: Inputs, weights: Mapping[str, Tensor] | None = None) -> Any:
    """Call a module, with other `weights` if given; with keywords, where its forward has them for all of a dict."""
    inputs = _unshared(inputs)
    by_name = isinstance(inputs, dict) and inputs.keys() <= signature(module.forward).parameters.keys()
    args, kwargs = ((), dict(inputs)) if by_name and isinstance(inputs, dict) else ((inputs,), {})
    if weights is None:
        return module(*args, **kwargs)
    return torch.func.functional_call(module, dict(weights), args, kwargs)


def _unshared(inputs: Any) -> Any:
    """Return the same tensors in lists and dicts of the callee's own, out of which it may take them."""
    if isinstance(inputs, list):
        return [_unshared(each) for each in inputs]
    return {name: _unshared(each) for name, each in inputs.items()} if isinstance(inputs, dict) else inputs


def is_penalised(output: Any, outputs: Outputs | None) -> bool:
    """Tell whether a base model returns a penalty beside its activation; a list of two outputs is none."""
    if not isinstance(output, tuple) or len(output) != 2:
        return False
    return outputs is None or isinstance(output[0], list | tuple | dict)


def tensors_in(inputs: Any) -> list[Tensor]:
    """List the tensors of a model's input, those of a fuse model that gets a dict of each party too."""
    if isinstance(inputs, Tensor):
        return [inputs]
    each = inputs.values() if isinstance(inputs, dict) else inputs
    return [tensor for one in each for tensor in tensors_in(one)]


def described_inputs(inputs: Any) -> str:
    """Return dtype and shape of each tensor of an input, and nothing of its numbers."""
    if isinstance(inputs, dict):
        return "{" + ", ".join(f"{name}: {described(tensor)}" for name, tensor in inputs.items()) + "}"
    return described(inputs) if isinstance(inputs, Tensor) else "[" + ", ".join(map(described_inputs, inputs)) + "]"


def on_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Move a model's input."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return [tensor.to(device) for tensor in inputs]


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn whatever a user's module, loss or optimizer raises in here into a ComputeError that begins with `what`.

    `sys.exit` too: it would end this worker with a code of the model's own, and nobody would tell the others. Not
    Ctrl-C, which is for the whole process.
    """
    try:
        yield
    except (SlQueueError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ComputeError(f"{what}: {type(error).__name__}: {shortened(str(error))}") from error


def build_module(spec: ComputeSpec, part: Part, sample: Sample | None, take: Take | None = None) -> nn.Module:
    """Return the module on the CPU, built with keyed draws; lazy layers are given their shapes by a sample."""
    table = table_of(spec, part)
    where = f"party {spec.party!r}: [{part}] model = {named(table.model)!r}"
    model = table.model
    if isinstance(model, str):
        with seeded(key(spec.layers.seed, "", "import"), torch.device("cpu")):  # its file may draw, or set a seed
            model = spec.code.load(model)
    with seeded(key(spec.layers.seed, spec.party, f"{part} init"), torch.device("cpu")):
        try:
            module = model if isinstance(model, nn.Module) else model(**table.args)
        except (Exception, SystemExit) as error:
            raise JobError(f"{where} with args = {dict(table.args)} fails: {type(error).__name__}: {error}") from error
        if not isinstance(module, nn.Module):
            raise JobError(f"{where} returns {type(module).__name__}; it must return a torch.nn.Module")
        module = (take or Copies())(spec.party, part, module, made=module is not model)
        if sample is not None and _is_lazy(module):
            with blame(f"{where} fails on its input"), in_evaluation(module):
                called(module, sample(dtype_of(module)))
    for name, value in () if _is_lazy(module) else module.state_dict().items():
        if not isinstance(value, Tensor):
            raise JobError(f"{where}: its state_dict holds {name!r}, a {type(value).__name__}; only tensors are saved")
    return module


def final_module(spec: ComputeSpec, path: Path) -> nn.Module:
    """Load a trained module from its file in `final/`, in evaluation mode on the CPU; its stem says which part."""
    return settled(build_module(spec, part_of(path), None), spec.party, path)


def part_of(path: Path) -> Part:
    """Tell by its stem which part a file in `final/` holds."""
    return "fuse" if path.stem.removesuffix(LAST) == "fuse" else "base"


def device_of(spec: ComputeSpec) -> torch.device:
    """Return the device that a party file asks for. Raises JobError if this machine does not have it."""
    try:
        device = torch.device(spec.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise JobError(
            f"party {spec.party!r}: device = {spec.device!r} cannot be used here with "
            f"torch {torch.__version__}: {reason}; use 'cpu', or install a torch that has it"
        ) from None
    return device


def table_of(spec: ComputeSpec, part: Part) -> ModelSpec:
    """Return the base or fuse model of a party. Raises JobError if it has none."""
    table = spec.part(part)
    if table is None:
        raise JobError(f"party {spec.party!r}: [{part}] is missing")
    return table


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a module once, under its first name."""
    return chain(module.named_parameters(), module.named_buffers())


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of its floating parameters; float32 if it has none."""
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)


def _is_lazy(module: nn.Module) -> bool:
    return any(is_lazy(tensor) for _, tensor in tensors_of(module))

"""From a party file to a module: imported or given, built with keyed draws, on the device that the party has."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sl_queue.compute.code_digest import named
from sl_queue.compute.final_weights import settled
from sl_queue.compute.modules.handover import Copies, Take
from sl_queue.compute.modules.state import in_evaluation
from sl_queue.compute.running import blame, called
from sl_queue.compute.seeds import key, seeded
from sl_queue.compute.spec import ComputeSpec, ModelSpec, Part
from sl_queue.cut.tensors import Inputs
from sl_queue.errors import JobError

LAST = "-last"  # of a file in `final/`: the weights of the last step, where those of the part itself are averages

Sample = Callable[[torch.dtype], Inputs]  # two rows of input, for trying a model out before anything is trained


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
        torch.zeros(1, device=device).item()  # which a device without numbers, "meta", does not have
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

"""Every layer at which a module can be cut: what each side computes then, and what crosses."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sl_queue.compute.running import called
from sl_queue.compute.splitting.owners import owners_of
from sl_queue.compute.splitting.proof import require_equal
from sl_queue.compute.splitting.sides import cut_of
from sl_queue.compute.splitting.split import Split, columns_held, divided, is_composed, running
from sl_queue.compute.splitting.tracing import Traced, evaluating, trace
from sl_queue.errors import JobError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layer at which a base model may end."""

    party: str
    layer: str
    base_flops: int  # of one row's forward pass: products of matrices and convolutions
    rest_flops: int  # of everything else: the other bases and the fuse model
    bytes_per_row: int  # that the party's activation takes
    seen: Floats = field(repr=False)  # (rows, numbers): the activation
    held: Floats = field(repr=False)  # (rows, numbers): the party's columns that it is computed of


@dataclass(frozen=True, slots=True)
class Refused:
    """A layer at which nothing can be cut."""

    layer: str
    why: str


def candidates(module: nn.Module, parties: Mapping[str, Any], rows: Any) -> Iterator[Candidate | Refused]:
    """Cut a module at each of its layers in turn, and measure each cut that is proved to change nothing."""
    whole = running(module, rows)
    traced = _as_deep_as_possible(whole, rows)
    owner = columns_held(traced, parties, whole)
    owners = owners_of(traced, owner)
    total = _flops(whole, rows)
    for layer in dict.fromkeys(str(node.target) for node in traced.nodes if node.op == "call_module"):
        try:
            party = cut_of(traced, owners, layer)
            found = divided(traced, owners, owner, list(parties), {party: layer})
            inputs = found.inputs(rows)
            require_equal(whole, found.bases, found.fuse, rows, inputs)
        except JobError as error:
            yield Refused(layer, str(error))
            continue
        yield _measured(found, party, layer, inputs[party], total)


def _measured(found: Split, party: str, layer: str, inputs: Any, total: int) -> Candidate:
    base = found.bases[party]
    with evaluating(base):
        output = base(inputs)
    tensors = list(output.values()) if isinstance(output, dict) else [output]
    rows = len(tensors[0])
    flops = _flops(base, inputs)
    crossing = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
    return Candidate(party, layer, flops // rows, (total - flops) // rows, crossing, _flat(tensors), _flat(inputs))


def _as_deep_as_possible(whole: nn.Module, rows: Any) -> Traced:
    """Trace into every layer that can be traced."""
    closed: set[str] = set()
    opened: set[str] = set()
    traced = trace(whole, rows, opened)
    while True:
        calls = {str(node.target) for node in traced.nodes if node.op == "call_module"}
        deeper = {name for name in calls - closed if is_composed(whole.get_submodule(name))}
        if not deeper:
            return traced
        for name in sorted(deeper):
            try:
                traced = trace(whole, rows, opened | {name})
                opened.add(name)
            except JobError:
                closed.add(name)


def _flops(module: nn.Module, inputs: Any) -> int:
    with evaluating(module), FlopCounterMode(display=False) as counter:
        called(module, inputs)
    return int(counter.get_total_flops())


def _flat(inputs: Any) -> Floats:
    """Return tensors side by side, (rows, numbers)."""
    tensors: Sequence[Tensor] = [inputs] if isinstance(inputs, Tensor) else list(_values(inputs))
    flat = torch.cat([tensor.detach().double().reshape(len(tensor), -1) for tensor in tensors], 1)
    return flat.numpy()


def _values(inputs: Any) -> Any:
    return inputs.values() if isinstance(inputs, Mapping) else inputs

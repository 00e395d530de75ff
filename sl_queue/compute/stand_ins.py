"""Activations for trying out a fuse model where no feature party's are at hand.

Normal draws without their signs, as come out of a ReLU, and never zeros: models divide by norms and take logarithms.
From a generator of their own, so that nothing else in the process draws otherwise.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sl_queue.compute.running import aggregated
from sl_queue.compute.seeds import key
from sl_queue.compute.spec import LayersSpec
from sl_queue.cut.crossing import to_payload
from sl_queue.cut.tensors import Inputs
from sl_queue.protocol.messages import Payload

_CPU = torch.device("cpu")


def drawn(seed: int, party: str, shape: tuple[int, ...], scale: float | None = None) -> Tensor:
    """Return positive float32 numbers that depend on seed, party and shape only; of both signs at a `scale`."""
    draw = torch.Generator().manual_seed(key(seed, party, "stand-in"))
    normal = torch.randn(shape, generator=draw, dtype=torch.float32)
    return normal.abs() if scale is None else normal * scale


def stand_in(seed: int, party: str, shape: tuple[int, ...], dtype: str, rows: bytes) -> Payload:
    """Return a stand-in for a party's activation of these rows."""
    return to_payload(drawn(seed, party, shape).to(getattr(torch, dtype)), rows)


def drawn_inputs(
    layers: LayersSpec,
    rows: int,
    dtype: torch.dtype,
    device: torch.device = _CPU,
    scale: float = 0,
    *,
    graph: bool = False,
) -> dict[str, list[Tensor]]:
    """Draw each party's outputs for so many rows: positive ones, or of both signs at a `scale`.

    With `graph` they are parts of one, and no leaves of it, as activations are.
    """
    found = {}
    for party, cut in layers.cuts.items():
        numbers = drawn(layers.seed, party, (rows, *cut), scale or None).to(device, dtype)
        activation = numbers.requires_grad_().clone() if graph else numbers
        found[party] = layers.outputs[party].split(activation) if party in layers.outputs else [activation]
    return found


def fused(layers: LayersSpec, outputs: Mapping[str, Sequence[Tensor]]) -> Inputs:
    """Return the outputs of all parties as the fuse model's input."""
    return aggregated(outputs, layers)

"""Activations for trying out a fuse model where no feature party's are at hand.

Normal draws without their signs, as come out of a ReLU, and never zeros: models divide by norms and take logarithms.
From a generator of their own, so that nothing else in the process draws otherwise.
"""

import torch
from torch import Tensor

from sl_queue.compute.seeds import key
from sl_queue.cut.tensors import to_payload
from sl_queue.protocol.messages import Payload


def drawn(seed: int, party: str, shape: tuple[int, ...], scale: float | None = None) -> Tensor:
    """Return positive float32 numbers that depend on seed, party and shape only; of both signs at a `scale`."""
    draw = torch.Generator().manual_seed(key(seed, party, "stand-in"))
    normal = torch.randn(shape, generator=draw, dtype=torch.float32)
    return normal.abs() if scale is None else normal * scale


def stand_in(seed: int, party: str, shape: tuple[int, ...], dtype: str, rows: bytes) -> Payload:
    """Return a stand-in for a party's activation of these rows."""
    return to_payload(drawn(seed, party, shape).to(getattr(torch, dtype)), rows)

"""Tensors at rest and in memory: a Payload becomes a torch tensor and back, with one copy each way.

Payloads are little-endian, as is every machine that PyTorch publishes packages for.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sl_queue.cut.packing import plain_cast
from sl_queue.protocol.messages import Payload
from sl_queue.protocol.schedule.row_order import Positions

_SINGLE = np.dtype(np.float32)
_NARROW_AND_WIDE = ({np.dtype(np.float16), _SINGLE}, {np.dtype(np.uint16), _SINGLE})
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16}  # NumPy has no bfloat16 and no float8: their bits travel as integers


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without the prefix: "float32"."""
    return str(dtype).removeprefix("torch.")


def described(tensor: Tensor | Payload) -> str:
    """Return dtype and shape, which is all that a log line or an error may show of a tensor."""
    dtype = tensor.dtype if isinstance(tensor, Payload) else dtype_name(tensor.dtype)
    return f"{dtype} {tuple(tensor.shape)}"


def to_payload(tensor: Tensor, rows: bytes = b"") -> Payload:
    """Return a copy of a tensor in C order, detached from its graph and from its device."""
    return Payload(dtype_name(tensor.dtype), tuple(tensor.shape), _numbers(tensor).tobytes(), rows)


def payload_view(tensor: Tensor, rows: bytes) -> Payload:
    """View a tensor in C order, without a copy where none has to be made; encode it before the tensor is changed."""
    numbers = np.ascontiguousarray(_numbers(tensor))
    return Payload(dtype_name(tensor.dtype), tuple(tensor.shape), numbers.reshape(-1).view(np.uint8).data, rows)


def _numbers(tensor: Tensor) -> npt.NDArray[Any]:
    """Detach from its graph and from its device."""
    own = tensor.detach()
    if own.dtype == torch.bfloat16 or dtype_name(own.dtype).startswith("float8"):
        own = own.view(_SAME_WIDTH[own.element_size()])
    found: npt.NDArray[Any] = own.numpy(force=True)
    return found


def from_payload(payload: Payload, device: torch.device | None = None) -> Tensor:
    """Return a tensor of its own on `device`, copied once into memory aligned as torch aligns it.

    Raises ValueError when the declared dtype and shape do not account for the bytes that are there.
    """
    dtype = getattr(torch, payload.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{payload.dtype!r} is not a torch dtype")
    if any(size < 0 for size in payload.shape):
        raise ValueError(f"a shape cannot be {payload.shape}")
    declared = math.prod(payload.shape) * dtype.itemsize
    there = memoryview(payload.data).nbytes
    if declared != there:
        raise ValueError(f"{payload} takes {declared} bytes, but holds {there}")
    tensor = torch.empty(payload.shape, dtype=dtype)
    if there:
        np.copyto(tensor.view(-1).view(torch.uint8).numpy(), np.frombuffer(payload.data, np.uint8))
    return tensor if device is None else tensor.to(device)


def cast(source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    """Cast as `packing.plain_cast` does, where torch can, in a fraction of its time."""
    if {source.dtype, target.dtype} not in _NARROW_AND_WIDE:
        plain_cast(source, target)
        return
    _viewed(target).copy_(_viewed(np.require(source, requirements=["C", "W"])))


def _viewed(array: npt.NDArray[Any]) -> Tensor:
    """View an array as a tensor; 16 bits that NumPy has no name for are a bfloat16."""
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found


def is_finite(tensor: Tensor) -> bool:
    """Return True if a tensor holds neither NaN nor infinity; one pass when it does not."""
    tensor = tensor.detach()
    if math.isfinite(tensor.sum().item()):  # finite numbers may have an infinite sum, but not the other way round
        return True
    return bool(tensor.isfinite().all())


Inputs = Tensor | list[Tensor] | dict[str, Tensor]  # of a model


def take_rows(array: npt.NDArray[Any], positions: Positions, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Take these rows of an array; floating ones are cast to `dtype`, integers stay what they are (for embeddings).

    Of records, several arrays side by side, a dict of tensors, or a list where their names are "[0]", "[1]".
    """
    if array.dtype.names:
        found = {name: _taken(array[name], positions, dtype, device) for name in array.dtype.names}
        return list(found.values()) if array.dtype.names[0] == "[0]" else found
    return _taken(array, positions, dtype, device)


def _taken(array: npt.NDArray[Any], positions: Positions, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = torch.from_numpy(np.take(array, positions, axis=0))
    return rows.to(device, dtype) if rows.is_floating_point() else rows.to(device)

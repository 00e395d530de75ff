"""Tensors: their names, their numbers in another dtype, and how they are taken out of a table."""

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


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without the prefix: "float32"."""
    return str(dtype).removeprefix("torch.")


def described(tensor: Tensor | Payload) -> str:
    """Return dtype and shape, which is all that a log line or an error may show of a tensor."""
    dtype = tensor.dtype if isinstance(tensor, Payload) else dtype_name(tensor.dtype)
    return f"{dtype} {tuple(tensor.shape)}"


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


def page_locked(tensor: Tensor) -> Tensor:
    """Return a GPU's tensor in page-locked memory, which torch keeps for the next one; any other as it is.

    It comes there faster, and fresh memory would cost most of all: a fault for each of its pages.
    """
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor.detach())


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

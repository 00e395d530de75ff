"""Final weights, from their file into a module that need not have their shapes."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sl_queue.compute.modules.state import set_buffer
from sl_queue.errors import CheckpointError


def settled(module: nn.Module, party: str, path: Path) -> nn.Module:
    """Return the module with the weights of a file, whose buffers may have other shapes than a new module's."""
    weights = safetensors.torch.load_file(path)
    lazy = any(map(is_lazy, (*module.parameters(), *module.buffers())))
    own = {} if lazy else module.state_dict()
    if own.keys() != weights.keys() or not all(_equal(own[name], weights[name]) for name in weights):
        for name, buffer in () if lazy else list(module.named_buffers(remove_duplicate=False)):
            if name in weights and (buffer.shape, buffer.dtype) != (weights[name].shape, weights[name].dtype):
                set_buffer(module, name, weights[name].clone(), None)
        for name in weights.keys() - own.keys():
            with suppress(AttributeError, KeyError):  # what is no buffer is the module's own to load
                set_buffer(module, name, weights[name].clone(), True)
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(
                f"party {party!r}: the weights in {path} do not fit the model as it is built now: {error}"
            ) from error
    return module.to("cpu").eval()


def _equal(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.dtype == other.dtype and torch.equal(one.cpu(), other)

"""Optimizers of torch without its compiler, which their decorators import: that takes as long as torch itself.

What is left out has no effect where nothing is compiled, and nothing here is. Where torch names these things otherwise,
the compiler is imported after all, and the numbers stay the same.
"""

import inspect
import sys
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from sl_queue.compute.modules.graph import steps_only_torch

_LOADED = "torch._dynamo"
_UNCOMPILED = ("add_param_group", "zero_grad")  # methods that are only decorated to keep the compiler out


def keep_compiler_out() -> None:
    """Let optimizers be built without it, unless it is here already."""
    if _LOADED in sys.modules:
        return
    for name in _UNCOMPILED:
        own = inspect.unwrap(getattr(Optimizer, name))
        if "__dynamo_disable" not in vars(own):
            setattr(own, "__dynamo_disable", own)  # where torch looks for what it would make of it


def prepare_step(optimizer: Optimizer) -> None:
    """Import now what the first step would import."""
    if not _is_plain(optimizer):
        import torch._dynamo  # noqa: F401


def step(optimizer: Optimizer) -> None:
    """Do what `optimizer.step()` does; of torch's own optimizers without profiler and compiler."""
    if not _is_plain(optimizer):
        optimizer.step()
        return
    with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable", False))):
        _plain_step(type(optimizer))(optimizer)


def _is_plain(optimizer: Optimizer) -> bool:
    """Return True for an optimizer of torch that nothing was hung on, a scheduler's counter for instance."""
    return "step" not in vars(optimizer) and steps_only_torch(optimizer)


def _plain_step(kind: type[Optimizer]) -> Callable[[Optimizer], object]:
    found: Callable[[Optimizer], object] = inspect.unwrap(kind.step)
    return found

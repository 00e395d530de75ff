"""Optimizers and backward passes of torch without what only its compiler needs, and what it imports for that.

Optimizers import the compiler, which takes as long as torch itself, and a backward pass from given gradients sympy, to
compare shapes that may be symbols. Neither has an effect where nothing is compiled, and nothing here is. Where torch
names these things otherwise, they are imported after all, and the numbers stay the same.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph
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


def backward(roots: Sequence[Tensor], gradients: Sequence[Tensor], *, keep: bool) -> None:
    """Do what `torch.autograd.backward` does; `keep`: the graph is needed again."""
    if _are_plain(roots, gradients):
        _run(tuple(roots), tuple(gradients), keep, False, (), allow_unreachable=True, accumulate_grad=True)
    else:
        torch.autograd.backward(roots, gradients, retain_graph=keep)


def gradients_of(
    roots: Sequence[Tensor], leaves: Sequence[Tensor], gradients: Sequence[Tensor], *, keep: bool
) -> Sequence[Tensor | None]:
    """Do what `torch.autograd.grad` does; None for a leaf that was not used."""
    found: Sequence[Tensor | None]
    if leaves and _are_plain(roots, gradients):
        found = _run(tuple(roots), tuple(gradients), keep, False, tuple(leaves), True, accumulate_grad=False)
    else:
        found = torch.autograd.grad(roots, leaves, gradients, allow_unused=True, retain_graph=keep)
    return found


_run: Any = getattr(graph, "_engine_run_backward", None)


def _are_plain(roots: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
    """Return True for tensors of which torch would only find that their shapes agree."""
    return _run is not None and all(
        type(root) is Tensor and type(gradient) is Tensor and root.shape == gradient.shape and not root.is_complex()
        for root, gradient in zip(roots, gradients, strict=True)
    )

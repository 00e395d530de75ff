"""Graphs as autograd has built them, read before a backward pass for code that is not torch's own.

torch's own nodes and optimizers draw no random numbers. Hooks, autograd functions written in Python, and what saved
tensors are unpacked with (torch.utils.checkpoint) may, and so may anything that is not known here.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.hooks import RemovableHandle

_ACCUMULATE: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # adds to a leaf's gradient
_PLAIN = (Tensor, nn.Parameter)  # a subclass may run Python for any operator
_KNOWN: set[type] = set()  # nodes of autograd functions of ours
_SHOWS_HOOKS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")  # torch before 2.6 does not


def hooks_made() -> int:
    """Count the hooks registered so far in this process, on tensors, nodes, modules and optimizers of any thread.

    torch does not tell which hooks a node has, but it numbers the handles that it gives out.
    """
    return RemovableHandle.next_id


def runs_only_torch(root: Tensor, hooks_before: int) -> bool:
    """Return True if a backward pass from `root` runs nothing but torch's own code.

    `hooks_before`: `hooks_made()` before the first operator of the graph. Takes about a microsecond a node.
    """
    if hooks_made() != hooks_before or type(root) is not Tensor:
        return False
    waiting: list[Any] = [root.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind: Any = type(node)
        if kind is _ACCUMULATE:
            if not _is_plain_leaf(node.variable):
                return False
            continue
        names = _saved_by(kind)
        if names is None:
            return False
        for name in names:
            if _unpacked_by_python(getattr(node, name)):
                return False
        waiting.extend(following for following, _ in node.next_functions)
    return True


def steps_only_torch(optimizer: Optimizer) -> bool:
    """Return True if a step of the optimizer runs nothing but torch's own code."""
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    hooks = own_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    return type(optimizer).__module__.startswith("torch.optim.") and not hooks


def draws_nothing(function: type[torch.autograd.Function]) -> None:
    """Take an autograd function written in Python for one whose backward pass draws no random numbers."""
    _KNOWN.add(function._backward_cls)


@cache
def _saved_by(kind: type) -> tuple[str, ...] | None:
    """Return the attributes with the saved tensors of a kind of node; None for one that is not torch's own."""
    if kind in _KNOWN:
        return ()
    if getattr(torch._C._functions, kind.__name__, None) is not kind:
        return None
    names = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    return names if _SHOWS_HOOKS or not names else None


def _unpacked_by_python(saved: Any) -> bool:
    if type(saved) is tuple:
        return any(map(_unpacked_by_python, saved))
    return saved.unpack_hook is not None


def _is_plain_leaf(leaf: Tensor) -> bool:
    """Tell whether a leaf has no hooks; those put on its AccumulateGrad node before the forward pass are not seen."""
    return type(leaf) in _PLAIN and not leaf._backward_hooks and not leaf._post_accumulate_grad_hooks

"""Inputs of the fuse model's graph: activations come in, and the backward pass leaves their gradients there."""

from typing import Any

import torch
from torch import Tensor


class CutInput:
    """An activation on its way into the fuse model's graph, and its gradient once the backward pass has been there.

    The gradient stays None if the loss does not depend on the activation. Mutable for that. Not a leaf of the graph,
    since models may change their inputs in place, as they may when joined.
    """

    def __init__(self, activation: Tensor, learning: bool = True) -> None:
        self._waiting, self._learning = [activation], learning
        self._form = (activation.shape, activation.dtype, activation.device)
        self.gradient: Tensor | None = None

    def enter(self) -> Tensor:
        """Return the activation as a tensor whose gradient will be kept here; once."""
        if not self._learning:
            return self._waiting.pop()
        anchor = torch.empty(0, requires_grad=True)
        entered: Tensor = _GradientTap.apply(anchor, self)  # type: ignore[no-untyped-call]
        return entered

    def overflow(self) -> Tensor | None:
        """Return a gradient that says that the step is to be left out; None where none is wanted."""
        shape, dtype, device = self._form
        return torch.full(shape, torch.nan, dtype=dtype, device=device) if self._learning else None


class _GradientTap(torch.autograd.Function):
    """Outputs a tensor that came from nowhere in this graph; keeps what the backward pass brings."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, entering: CutInput) -> Tensor:
        ctx.entered = entering
        ctx.set_materialize_grads(False)  # an operator of the fuse model may return None for it
        return entering._waiting.pop()  # not kept: the graph would hold itself

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None]:
        ctx.entered.gradient = gradient
        return None, None


GRADIENT_TAP: type = _GradientTap._backward_cls  # its node in a graph

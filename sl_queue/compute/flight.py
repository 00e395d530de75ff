"""An activation on its way: the graph that it was computed with, until its gradient comes back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from sl_queue.compute.eager import backward, gradients_of
from sl_queue.compute.precision import repeated
from sl_queue.cut.rows import CutRows

Ends = tuple[list[Tensor], list[Tensor]]  # tensors that a backward pass begins at, and their gradients


@dataclass(frozen=True, slots=True)
class InFlight:
    """An activation with its graph, whose gradient has not come yet."""

    outputs: Sequence[Tensor] = field(repr=False)  # mostly one
    hooks: int  # `hooks_made()` before the forward pass
    weights: Mapping[str, Tensor] | None = field(repr=False)  # the copy it was computed with; None: the live ones
    rows: CutRows
    penalty: Tensor | None = field(default=None, repr=False)  # the base model's own loss of these rows

    def backpropagate(self, module: nn.Module, roots: list[Tensor], gradients: list[Tensor], *, keep: bool) -> None:
        """Add the gradients of the parameters; `keep`: another backward pass through the same graph follows."""
        if self.weights is None:
            backward(roots, gradients, keep=keep)
            return
        names = [name for name, weight in self.weights.items() if weight.requires_grad]
        leaves = [self.weights[name] for name in names]
        live = dict(module.named_parameters())
        found = gradients_of(roots, leaves, gradients, keep=keep)
        for name, grad in zip(names, found, strict=True):
            if grad is not None:
                before = live[name].grad
                live[name].grad = grad if before is None else before + grad

    def backpropagate_in_range(
        self, module: nn.Module, roots: list[Tensor], gradients: list[Tensor], where: str
    ) -> None:
        """Add the gradients of the parameters, at a scale at which none overflows."""

        def at(factor: float) -> None:
            self.backpropagate(module, roots, [gradient * factor for gradient in gradients], keep=True)

        repeated(list(module.parameters()), at, where)

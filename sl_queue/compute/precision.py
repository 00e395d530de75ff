"""Mixed precision: models compute in 16 bits where torch's autocast says so, over weights that stay as they are.

fp16 gradients are small enough to vanish, so the loss is scaled up, and gradients are scaled down before the optimizer.
The scale is one number of the whole run, and no message carries it: every party keeps it, and changes it as the label
holder does. Where a gradient of a step overflows at the label holder, it sends gradients that are not finite with the
last micro-batch of that step; whoever gets those leaves the step out and halves the scale, as the label holder does.
A base model whose own backward pass overflows, of gradients that are finite, repeats that pass at a smaller scale.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from sl_queue.compute.spec import Precision
from sl_queue.errors import CheckpointError, NonFiniteError
from sl_queue.protocol.checkpoint import State

_GROWTH: Final = 2.0
_SMALLEST: Final = 2.0**-14  # a scale at which nothing but the model can be at fault
_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}  # that layers compute in
_TRIES: Final = 40  # of a backward pass, each at half the scale of the one before


def computing(precision: Precision | None, device: torch.device) -> AbstractContextManager[object]:
    """Open the scope of a forward pass. Without torch's cache of weights, which all threads of a process share."""
    if precision is None:
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[precision.name], cache_enabled=False)


def scaling_of(precision: Precision | None) -> "LossScale | None":
    """Return the scale that a precision needs; None of bf16, whose range is that of float32."""
    if precision is None or precision.name != "fp16":
        return None
    return LossScale(precision.scale, precision.growth_interval)


@dataclass(slots=True)
class LossScale:
    """The scale of the loss, as torch's GradScaler changes it. Mutable: each step may change it."""

    scale: float
    growth_interval: int
    clean: int = 0  # steps without an overflow since the scale was changed
    spoiled: bool = False  # a gradient of this step was not finite

    def see(self, gradients: Iterable[Tensor | None]) -> bool:
        """Note gradients of this step; returns True if all are finite."""
        finite = all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
        self.spoiled = self.spoiled or not finite
        return finite

    def finish(self, parameters: Iterable[nn.Parameter], where: str) -> bool:
        """End a step: scale the gradients down, or forget them and return False if the step is to be left out.

        Raises NonFiniteError where no scale helps.
        """
        parameters, before = list(parameters), self.scale
        spoiled, self.spoiled = self.spoiled, False
        self.clean = 0 if spoiled else self.clean + 1
        if spoiled:
            self.scale /= _GROWTH
            for parameter in parameters:
                parameter.grad = None
            if self.scale < _SMALLEST:
                raise NonFiniteError(
                    f"{where}: gradients are not finite at any scale of the loss; lower the learning rate, or use "
                    'precision = "bf16"'
                )
            return False
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / before)
        if self.clean == self.growth_interval:
            self.scale, self.clean = self.scale * _GROWTH, 0
        return True

    def state(self, prefix: str) -> State:
        """Copy what a step changes."""
        return State({}, {prefix: [self.scale, self.clean]})

    def load(self, prefix: str, state: State) -> None:
        """Become what `state` returned."""
        if prefix not in state.values:
            raise CheckpointError(
                f'the checkpoint holds no scale of the loss ({prefix}), and precision = "fp16" has one'
            )
        self.scale, self.clean = state.values[prefix]
        self.spoiled = False


def repeated(parameters: Sequence[nn.Parameter], backward: Callable[[float], None], where: str) -> None:
    """Do a backward pass at the largest scale at which no gradient of these parameters overflows.

    `backward(factor)` starts from gradients times `factor`, and keeps its graph. Gradients are added to those that the
    parameters have. Raises NonFiniteError where no factor helps.
    """
    before = [parameter.grad for parameter in parameters]
    factor = 1.0
    for _ in range(_TRIES):
        for parameter in parameters:
            parameter.grad = None
        backward(factor)
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters):
            break
        factor /= _GROWTH
    else:
        raise NonFiniteError(f"{where}: its gradients are not finite at any scale, of finite ones that have arrived")
    for parameter, earlier in zip(parameters, before, strict=True):
        if parameter.grad is not None and factor != 1.0:
            parameter.grad.mul_(1.0 / factor)
        if earlier is not None:
            parameter.grad = earlier if parameter.grad is None else earlier + parameter.grad

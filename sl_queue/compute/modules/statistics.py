"""Running averages of normalisation layers (BatchNorm), kept apart from the forward passes that feed them.

A forward pass in training does not read them, yet torch folds what it saw into them at once, and so makes the order of
the passes matter. Computed apart, a layer works on copies with momentum 1, which leaves in them what this one pass saw;
`fold` then does what torch does on a CPU, and on CUDA for inputs (rows, columns), in the order of the micro-batches.
Elsewhere (cuDNN, which takes inputs of more axes, InstanceNorm, inputs that are not contiguous) a last bit may differ
from a plain run, but never with who computed it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from sl_queue.compute.modules.state import join

MEAN, VAR, COUNT = "running_mean", "running_var", "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class Statistics:
    """Layers of a module that keep running averages and are in training."""

    layers: Mapping[str, Any] = field(default_factory=dict, repr=False)  # by name

    @property
    def feeding(self) -> bool:
        """True if a forward pass now feeds any of them."""
        return any(layer.training for layer in self.layers.values())

    def buffers(self) -> dict[str, Tensor]:
        """Return the averages by their names in the module."""
        parts = (MEAN, VAR, COUNT)
        return {join(name, part): getattr(layer, part) for name, layer in self.layers.items() for part in parts}

    @contextmanager
    def apart(self, averages: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Give copies of these averages for one forward pass, whose layers forget what came before."""
        momentum = {name: layer.momentum for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.momentum = 1.0
            yield {name: averages[name].clone() for name in self.buffers()}
        finally:
            for name, layer in self.layers.items():
                layer.momentum = momentum[name]

    def seen(self, copies: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the forward pass on those copies saw; nothing of a layer that it did not reach."""
        counts = {name: join(name, COUNT) for name in self.layers}
        reached = [name for name, count in counts.items() if not torch.equal(copies[count], averages[count])]
        return {key: copies[key] for name in reached for key in (join(name, MEAN), join(name, VAR))}

    def fold(self, seen: Mapping[str, Tensor]) -> None:
        """Take what one forward pass saw into the averages."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                if join(name, MEAN) in seen:
                    _fold(layer, seen[join(name, MEAN)], seen[join(name, VAR)])


def _fold(layer: _NormBase, new_mean: Tensor, new_var: Tensor) -> None:
    mean, var, counted = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert mean is not None and var is not None and counted is not None
    counted.add_(1)
    share = layer.momentum if layer.momentum is not None else 1.0 / float(counted)
    new = torch.tensor(share, dtype=mean.dtype, device=mean.device)
    old = 1 - new
    mean.copy_(_rounded_once(new, new_mean, old * mean) if mean.is_cuda else new * new_mean + old * mean)
    var.copy_(_rounded_once(new, new_var, old * var))


def _rounded_once(factor: Tensor, value: Tensor, term: Tensor) -> Tensor:
    """Return `factor * value + term` as a processor computes it that multiplies and adds in one operation."""
    return factor.double() * value.double() + term.double()


def layers_that_count(module: torch.nn.Module, before: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """Return the layers that one forward pass since `before` has fed, and the names of those fed more than once."""
    layers, often = {}, []
    for name, layer in module.named_modules():
        counted = getattr(layer, COUNT, None)
        if not isinstance(layer, _NormBase) or counted is None or layer.running_mean is None:
            continue
        times = int(counted - before[join(name, COUNT)])
        if times == 1:
            layers[name] = layer
        elif times:
            often.append(name)
    return layers, often

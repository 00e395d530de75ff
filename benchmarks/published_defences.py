"""Defences of labels as they are published: noise that is drawn again for each message, and a loss with noise."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from sl_queue.cut.guard import Crossing
from sl_queue.privacy import defences
from sl_queue.privacy.draws import normal_stream
from sl_queue.privacy.guards import RowIndex

KEY = b"benchmark".ljust(32)


def anew(crossing: Crossing, count: int) -> Tensor:
    """Draw for this micro-batch of this epoch alone."""
    at = crossing.micro_batch
    return torch.from_numpy(normal_stream(KEY + repr((at.step, at.index, crossing.receiver)).encode(), count))


@dataclass(frozen=True, slots=True)
class MaxNormAnew:
    """Li et al. 2022; in FATE, fedlearner and SecretFlow under the same name or as `gradient perturb`."""

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        return defences.max_norm(tensor, anew(crossing, len(tensor)))


@dataclass(frozen=True, slots=True)
class IsotropicAnew:
    """Normal noise in all directions."""

    level: float

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        return defences.isotropic(tensor, self.level, anew(crossing, tensor.numel()).reshape(tensor.flatten(1).shape))


@dataclass(frozen=True, slots=True)
class Marvell:
    """Li et al. 2022: noise by class, of the covariances that minimise the sum of both KL divergences.

    Its power is `power` times the squared distance of the mean gradients of the two classes.
    """

    power: float
    labels: npt.NDArray[np.int64]
    index: RowIndex

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        positive = torch.from_numpy(self.labels[self.index(crossing.rows.keys)] == 1)
        flat, share = tensor.flatten(1).double(), float(positive.double().mean())
        if not 0 < share < 1:
            return tensor
        mean = (flat[~positive].mean(0), flat[positive].mean(0))
        apart = mean[1] - mean[0]
        distance = float(apart @ apart)
        if distance < 1e-30:
            return tensor
        spread = [float((flat[of] - m).square().mean()) for of, m in ((~positive, mean[0]), (positive, mean[1]))]
        chosen = _least_divergence(flat.shape[1], distance, share, spread, self.power * distance)
        draws = anew(crossing, flat.numel()).reshape(flat.shape)
        along = (draws @ apart)[:, None] * apart / distance
        scale = torch.from_numpy(chosen).sqrt()[positive.long()]  # (rows, 2): along and across
        return (flat + scale[:, :1] * along + scale[:, 1:] * (draws - along)).to(tensor.dtype).reshape(tensor.shape)


def _least_divergence(
    width: int, distance: float, share: float, spread: list[float], power: float
) -> npt.NDArray[np.float64]:
    """Return the noise's variance along and across the classes' difference, for class 0 and class 1; shape (2, 2)."""
    base, weights = np.array(spread) / distance + 1e-9, np.array([1 - share, share])
    limit = power / distance

    def divergence(flat: npt.NDArray[np.float64]) -> float:
        (a0, b0), (a1, b1) = flat.reshape(2, 2) + base[:, None]
        across = (width - 1) * (b0 / b1 + b1 / b0)
        return float(0.5 * (across + a0 / a1 + a1 / a0 + 1 / a0 + 1 / a1))

    def left(flat: npt.NDArray[np.float64]) -> float:
        along, across = flat.reshape(2, 2).T
        return limit - float(weights @ (along + (width - 1) * across))

    start = np.array([limit, 0.0, limit, 0.0])
    limits = [(0.0, None)] * 4
    found = minimize(divergence, start, bounds=limits, constraints={"type": "ineq", "fun": left}, method="SLSQP")
    chosen: npt.NDArray[np.float64] = np.maximum(found.x if found.success else start, 0).reshape(2, 2) * distance
    return chosen


class _NoisyLogit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, scale: float, generator: torch.Generator) -> Tensor:
        ctx.scale, ctx.generator = scale, generator
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        u = torch.rand(gradient.shape, generator=ctx.generator) - 0.5
        return gradient - ctx.scale / len(gradient) * u.sign() * torch.log1p(-2 * u.abs()), None, None


@dataclass(slots=True, eq=False)
class LaplaceAtTheLogit:
    """A loss whose gradient gets Laplace noise before it goes anywhere: epsilon an epoch is 1 / scale."""

    scale: float
    generator: torch.Generator

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        noisy = _NoisyLogit.apply(logits, self.scale, self.generator)  # type: ignore[no-untyped-call]
        return nn.functional.binary_cross_entropy_with_logits(noisy, labels.reshape(logits.shape).to(logits.dtype))

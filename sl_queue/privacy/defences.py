"""Defences of what crosses the cut layer: pure functions of a tensor and of draws, row by row.

Rows are the first axis, everything else is one row. A row of zeros stays one. Nothing here knows an epoch: what must
not be averaged out is drawn once for each row by the caller, from the row's own key.
"""

import math

import torch
from torch import Tensor


def max_norm(gradient: Tensor, draws: Tensor) -> Tensor:
    """Stretch each row along its own direction by a normal draw, up to the norm of the largest row of the batch.

    After Li et al. (2022), with draws that the caller makes once for each row: shape (rows,), standard normal. A
    batch of one row is left as it is.
    """
    flat = gradient.flatten(1).double()  # in which no quotient of two norms overflows
    norms: Tensor = flat.norm(dim=1)
    largest = norms.max() if len(norms) else norms.sum()
    missing = (largest.square() - norms.square()).clamp_min(0).sqrt()
    unit = flat / torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]
    return (flat + unit * (missing * draws.to(flat))[:, None]).to(gradient.dtype).reshape(gradient.shape)


def isotropic(gradient: Tensor, level: float, draws: Tensor) -> Tensor:
    """Add normal noise in all directions: `level` times the largest row's norm, spread over a row's numbers.

    `draws`: standard normal, shape (rows, numbers of a row).
    """
    flat = gradient.flatten(1)
    if not flat.numel():
        return gradient
    deviation: Tensor = flat.norm(dim=1).max() * level / math.sqrt(flat.shape[1])
    return (flat + draws.to(flat) * deviation).reshape(gradient.shape)


def clipped(activation: Tensor, bound: float) -> Tensor:
    """Scale each row whose norm is above `bound` down to it; differentiable."""
    norms: Tensor = activation.flatten(1).norm(dim=1)
    factor = (norms / bound).clamp_min(1.0).reshape(-1, *[1] * (activation.dim() - 1))
    return activation / factor


def noised(activation: Tensor, deviation: float, draws: Tensor) -> Tensor:
    """Add normal noise of this deviation; `draws` are standard normal, of the activation's shape."""
    return activation + draws.to(activation) * deviation


def distance_correlation(inputs: Tensor, activation: Tensor) -> Tensor:
    """Return how much two sets of rows have in common: 0 if independent, 1 if one is a similarity of the other."""
    one, other = _centred_distances(inputs), _centred_distances(activation)
    together, alone = (one * other).mean(), (one * one).mean() * (other * other).mean()
    found: Tensor = (together.clamp_min(1e-12) / (alone.sqrt() + 1e-12)).sqrt()
    return found


def nopeek(inputs: Tensor, activation: Tensor, weight: float) -> Tensor:
    """Return what NoPeek adds to an activation's gradient: `weight` times that of the distance correlation.

    Of fewer than three rows, or inputs that are no floating numbers, nothing.
    """
    if len(activation) < 3 or not inputs.is_floating_point():
        return torch.zeros_like(activation)
    with torch.enable_grad():
        leaf = activation.detach().requires_grad_()
        (pull,) = torch.autograd.grad(weight * distance_correlation(inputs.detach(), leaf), leaf)
    return pull


def _centred_distances(rows: Tensor) -> Tensor:
    flat = rows.flatten(1)
    distances = torch.cdist(flat, flat)
    return distances - distances.mean(0, keepdim=True) - distances.mean(1, keepdim=True) + distances.mean()

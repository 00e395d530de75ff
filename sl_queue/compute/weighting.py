"""Rows and labels that do not count alike: sample weights, class weights, labels that are not known.

A weighted mean over a step is not the mean of its micro-batches' means, unless each counts as much as its rows do.
So every micro-batch's loss is a sum over its elements, divided by their amount, and its gradient is weighted by its
share of the step's amount: the same as one mean over all rows of the step.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn

from sl_queue.compute.fitting import CLASSES_TAKEN, ELEMENTWISE, FittedLoss, kind_of
from sl_queue.compute.losses import LOSSES, Loss, are_soft, class_numbers
from sl_queue.errors import JobError
from sl_queue.protocol.schedule.row_order import Positions

_CLASSES = {LOSSES["cross_entropy"], *CLASSES_TAKEN}
_MARGINS = {nn.MultiMarginLoss, F.multi_margin_loss}  # which weigh classes in a mean over the rows
_IGNORED = -100  # torch's own choice


@dataclass(frozen=True, slots=True)
class Weighting:
    """Amounts that labels count for, and the loss before it is averaged."""

    elements: FittedLoss | None  # of each label; None: the loss takes the weights itself, or is one of known rows
    loss: FittedLoss
    weights: Tensor | None = field(repr=False)  # (all rows,) float64
    known: Tensor | None = field(repr=False)  # of each element of the loss, True where its label is known
    amounts: Tensor = field(repr=False)  # (all rows,) float64: of what a mean over these rows is a mean

    def amount(self, positions: Positions) -> float:
        """Return how much these rows count together."""
        return float(self.amounts[torch.from_numpy(positions)].sum())

    def __call__(self, output: Tensor, labels: Tensor, positions: Positions) -> Tensor:
        """Return the mean loss of these rows; of rows that do not count a zero that depends on the output."""
        rows = torch.from_numpy(positions)
        amount = self.amount(positions)
        known = None if self.known is None else self.known[rows].to(output.device)
        weights = None if self.weights is None else self.weights[rows].to(output.device)
        if amount == 0:
            return (output * 0).sum()
        if self.elements is not None:
            return self._of_elements(self.elements, output, labels, known, weights, amount)
        if known is not None:
            output, labels = output[known], labels[known]
            weights = None if weights is None else weights[known]
        return self.loss(output, labels) if weights is None else self.loss(output, labels, weights)

    @staticmethod
    def _of_elements(
        loss: FittedLoss, output: Tensor, labels: Tensor, known: Tensor | None, weights: Tensor | None, amount: float
    ) -> Tensor:
        found = loss(output, labels if known is None else torch.where(labels.isnan(), 0, labels))
        if weights is not None:
            found = found * weights.to(found.dtype).reshape(-1, *[1] * (found.dim() - 1))
        if known is not None:
            found = torch.where(known.reshape(found.shape), found, 0)
        return found.sum() / amount


def weighting_of(
    fit: FittedLoss,
    labels: npt.NDArray[Any],
    output: Tensor,
    weights: npt.NDArray[Any] | None,
    *,
    missing: bool,
    where: str,
) -> Weighting | None:
    """Return how rows count, None where all count alike; `output` is the fuse model's for a few rows.

    Raises JobError for a loss that cannot tell them apart.
    """
    known = None
    if missing and labels.dtype.kind == "f" and np.isnan(labels).any():
        known = torch.from_numpy(~np.isnan(labels))
    elements = _unreduced(fit)
    counts = None if elements is None else _counts(fit.loss, labels, output)
    if weights is None and known is None and counts is None:
        return None
    each = torch.ones(labels.shape, dtype=torch.bool) if known is None else known
    if elements is None:
        _require_own(fit, weights is not None, known is not None and known.dim() > 1, where)
        rows = each.reshape(len(labels), -1).all(1).double()
    else:
        each = _of_each_element(fit.loss, each, output)
        known = None if known is None else each
        rows = (each if counts is None else each * counts).double().reshape(len(labels), -1).sum(1)
    mine = None if weights is None else torch.from_numpy(np.ascontiguousarray(weights)).double()
    return Weighting(elements, fit, mine, known, rows if mine is None else rows * mine)


def known_rows(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return True for the rows of which every label is known."""
    if labels.dtype.kind != "f":
        return np.ones(len(labels), np.bool_)
    found: npt.NDArray[np.bool_] = ~np.isnan(labels.reshape(len(labels), -1)).any(axis=1)
    return found


def _of_each_element(loss: Loss, known: Tensor, output: Tensor) -> Tensor:
    """Return of each element of the loss whether its label is known: one of all classes, where they share it."""
    if kind_of(loss) not in _CLASSES:
        return known
    if are_soft(known, output):
        return known.all(1)
    return known.squeeze(1) if known.dim() == output.dim() > 1 and known.shape[1] == 1 else known


def _counts(loss: Loss, labels: npt.NDArray[Any], output: Tensor) -> Tensor | None:
    """Return how much each element of a cross-entropy counts by its class; None where all count alike.

    Of labels that are probabilities torch takes the mean over the rows, whatever their classes weigh.
    """
    if kind_of(loss) not in _CLASSES - _MARGINS or are_soft(labels, output):
        return None
    classes = class_numbers(torch.from_numpy(np.nan_to_num(labels)), output)
    weight, ignored = _option(loss, "weight"), torch.eq(classes, _option(loss, "ignore_index", _IGNORED))
    if weight is None:
        return (~ignored).double() if bool(ignored.any()) else None
    of_classes: Tensor = torch.as_tensor(weight, dtype=torch.float64, device="cpu").detach()
    return of_classes[classes.clamp(0, len(of_classes) - 1)].masked_fill(ignored, 0.0)


def _option(loss: Any, name: str, default: Any = None) -> Any:
    """Return an argument of a loss, or what an instance was made with."""
    while isinstance(loss, partial):
        if name in loss.keywords:
            return loss.keywords[name]
        loss = loss.func
    return getattr(loss, name, default) if isinstance(loss, nn.Module) else default


def _unreduced(fit: FittedLoss) -> FittedLoss | None:
    """Return the same loss for each label, None of a loss of the user's own and of one that takes no mean."""
    loss: Any = fit.loss
    if kind_of(loss) not in {*LOSSES.values(), *ELEMENTWISE, *CLASSES_TAKEN}:
        return None
    if _option(loss, "reduction", "mean") != "mean":
        return None
    if not isinstance(loss, nn.Module):
        return replace(fit, loss=partial(loss, reduction="none"))
    each: Any = copy.copy(loss)
    each.reduction = "none"
    return replace(fit, loss=each)


def _require_own(fit: FittedLoss, weighted: bool, several_unknown: bool, where: str) -> None:
    """Raise JobError for a loss of the user's own that is not made for this."""
    if several_unknown:
        raise JobError(
            f'{where}: missing_labels = "mask" with several labels a row needs a loss that has a name, or one of torch'
        )
    if weighted and not _takes_weights(fit.loss):
        raise JobError(
            f"{where}: rows have weights, and the loss takes none: let it take them as a third argument and return the "
            "weighted mean, or take a loss that has a name"
        )


def alike(loss: Loss) -> Loss:
    """Return a loss of the user's own that takes weights as one of rows that count alike; any other as it is."""
    kind = kind_of(loss)
    if kind in LOSSES.values() or kind in ELEMENTWISE | CLASSES_TAKEN or not _takes_weights(loss):
        return loss
    weighted: Any = loss
    return lambda output, labels: weighted(output, labels, output.new_ones(len(output), dtype=torch.float64))


def _takes_weights(loss: Callable[..., Any]) -> bool:
    called = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters)

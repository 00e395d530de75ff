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
from torch import Tensor, nn

from sl_queue.compute.fitting import CLASSES_TAKEN, ELEMENTWISE, FittedLoss, kind_of
from sl_queue.compute.losses import LOSSES, Loss
from sl_queue.errors import JobError
from sl_queue.protocol.schedule.row_order import Positions


@dataclass(frozen=True, slots=True)
class Weighting:
    """Amounts that labels count for, and the loss before it is averaged."""

    elements: FittedLoss | None  # of each label; None: the loss takes the weights itself, or is one of known rows
    loss: FittedLoss
    weights: Tensor | None = field(repr=False)  # (all rows,) float64
    known: Tensor | None = field(repr=False)  # as the labels, True where one is known
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
        found = loss(output, labels if known is None else torch.where(known, labels, 0))
        if weights is not None:
            found = found * weights.to(found.dtype).reshape(-1, *[1] * (found.dim() - 1))
        if known is not None:
            found = torch.where(known.reshape(found.shape), found, 0)
        return found.sum() / amount


def weighting_of(
    fit: FittedLoss,
    labels: npt.NDArray[Any],
    weights: npt.NDArray[Any] | None,
    *,
    missing: bool,
    where: str,
) -> Weighting | None:
    """Return how rows count, None where all count alike. Raises JobError for a loss that cannot tell them apart."""
    known = None
    if missing and labels.dtype.kind == "f" and np.isnan(labels).any():
        known = torch.from_numpy(~np.isnan(labels))
    of_classes = _class_weights(fit.loss)
    if weights is None and known is None and of_classes is None:
        return None
    elements = _unreduced(fit)
    if elements is None:
        _require_own(fit, weights is not None, labels, where)
    mine = None if weights is None else torch.from_numpy(np.ascontiguousarray(weights)).double()
    amounts = _amounts(labels, mine, known, of_classes, one_a_row=elements is None)
    return Weighting(elements, fit, mine, known, amounts)


def known_rows(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return True for the rows of which every label is known."""
    if labels.dtype.kind != "f":
        return np.ones(len(labels), np.bool_)
    found: npt.NDArray[np.bool_] = ~np.isnan(labels.reshape(len(labels), -1)).any(axis=1)
    return found


def _amounts(
    labels: npt.NDArray[Any], weights: Tensor | None, known: Tensor | None, of_classes: Any, *, one_a_row: bool
) -> Tensor:
    """Return, for each row, of how much a mean over it is a mean."""
    each = torch.ones(labels.shape, dtype=torch.float64) if known is None else known.double()
    if of_classes is not None and labels.ndim == 1:
        classes = torch.from_numpy(np.nan_to_num(labels).astype(np.int64))
        each = each * torch.as_tensor(of_classes, dtype=torch.float64)[classes]
    found = each.reshape(len(labels), -1)
    rows = found.amin(1) if one_a_row else found.sum(1)
    return rows if weights is None else rows * weights


def _class_weights(loss: Loss) -> Any:
    """Return the weights of the classes, of our own cross-entropy."""
    return loss.keywords.get("weight") if isinstance(loss, partial) and loss.func is LOSSES["cross_entropy"] else None


def _unreduced(fit: FittedLoss) -> FittedLoss | None:
    """Return the same loss for each label, None of a loss of the user's own."""
    loss: Any = fit.loss
    kind = kind_of(loss)
    if kind in LOSSES.values() or (kind in ELEMENTWISE | CLASSES_TAKEN and not isinstance(loss, nn.Module)):
        return replace(fit, loss=partial(loss, reduction="none"))
    if kind in ELEMENTWISE | CLASSES_TAKEN and getattr(loss, "reduction", None) == "mean":
        each = copy.copy(loss)
        each.reduction = "none"
        return replace(fit, loss=each)
    return None


def _require_own(fit: FittedLoss, weighted: bool, labels: npt.NDArray[Any], where: str) -> None:
    """Raise JobError for a loss of the user's own that is not made for this."""
    if labels.ndim > 1 and not weighted:
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

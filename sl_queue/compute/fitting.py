"""A loss with the dtype and the shape in which it takes output and labels.

The named losses and those of torch are known. A loss of the user's own may be written for labels in the shape of the
output, `(output - labels).abs().mean()`, or for labels as they stand in the table, `output[:, 0] * labels`; the wrong
one of the two broadcasts (rows,) against (rows, 1), and every output meets every label. So both are tried: a loss that
does not change when the labels change places does not know which label is whose.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn

from sl_queue.compute.losses import (
    LOSSES,
    Loss,
    are_soft,
    as_classes,
    as_output,
    floor_of,
    label_tensor,
    same_numbers,
    widened,
)
from sl_queue.compute.running import blame
from sl_queue.compute.seeds import seeded
from sl_queue.cut.tensors import described
from sl_queue.errors import ComputeError, JobError

ELEMENTWISE = {
    *(nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss),
    *(nn.SoftMarginLoss, F.l1_loss, F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.soft_margin_loss),
}
CLASSES_TAKEN = {nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss, F.cross_entropy, F.nll_loss, F.multi_margin_loss}

_TRIED = 4  # rows on which both forms are compared
_SAME = 1e-12  # relative, in float64: what changes by less does not change
_FEW = 3  # rows that are doubled
_SUMMED = 1e-5  # relative, in float32
_MORE_ROWS = 64  # for a loss that is a constant of two rows
_ANYWHERE = ((0.1, 0.02), (0.2, 0.16), (0.3, 0.06), (0.4, 0.32))  # o -> (1 - a) o + b tells equal outputs apart


class Form(Enum):
    """The form in which a loss takes its labels."""

    NAMED = auto()  # one of ours, which sees to it
    OUTPUT = auto()  # in shape and dtype of the output: torch's elementwise losses
    CLASSES = auto()  # class numbers (rows,), or a probability for each class
    SHAPE = auto()  # in the shape of the output; whole numbers stay whole
    TABLE = auto()  # as they stand in the table; whole numbers stay whole


@dataclass(frozen=True, slots=True)
class FittedLoss:
    """A loss that may be called with output and labels as they come."""

    loss: Loss
    form: Form
    floor: torch.dtype  # the narrowest dtype to compute in

    def __call__(self, output: Tensor, labels: Tensor, *weights: Tensor) -> Tensor:
        """`weights` of the rows are handed on to a loss of the user's own that takes them.

        What such a loss changes in place are copies: output and labels are measured after it.
        """
        output = widened(output, self.floor)
        loss: Any = self.loss
        match self.form:
            case Form.NAMED:
                return loss(output, labels)  # type: ignore[no-any-return]
            case Form.OUTPUT:
                return loss(output, as_output(labels, output))  # type: ignore[no-any-return]
            case Form.CLASSES:
                return loss(output, as_classes(labels, output))  # type: ignore[no-any-return]
            case Form.SHAPE if same_numbers(labels, output):
                shaped = _wide(labels, output).clone().reshape(output.shape)
                return loss(output.clone(), shaped, *weights)  # type: ignore[no-any-return]
            case _:
                return loss(output.clone(), _wide(labels, output).clone(), *weights)  # type: ignore[no-any-return]


def kind_of(loss: Any) -> Any:
    """Return the class or function by which a loss is known: that of an instance, and inside a partial."""
    while isinstance(loss, partial):
        loss = loss.func
    return type(loss) if isinstance(loss, nn.Module) else loss


def fitted(
    loss: Loss, name: Any, output: Tensor, labels: npt.NDArray[Any], where: str
) -> tuple[FittedLoss, list[str], tuple[Tensor, Tensor]]:
    """Return the loss with its form, found on the fuse model's `output` for a few rows, and warnings about it.

    Last comes a loss with its graph, and the output that it is of. Raises JobError or ComputeError for a loss that
    cannot be trained with.
    """
    form, kind = Form.NAMED, kind_of(loss)
    warnings: list[str] = []
    tensor = label_tensor(labels)
    if kind in ELEMENTWISE:
        form = Form.OUTPUT
    elif kind in CLASSES_TAKEN:
        form = Form.CLASSES
        _check_whole(labels, output, where)
    elif kind not in LOSSES.values():
        form, warnings = _form_of(loss, output, tensor)
    floor = torch.float32 if form is Form.CLASSES or name == "cross_entropy" else floor_of(labels)
    fit = FittedLoss(loss, form, floor)
    return fit, warnings, _mean_of(fit, output, tensor, where)


def _check_whole(labels: npt.NDArray[Any], output: Tensor, where: str) -> None:
    if labels.dtype.kind == "f" and not are_soft(labels, output) and not (labels == np.floor(labels)).all():
        raise JobError(f"{where}: labels are not whole numbers; this loss takes class numbers 0, 1, 2, ...")


def _wide(labels: Tensor, output: Tensor) -> Tensor:
    return labels.to(output.dtype) if labels.is_floating_point() else labels


# In the shape of the output, or as in the table -----------------------------------------------------------------


def _form_of(loss: Loss, output: Tensor, labels: Tensor) -> tuple[Form, list[str]]:
    """Find the form by trying both where they differ, and where only axes of length one make the difference."""
    if not same_numbers(labels[:1], output[:1]):
        return Form.TABLE, []
    if labels.shape[1:] == output.shape[1:]:
        return Form.SHAPE, []
    for outputs, few in _trials(output, labels):
        found = {form: _tried(loss, form, outputs, few) for form in (Form.SHAPE, Form.TABLE)}
        shape, table = found[Form.SHAPE], found[Form.TABLE]
        if shape is None and table is None:
            continue
        if shape is None or table is None:
            return (Form.TABLE if shape is None else Form.SHAPE), []
        if shape.pairs != table.pairs:
            return (Form.SHAPE if shape.pairs else Form.TABLE), []
        if abs(shape.value - table.value) <= _SAME * abs(shape.value):
            return Form.SHAPE, []
        warning = (
            f"the loss gives another value for labels of shape {_rows(labels)} than for {_rows(output)}, that of the "
            f"output; it is given {_rows(labels)}, as in the table. If it compares them row by row, reshape them in it"
        )
        return Form.TABLE, [warning]
    return Form.SHAPE, []


@dataclass(frozen=True, slots=True)
class _Tried:
    value: float
    pairs: bool  # the value depends on which label is whose


def _tried(loss: Loss, form: Form, output: Tensor, labels: Tensor) -> _Tried | None:
    """Return what the loss makes of labels in this form; None if it fails on them."""

    def value_of(rows: Tensor) -> float:
        fit = FittedLoss(_copy(loss), form, output.dtype)  # neither its state nor its draws change from call to call
        with seeded(0, output.device), torch.enable_grad():  # it may ask for gradients of its own
            return fit(output.requires_grad_().clone(), rows).item()

    try:
        value, other = value_of(labels), value_of(labels.roll(1, 0))
    except Exception:  # of the user's code; when no form works, the trial that follows reports it
        return None
    return _Tried(value, abs(value - other) > _SAME * abs(value)) if np.isfinite([value, other]).all() else None


def _copy(loss: Loss) -> Loss:
    try:
        return copy.deepcopy(loss)
    except Exception:  # one that holds a lock or an open file
        return loss


def _trials(output: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield outputs that differ from row to row with labels that differ, if any do: near the labels and the model's."""
    first = labels.reshape(len(labels), -1)[:, 0]
    picked = torch.stack([first.argmin(), first.argmax(), torch.tensor(0), torch.tensor(len(labels) // 2)])
    few = labels[picked].to(output.device)
    rows = torch.nan_to_num(output[torch.arange(_TRIED) % len(output)].double(), 0.5, 0.5, 0.5)
    change = torch.tensor(_ANYWHERE, dtype=torch.float64, device=output.device)
    a, b = (change[:, i].reshape(-1, *[1] * (output.dim() - 1)) for i in (0, 1))
    rows = (1 - a) * rows + b
    wide = few.double() if few.is_floating_point() else few
    if few.abs().max() > 1:  # no probabilities
        yield rows + few.double().mean(), wide
    yield rows, wide
    yield rows.to(output.dtype), few


def _rows(tensor: Tensor) -> str:
    return f"(rows, {', '.join(map(str, tensor.shape[1:]))})" if tensor.dim() > 1 else "(rows,)"


# One number with a gradient -------------------------------------------------------------------------------------


def _mean_of(loss: FittedLoss, output: Tensor, labels: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return a loss with its graph and the output that it is of.

    Tried on as many rows as no other axis has, so that labels do not fit by chance. Raises ComputeError unless it is
    one number that depends on the output.
    """
    n_rows = next(n for n in range(2, 9) if n not in output.shape[1:])
    for rows in (n_rows, _MORE_ROWS):
        outputs = output[torch.arange(rows) % len(output)].requires_grad_()
        few = labels[torch.arange(rows) % len(labels)].to(output.device)
        what = f"the loss failed on output {described(outputs)} and labels {described(few)}"
        with blame(f"{where}: {what}"), torch.enable_grad():
            value = loss(outputs.clone(), few)  # a clone may be changed in place
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            got = described(value) if isinstance(value, Tensor) else type(value).__name__
            raise ComputeError(f"{where}: the loss returns {got}; it must return the mean over the rows, one number")
        if value.requires_grad:
            return value, outputs
    raise ComputeError(
        f"{where}: the loss does not depend on the fuse model's output, or was cut off from it (detach, item, numpy, "
        "no_grad, argmax, a comparison); nothing could be learned"
    )


def adds_up(fit: FittedLoss, output: Tensor, labels: Tensor) -> bool:
    """Return True for a loss that is a sum over the rows, not a mean: of all rows twice it is twice as large."""
    if kind_of(fit.loss) in LOSSES.values():
        return False
    rows = torch.arange(2 * _FEW) % _FEW
    outputs, few = output.detach()[rows % len(output)], labels[rows % len(labels)].to(output.device)

    def value_of(n_rows: int) -> float:
        with blame("the loss failed"), seeded(0, output.device), torch.enable_grad():
            tried = replace(fit, loss=_copy(fit.loss))
            return tried(outputs[:n_rows].clone().requires_grad_(), few[:n_rows]).item()

    try:
        once, twice = value_of(_FEW), value_of(2 * _FEW)
    except Exception:  # of the user's code, which takes other numbers of rows
        return False
    return once != 0 and abs(twice - 2 * once) <= _SUMMED * abs(once)

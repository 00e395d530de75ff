"""The losses that a party file may name, and the dtype and shape in which each takes output and labels.

Numbers are never narrowed to suit others: output and labels meet in float32 at least, as under torch.autocast.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn

from sl_queue.compute.modules.handover import Copies, Take, modules_in
from sl_queue.compute.spec import ComputeSpec
from sl_queue.cut.tensors import described
from sl_queue.errors import JobError, ShapeError

Loss = Callable[[Tensor, Tensor], Tensor]  # (output, labels) -> the mean over the rows
_ONE = 1e-3  # how far the probabilities of a soft label may be from adding up to one


def bce_with_logits(output: Tensor, labels: Tensor, pos_weight: Any = None, reduction: str = "mean") -> Tensor:
    """Compute binary cross-entropy of logits; labels from 0 to 1, (rows,) or as the output."""
    output = widened(output)
    weight = None if pos_weight is None else torch.as_tensor(pos_weight, dtype=output.dtype, device=output.device)
    given = as_output(labels, output)
    return F.binary_cross_entropy_with_logits(output, given, pos_weight=weight, reduction=reduction)


def cross_entropy(
    output: Tensor, labels: Tensor, weight: Any = None, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """Compute cross-entropy of logits (rows, classes); labels are class numbers (rows,), or probabilities."""
    output = widened(output)
    each = None if weight is None else torch.as_tensor(weight, dtype=output.dtype, device=output.device)
    given = as_classes(labels, output)
    return F.cross_entropy(output, given, each, reduction=reduction, label_smoothing=label_smoothing)


def mse(output: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Compute mean squared error; labels (rows,) or as the output."""
    output = widened(output)
    return F.mse_loss(output, as_output(labels, output), reduction=reduction)


def l1(output: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Compute mean absolute error; labels (rows,) or as the output."""
    output = widened(output)
    return F.l1_loss(output, as_output(labels, output), reduction=reduction)


def huber(output: Tensor, labels: Tensor, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    """Compute squared error up to `delta`, absolute beyond; labels (rows,) or as the output."""
    output = widened(output)
    return F.huber_loss(output, as_output(labels, output), reduction=reduction, delta=delta)


def poisson(
    output: Tensor, labels: Tensor, log_input: bool = True, full: bool = False, reduction: str = "mean"
) -> Tensor:
    """Compute negative log likelihood of counts; the output is the rate's logarithm unless `log_input` is false."""
    output = widened(output)
    return F.poisson_nll_loss(output, as_output(labels, output), log_input, full, reduction=reduction)


def bce(output: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Compute binary cross-entropy of probabilities; labels from 0 to 1, (rows,) or as the output."""
    output = widened(output)
    return F.binary_cross_entropy(output, as_output(labels, output), reduction=reduction)


LOSSES: Mapping[str, Loss] = {
    "bce_with_logits": bce_with_logits,
    "cross_entropy": cross_entropy,
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "poisson": poisson,
    "bce": bce,
}


def loss_of(spec: ComputeSpec, device: torch.device, take: Take | None = None) -> Loss:
    """Return the loss that a party file names or brings; `take` is how to obtain one given in code."""
    assert spec.objective is not None
    loss = spec.objective.loss
    where = f"party {spec.party!r}: [fuse] loss = {loss!r}"
    if isinstance(loss, Mapping):
        return partial(LOSSES[loss["name"]], **{key: value for key, value in loss.items() if key != "name"})
    if isinstance(loss, str):
        if loss in LOSSES:
            return LOSSES[loss]
        if ":" not in loss:
            raise JobError(f"{where} is unknown; allowed are {', '.join(LOSSES)} and module:callable")
        loss = spec.code.load(loss)
    if inspect.isclass(loss):  # torch.nn:L1Loss
        try:
            loss = loss()
        except TypeError as error:
            raise JobError(f"{where} cannot be built without arguments: {error}") from None
    elif not isinstance(loss, FunctionType):
        loss = (take or Copies())(spec.party, "loss", loss, made=False)
    for module in _own_modules(loss):
        module.to(device)
    return loss  # type: ignore[no-any-return]


def _own_modules(loss: Any) -> list[nn.Module]:
    """Return the modules of a loss but those of a function's variables, which are the caller's and no copies."""
    if isinstance(loss, partial):
        return [module for part in (loss.func, *loss.args, *loss.keywords.values()) for module in _own_modules(part)]
    return [] if isinstance(loss, FunctionType) else modules_in(loss)


# Dtype ----------------------------------------------------------------------------------------------------------


def widened(output: Tensor, floor: torch.dtype = torch.float32) -> Tensor:
    """Return the output in its own dtype, or in `floor` if that is wider."""
    return output if output.dtype == floor else output.to(torch.promote_types(output.dtype, floor))


def floor_of(labels: npt.NDArray[Any]) -> torch.dtype:
    """Return the narrowest of float32 and float64 in which a loss may compute with these labels.

    float64 for whole numbers that float32 does not have, and for labels that it can hardly tell apart, because they
    differ by little of their size. Fractions are rounded to float32, as the weights are that they train.
    """
    if labels.dtype.kind not in "fiu" or labels.dtype == np.float32:
        return torch.float32
    with np.errstate(over="ignore"):
        rounded = labels.astype(np.float32)
    exact = labels.astype(np.float64, copy=False)
    if (rounded == exact).all():
        return torch.float32
    largest, spread = np.abs(exact).max(), np.ptp(exact)
    close = not np.isfinite(rounded).all() or spread < largest * 2.0**-12
    return torch.float64 if close or (exact == np.floor(exact)).all() else torch.float32


def label_tensor(labels: npt.NDArray[Any]) -> Tensor:
    """Return all labels as they are: floating ones in their own dtype, integers and booleans as int64."""
    tensor = torch.from_numpy(np.ascontiguousarray(labels))
    return tensor if tensor.is_floating_point() else tensor.long()


# Shape ----------------------------------------------------------------------------------------------------------


def as_output(labels: Tensor, output: Tensor) -> Tensor:
    """Return labels in the dtype and shape of the output; only axes of length one may differ."""
    return shaped(labels, output).to(output.dtype)


def shaped(labels: Tensor, output: Tensor) -> Tensor:
    """Return labels in the shape of the output. Raises ShapeError unless only axes of length one differ."""
    if not same_numbers(labels, output):
        raise ShapeError(
            f"the fuse model's output is {described(output)}, the labels are {described(labels)}; this loss needs a "
            "number of the output for each of the labels: check the last layer, or take another loss"
        )
    return labels.reshape(output.shape)


def same_numbers(labels: Tensor, output: Tensor) -> bool:
    """Return True if labels and output differ in axes of length one at most."""
    return len(labels) == len(output) and _long_axes(labels) == _long_axes(output)


def as_classes(labels: Tensor, output: Tensor) -> Tensor:
    """Return labels as a cross-entropy takes them: class numbers, or probabilities in the dtype of the output."""
    return labels.to(output.dtype) if are_soft(labels, output) else class_numbers(labels, output)


def are_soft(labels: Tensor | npt.NDArray[Any], output: Tensor) -> bool:
    """Return True for labels (rows, classes, ...) of an output (rows, classes, ...): one-hot, or probabilities."""
    return labels.ndim == output.dim() > 1 and labels.shape[1] == output.shape[1] > 1


def class_numbers(labels: Tensor, output: Tensor) -> Tensor:
    """Return labels as class numbers, without an axis for the classes."""
    if are_soft(labels, output):
        return labels.argmax(1)
    if labels.dim() == output.dim() and labels.dim() > 1 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    return labels.long()


def _long_axes(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape[1:] if size != 1]


# Values ---------------------------------------------------------------------------------------------------------


def check_labels(labels: npt.NDArray[Any] | None, output: Tensor, loss: str | Any, where: str) -> None:
    """Raise JobError if labels do not suit a named loss and the fuse model's output, (any number of rows, ...)."""
    if labels is None:
        raise JobError(f"{where}: the table has no labels; name their column as `label` in [data]")
    if labels.dtype.kind not in "fiub":
        raise JobError(f"{where}: labels are {labels.dtype}; write them as numbers, classes as 0, 1, 2, ...")
    if not np.isfinite(labels).all():
        raise JobError(f"{where}: labels hold NaN or infinity; remove those rows at every party")
    if loss == "cross_entropy":
        check_classes(labels, output, where)
    elif loss in ("bce_with_logits", "bce") and (labels.min() < 0 or labels.max() > 1):
        raise JobError(
            f"{where}: labels go from {labels.min()} to {labels.max()}; {loss} takes 0 to 1{_renumber(labels)}"
        )
    elif loss == "poisson" and labels.min() < 0:
        raise JobError(f"{where}: labels go down to {labels.min()}; poisson takes counts, 0 and above")


def _renumber(labels: npt.NDArray[Any]) -> str:
    """Return the remedy for two classes that are not 0 and 1."""
    low, high = labels.min(), labels.max()
    two = ((labels == low) | (labels == high)).all()
    return f": write {low:g} as 0 and {high:g} as 1" if two and low != high else ""


def check_classes(labels: npt.NDArray[Any], output: Tensor, where: str) -> None:
    """Raise JobError unless labels are class numbers or probabilities for the model's output, (rows, classes, ...)."""
    if output.dim() < 2:
        raise JobError(f"{where}: the fuse model's output is {described(output)}; cross_entropy takes (rows, classes)")
    if are_soft(labels, output):
        _check_soft(labels, where)
        return
    classes = output.shape[1]
    if labels.dtype.kind == "f" and not (labels == np.floor(labels)).all():
        raise JobError(f"{where}: labels are not whole numbers; cross_entropy takes classes 0 to {classes - 1}")
    if labels.min() < 0 or labels.max() >= classes:
        raise JobError(
            f"{where}: class labels go from {int(labels.min())} to {int(labels.max())}, but the fuse model has "
            f"{classes} outputs, for classes 0 to {classes - 1}; number the classes from 0, or give it more outputs"
        )


def _check_soft(labels: npt.NDArray[Any], where: str) -> None:
    sums = labels.sum(axis=1)
    wrong = (labels < 0).any(axis=1) | (np.abs(sums - 1) > _ONE)
    bad = int(wrong.reshape(len(labels), -1).any(axis=1).sum())
    if bad:
        axes = ", ".join(map(str, labels.shape[1:]))
        raise JobError(
            f"{where}: labels are {labels.dtype} (rows, {axes}), a probability for each class, but in "
            f"{bad} of {len(labels)} rows they are negative or do not add up to 1; with several classes true at once "
            "take bce_with_logits"
        )

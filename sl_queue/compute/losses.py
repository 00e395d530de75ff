"""The losses that a party file may name, and what each demands of labels and output."""

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn

from sl_queue.compute.handover import Copies, Take
from sl_queue.compute.tensors import described
from sl_queue.errors import JobError, ShapeError
from sl_queue.job import PartyFile, imported

Loss = Callable[[Tensor, Tensor], Tensor]  # (output, labels) -> the mean over the rows


def bce_with_logits(output: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of logits; labels from 0 to 1, (rows,) or as the output."""
    return F.binary_cross_entropy_with_logits(output, as_output(labels, output))


def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (rows, classes); labels are class numbers (rows,)."""
    return F.cross_entropy(output, class_numbers(labels, output))


def mse(output: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error; labels (rows,) or as the output."""
    return F.mse_loss(output, as_output(labels, output))


LOSSES: Mapping[str, Loss] = {"bce_with_logits": bce_with_logits, "cross_entropy": cross_entropy, "mse": mse}


def loss_of(party_file: PartyFile, device: torch.device, take: Take | None = None) -> Loss:
    """The loss that a party file names or brings; `take` says how to come by one that is given in code."""
    assert party_file.fuse is not None
    loss: Any = party_file.fuse.loss
    where = f"party {party_file.party!r}: [fuse] loss = {loss!r}"
    if isinstance(loss, str):
        if loss in LOSSES:
            return LOSSES[loss]
        if ":" not in loss:
            raise JobError(f"{where} is unknown; allowed are {', '.join(LOSSES)} and module:callable")
        loss = imported(loss, party_file.folder)
    if inspect.isclass(loss):  # torch.nn:L1Loss
        try:
            loss = loss()
        except TypeError as error:
            raise JobError(f"{where} cannot be built without arguments: {error}") from None
    elif not isinstance(loss, FunctionType):
        loss = (take or Copies())(party_file.party, "loss", loss, made=False)
    return loss.to(device) if isinstance(loss, nn.Module) else loss


def as_output(labels: Tensor, output: Tensor) -> Tensor:
    """Labels in the dtype and shape of the output; only axes of length one may differ."""
    if _long_axes(labels) != _long_axes(output) or len(labels) != len(output):
        raise ShapeError(
            f"the fuse model's output is {described(output)}, the labels are {described(labels)}; this loss needs a "
            "number of the output for each of the labels: check the last layer, or take another loss"
        )
    return labels.to(output.dtype).reshape(output.shape)


def class_numbers(labels: Tensor, output: Tensor) -> Tensor:
    """Labels as class numbers, without an axis for the classes."""
    if labels.dim() == output.dim() and labels.dim() > 1 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    return labels.long()


def _long_axes(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape[1:] if size != 1]


def label_tensor(labels: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    """All labels: floating ones in `dtype`, integers and booleans as int64."""
    tensor = torch.from_numpy(np.ascontiguousarray(labels))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor.long()


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
    elif loss == "bce_with_logits" and (labels.min() < 0 or labels.max() > 1):
        raise JobError(f"{where}: labels go from {labels.min()} to {labels.max()}; bce_with_logits takes 0 to 1")


def check_classes(labels: npt.NDArray[Any], output: Tensor, where: str) -> None:
    """Raise JobError unless labels are class numbers for the model's output, (rows, classes, ...)."""
    if output.dim() < 2:
        raise JobError(f"{where}: the fuse model's output is {described(output)}; cross_entropy takes (rows, classes)")
    classes = output.shape[1]
    if labels.dtype.kind == "f" and not (labels == np.floor(labels)).all():
        raise JobError(f"{where}: labels are not whole numbers; cross_entropy takes classes 0 to {classes - 1}")
    if labels.min() < 0 or labels.max() >= classes:
        raise JobError(
            f"{where}: class labels go from {int(labels.min())} to {int(labels.max())}, but the fuse model has "
            f"{classes} outputs, for classes 0 to {classes - 1}; number the classes from 0, or give it more outputs"
        )

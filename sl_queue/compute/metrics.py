"""Metrics over all held-out rows, computed once from all outputs, so that no micro-batch or order shows in them.

A metric that the held-out rows do not define (AUROC of a single class) is None. Of several classes, precision, recall,
F1, AUROC and average precision are means over the classes; AUROC and average precision leave out a class that no
held-out row has, or every one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sl_queue.compute.losses import as_output, check_classes, class_numbers
from sl_queue.errors import JobError

Metric = Callable[[Tensor, Tensor], float | None]  # (predictions, targets), both on the CPU
_OF_NUMBERS = {"mse", "mae", "r2"}
_Function = Callable[..., Tensor]  # of torchmetrics


class Task(StrEnum):
    """What is predicted; it decides which metrics there are."""

    BINARY = "binary"  # one logit a row, or several independent ones, which are then pooled
    MULTICLASS = "multiclass"  # a logit for each class
    REGRESSION = "regression"


def task_of(loss: object, output: Tensor, labels: npt.NDArray[Any], metrics: Sequence[str]) -> Task:
    """The task that a loss implies; with a loss of the user's own, what labels, output and wanted metrics imply."""
    match loss:
        case "bce_with_logits":
            return Task.BINARY
        case "cross_entropy":
            return Task.MULTICLASS
        case "mse":
            return Task.REGRESSION
    if _OF_NUMBERS.intersection(metrics) or (labels.dtype.kind == "f" and (labels != np.floor(labels)).any()):
        return Task.REGRESSION
    return Task.MULTICLASS if output.dim() > 1 and output.shape[1] > 1 and labels.ndim < output.dim() else Task.BINARY


def metrics_of(names: Sequence[str], task: Task, where: str) -> dict[str, Metric]:
    """The named metrics. Raises JobError for one that the task does not have."""
    wanted = [name for name in names if name != "loss"]  # which is always told
    known = _known(task) if wanted else {}
    for name in wanted:
        if name not in known:
            allowed = ", ".join(("loss", *known))
            raise JobError(f"{where} [fuse] metrics: {name!r} is unknown for a {task} loss; allowed are {allowed}")
    return {name: known[name] for name in wanted}


def check_targets(task: Task, output: Tensor, labels: npt.NDArray[Any], metrics: Iterable[str], where: str) -> None:
    """Raise JobError if labels are none that these metrics can take; a loss of the user's own may have others."""
    told = ", ".join(metrics)
    if not told:
        return
    if task is Task.MULTICLASS:
        check_classes(labels, output, f"{where}: for {told}")
    elif task is Task.BINARY and (labels.min() < -1 or labels.max() > 1):
        raise JobError(f"{where}: labels go from {labels.min()} to {labels.max()}; {told} needs 0 and 1, or -1 and 1")


def predictions(task: Task, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Output and labels as the task's metrics take them: probabilities and class numbers, or numbers; flat rows.

    A label between 0 and 1 counts as the class that is nearer.
    """
    match task:
        case Task.BINARY:
            return output.double().sigmoid().flatten(), (as_output(labels, output) > 0.5).long().flatten()
        case Task.MULTICLASS:
            classes = output.shape[1]
            flat = output.double().softmax(1).movedim(1, -1).reshape(-1, classes)
            return flat, class_numbers(labels, output).flatten()
        case Task.REGRESSION:
            return output.double().flatten(), as_output(labels, output).double().flatten()


def _known(task: Task) -> Mapping[str, Metric]:
    """Every metric of a task by name."""
    c, r = partial(_later, "classification"), partial(_later, "regression")
    match task:
        case Task.BINARY:
            return {
                "auroc": _of_different_targets(c("binary_auroc")),
                "accuracy": _always(c("binary_accuracy")),
                "f1": _always(c("binary_f1_score")),
                "precision": _always(c("binary_precision")),
                "recall": _always(c("binary_recall")),
                "average_precision": _of_different_targets(c("binary_average_precision")),
            }
        case Task.MULTICLASS:
            return {
                "auroc": _one_against_rest(c("binary_auroc")),
                "accuracy": _of_classes(c("multiclass_accuracy"), "micro"),
                "f1": _of_classes(c("multiclass_f1_score"), "macro"),
                "precision": _of_classes(c("multiclass_precision"), "macro"),
                "recall": _of_classes(c("multiclass_recall"), "macro"),
                "average_precision": _one_against_rest(c("binary_average_precision")),
            }
        case Task.REGRESSION:
            return {
                "mse": _always(r("mean_squared_error")),
                "mae": _always(r("mean_absolute_error")),
                "r2": _of_different_targets(r("r2_score")),
            }


def _later(module: str, name: str) -> _Function:
    """A function of torchmetrics, imported when it is first called: a restarted worker has no second to lose."""

    def function(*arguments: Tensor, **named: Any) -> Tensor:
        value: Tensor = getattr(import_module(f"torchmetrics.functional.{module}"), name)(*arguments, **named)
        return value

    return function


def _always(metric: _Function) -> Metric:
    return lambda predicted, targets: metric(predicted, targets).item()


def _of_different_targets(metric: _Function) -> Metric:
    """None when all targets are the same: nothing can be told apart or explained."""
    return lambda predicted, targets: None if (targets == targets[0]).all() else metric(predicted, targets).item()


def _of_classes(metric: _Function, average: str) -> Metric:
    return lambda scores, targets: metric(scores, targets, num_classes=scores.shape[1], average=average).item()


def _one_against_rest(metric: _Function) -> Metric:
    def mean(scores: Tensor, targets: Tensor) -> float | None:
        one = _of_different_targets(metric)
        each = [one(scores[:, c], (targets == c).long()) for c in range(scores.shape[1])]
        defined = [value for value in each if value is not None]
        return sum(defined) / len(defined) if defined else None

    return mean

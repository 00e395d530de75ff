"""Metrics over all held-out rows, computed once from all outputs, so that no micro-batch or order shows in them.

Labels and outputs are compared in float64, whatever the loss computes in.

A metric that the held-out rows do not define (AUROC of a single class) is None. Of several classes, precision, recall,
F1, AUROC and average precision are means over the classes; AUROC and average precision leave out a class that no
held-out row has, or every one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn

from sl_queue.compute.losses import are_soft, check_classes, class_numbers, shaped
from sl_queue.compute.names import metric_name
from sl_queue.compute.other_metrics import Metric, Task, made, torchmetric
from sl_queue.compute.outputs import Outputs, numbers
from sl_queue.errors import ComputeError, JobError
from sl_queue.ports import UserCode

_OF_DIFFERENCES = {"auroc", "average_precision", "r2"}  # undefined where all targets are the same
_ROUNDING = 1e-3  # by which probabilities of a model in bfloat16 may miss 0 and 1
_Function = Callable[..., Tensor]  # of torchmetrics


_TASKS: Mapping[Any, Task] = {
    **dict.fromkeys(("bce_with_logits", nn.BCEWithLogitsLoss, nn.BCELoss), Task.BINARY),
    **dict.fromkeys((F.binary_cross_entropy_with_logits, F.binary_cross_entropy), Task.BINARY),
    **dict.fromkeys(("cross_entropy", nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss), Task.MULTICLASS),
    "bce": Task.BINARY,
    **dict.fromkeys(("mse", "l1", "huber", "poisson", nn.PoissonNLLLoss, F.poisson_nll_loss), Task.REGRESSION),
}


def task_of(
    loss: Any, output: Tensor, labels: npt.NDArray[Any], metrics: Sequence[str], outputs: str | None = None
) -> Task:
    """Return the task of a known loss; of one of the user's own, what labels, output and wanted metrics imply.

    `loss` is a name, or the class or function by which a loss is known; `outputs` is what [fuse] says of the output.
    """
    if (isinstance(loss, str) or callable(loss)) and loss in _TASKS:
        return _TASKS[loss]
    fractions = labels.dtype.kind == "f" and (labels != np.floor(labels)).any()
    of_numbers = outputs == Outputs.LOGARITHMS or not _known(Task.REGRESSION).keys().isdisjoint(metrics)
    if of_numbers or (fractions and outputs is None):
        return Task.REGRESSION
    soft = fractions and are_soft(labels, output)
    classes = output.dim() > 1 and output.shape[1] > 1 and labels.ndim < output.dim()
    return Task.MULTICLASS if classes or soft else Task.BINARY


def metrics_of(wanted: Sequence[Any], task: Task, where: str, code: UserCode, classes: int) -> dict[str, Metric]:
    """Build the metrics by their names in the history: of ours, of torchmetrics, or in code.

    Raises JobError for one that the task does not have.
    """
    wanted = [metric for metric in wanted if metric != "loss"]  # which is always reported
    known = _known(task) if wanted else {}
    found: dict[str, Metric] = {}
    for metric in wanted:
        name = metric_name(metric)
        if isinstance(metric, str) and metric in known:
            found[name] = known[metric]
        elif callable(metric) or ":" in (metric if isinstance(metric, str) else metric["name"]):
            found[name] = made(metric, f"{where} [fuse] metrics: {name!r}", code)
        else:
            found[name] = torchmetric(metric, task, known, f"{where} [fuse] metrics", classes)
    return found


def check_targets(task: Task, output: Tensor, labels: npt.NDArray[Any], metrics: Iterable[str], where: str) -> None:
    """Raise JobError for labels that these metrics cannot take; a loss of the user's own may have others."""
    told = ", ".join(metrics)
    if not told:
        return
    if task is Task.MULTICLASS:
        check_classes(labels, output, f"{where}: for {told}")
    elif task is Task.BINARY and (labels.min() < -1 or labels.max() > 1):
        raise JobError(f"{where}: labels go from {labels.min()} to {labels.max()}; {told} needs 0 and 1, or -1 and 1")


def predictions(task: Task, outputs: str, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and labels as the task's metrics take them: probabilities and class numbers, or numbers; flat rows.

    `outputs` is the meaning of the output. A label between 0 and 1 counts as
    the class that is nearer, soft labels as their largest class.
    """
    output = output.double()
    match task:
        case Task.BINARY:
            return _chances(outputs, output).flatten(), targets(task, output, labels)
        case Task.MULTICLASS:
            classes = output.shape[1]
            chances = _chances(outputs, output) if outputs == "probabilities" else output.softmax(1)
            return chances.movedim(1, -1).reshape(-1, classes), targets(task, output, labels)
        case Task.REGRESSION:
            return numbers(output, outputs).flatten(), targets(task, output, labels)


def targets(task: Task, output: Tensor, labels: Tensor) -> Tensor:
    """Return labels as the task's metrics take them, of as many rows as `output`."""
    match task:
        case Task.BINARY:
            return (shaped(labels, output) > 0.5).long().flatten()
        case Task.MULTICLASS:
            return class_numbers(labels, output).flatten()
        case Task.REGRESSION:
            return shaped(labels, output).double().flatten()


def _chances(outputs: str, output: Tensor) -> Tensor:
    """Return probabilities, each of its own logit; rounding may not put them beyond 0 or 1."""
    match outputs:
        case "logits":
            return output.sigmoid()
        case "log_probabilities":
            output = output.exp()
    if bool(((output < -_ROUNDING) | (output > 1 + _ROUNDING)).any()):
        raise ComputeError(
            f'[fuse] outputs = "{outputs}", but the fuse model puts out others for held-out rows; write "logits", or '
            "check the model's last layer"
        )
    return output.clamp(0, 1)


def undefined(names: Iterable[str], task: Task, found: Tensor) -> dict[str, str]:
    """Return which of these metrics the `found` targets of the held-out rows do not define, and why."""
    if len(found) == 0 or not bool((found == found[0]).all()):
        return {}
    match task:
        case Task.BINARY:
            why = "no held-out row has label 1" if found[0] == 0 else "every held-out row has label 1"
        case Task.MULTICLASS:
            why = "all held-out rows are of one class"
        case Task.REGRESSION:
            why = "all held-out rows have the same label"
    return {name: why for name in names if name in _OF_DIFFERENCES}


def _known(task: Task) -> Mapping[str, Metric]:
    """Return every metric of a task by name."""
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
                "rmse": _root(_always(r("mean_squared_error"))),
                "mae": _always(r("mean_absolute_error")),
                "r2": _of_different_targets(r("r2_score")),
            }


def _later(module: str, name: str) -> _Function:
    """Wrap a function of torchmetrics, imported when first called: a restarted worker has no second to lose."""

    def function(*arguments: Tensor, **named: Any) -> Tensor:
        value: Tensor = getattr(import_module(f"torchmetrics.functional.{module}"), name)(*arguments, **named)
        return value

    return function


def _root(metric: Metric) -> Metric:
    def root(predicted: Tensor, targets: Tensor) -> float | None:
        value = metric(predicted, targets)
        return None if value is None else float(value**0.5)

    return root


def _always(metric: _Function) -> Metric:
    return lambda predicted, targets: metric(predicted, targets).item()


def _of_different_targets(metric: _Function) -> Metric:
    """Return None when all targets are the same: nothing can be told apart or explained."""
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

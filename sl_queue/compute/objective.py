"""Objective of a run: the loss against the labels, and the metrics; tried out before anything is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sl_queue.compute.epoch_tables import Rows, tables_of
from sl_queue.compute.fitting import adds_up, fitted, kind_of
from sl_queue.compute.losses import Loss, check_labels, label_tensor, loss_of
from sl_queue.compute.metrics import check_targets, metrics_of, predictions, targets, task_of, undefined
from sl_queue.compute.modules.handover import Take
from sl_queue.compute.names import loss_name, metric_name
from sl_queue.compute.other_metrics import Metric, OfRawOutputs, Task
from sl_queue.compute.outputs import Outputs, doubled, outputs_of
from sl_queue.compute.owned_loss import OwnedLoss, require_no_parameters
from sl_queue.compute.spec import ComputeSpec
from sl_queue.compute.weighted_metrics import WeightedMetric, weighted_metrics
from sl_queue.compute.weighting import Weighting, alike, known_rows, weighting_of
from sl_queue.errors import JobError, ShapeError
from sl_queue.protocol.schedule.row_order import Batches, Positions
from sl_queue.protocol.table import Table

_LARGE = 1e9  # an output that has left every reasonable scale


@dataclass(frozen=True, slots=True)
class Objective:
    """Goal of a run: the loss against these labels, and the metrics."""

    loss: Loss
    owned: OwnedLoss  # what the loss keeps
    labels: Tensor = field(repr=False)  # all rows as the table has them, on the CPU
    task: Task
    metrics: Mapping[str, Metric]
    outputs: Outputs
    shape: tuple[int, ...]  # of one row's output
    warnings: Sequence[str] = ()  # of what is allowed and was probably not meant
    weighting: Weighting | None = None  # where rows do not count alike
    weighted: Mapping[str, WeightedMetric] = field(default_factory=dict)  # the metrics of rows with weights
    adds_up: bool = False  # the loss is a sum over its rows

    def amount(self, positions: Positions) -> float:
        """Return how much these rows count together: their number, where all count alike."""
        return float(len(positions)) if self.weighting is None else self.weighting.amount(positions)

    def loss_of(self, output: Tensor, labels: Tensor, positions: Positions) -> Tensor:
        """Return the mean loss over these rows."""
        if self.weighting is None:
            return self.loss(output, labels)
        return self.weighting(output, labels, positions)


def objective_of(
    spec: ComputeSpec,
    table: Table,
    output: Tensor,
    scaled: Callable[[float], Tensor],
    where: str,
    models: Sequence[nn.Module] = (),
    take: Take | None = None,
) -> Objective:
    """Build loss, labels and metrics, tried out on the fuse model's `output` for a few rows, with its graph.

    `scaled(s)` is the output for activations s times as large. What the loss shares with one of `models` is theirs;
    `take` says how to come by a loss that is given in code. Raises JobError, or ComputeError for a loss that fails.
    """
    assert spec.objective is not None
    wanted, tried = spec.objective, output.detach()
    loss = loss_of(spec, output.device, take)
    owned = OwnedLoss.of(loss, models, spec.party, where)
    name = loss_name(wanted.loss)
    labelled = _labelled(table.labels, wanted.missing, where)
    check_labels(labelled, tried, name, where)
    assert labelled is not None and table.labels is not None
    kind = name if isinstance(name, str) and ":" not in name else kind_of(loss)
    try:
        with owned.trial():
            unweighted = loss if table.weights is None else alike(loss)
            fit, warnings, (value, of) = fitted(unweighted, name, tried, labelled, where)
            sums, fit = adds_up(fit, tried, label_tensor(labelled)), replace(fit, loss=loss)
        require_no_parameters(value, of, models, where)
        labels = label_tensor(table.labels)
        task, metrics = _measures(spec, kind, tried, labelled, labels, where)
    except ShapeError as error:
        raise ShapeError(f"{where}: {error}") from None
    outputs, shape = outputs_of(wanted.outputs, kind, loss, task, list(metrics), output, scaled, where), tried.shape[1:]
    twice = doubled(kind, f"loss = {name!r}" if isinstance(name, str) else "the loss", output)
    warnings += [twice] if twice else []
    weighting = weighting_of(fit, table.labels, tried, table.weights, missing=wanted.missing, where=where)
    weighted = {} if table.weights is None else _weighted(wanted.metrics, metrics, task, where)
    return Objective(fit, owned, labels, task, metrics, outputs, tuple(shape), warnings, weighting, weighted, sums)


def _measures(
    spec: ComputeSpec, kind: str | None, tried: Tensor, labelled: npt.NDArray[Any], labels: Tensor, where: str
) -> tuple[Task, Mapping[str, Metric]]:
    """Return the task and the metrics, tried out on the first labels. Raises JobError, ShapeError."""
    assert spec.objective is not None
    wanted = spec.objective
    names = list(map(metric_name, wanted.metrics))
    task = Task(wanted.task) if wanted.task else task_of(kind, tried, labelled, names, wanted.outputs)
    metrics = metrics_of(wanted.metrics, task, where, spec.code, tried.shape[1] if tried.dim() > 1 else 2)
    usual = [name for name, metric in metrics.items() if not isinstance(metric, OfRawOutputs)]
    check_targets(task, tried, labelled, usual, where)
    if usual:
        targets(task, tried, labels[torch.arange(len(tried)) % len(labels)].to(tried.device))
    return task, metrics


def _labelled(labels: npt.NDArray[Any] | None, missing: bool, where: str) -> npt.NDArray[Any] | None:
    """Return the rows whose labels are all known: what a loss is tried out on. Raises JobError if there are none."""
    if labels is None or not missing:
        return labels
    found = labels[known_rows(labels)]
    if not len(found):
        raise JobError(f"{where}: no row has all of its labels; there is nothing to try the loss on")
    return found


def _weighted(
    wanted: Sequence[Any], metrics: Mapping[str, Metric], task: Task, where: str
) -> Mapping[str, WeightedMetric]:
    """Return the same metrics for rows that do not count alike. Raises JobError for one that knows no weights."""
    there = weighted_metrics(task)
    asked = {metric_name(metric): metric for metric in wanted}
    for name in metrics:
        if not isinstance(asked[name], str) or name not in there:
            raise JobError(
                f"{where} [fuse] metrics: {name!r} knows no weights of rows, which [data] weight gives; those that do "
                f"are {', '.join(there)}, without arguments"
            )
    return {name: there[name] for name in metrics}


def measured(
    objective: Objective, output: Tensor, labels: Tensor, positions: Positions | None = None
) -> dict[str, float | None]:
    """Return the metrics of the model's output for these rows, both on the CPU; `positions` are theirs in the table."""
    if objective.weighting is not None and positions is not None:
        return _measured_by_weight(objective, objective.weighting, output, labels, positions)
    of_raw = [metric for metric in objective.metrics.values() if isinstance(metric, OfRawOutputs)]
    scores, classes = output, labels
    if len(of_raw) < len(objective.metrics):
        scores, classes = predictions(objective.task, objective.outputs, output, labels)
    return {
        name: metric(output.clone(), labels.clone()) if metric in of_raw else metric(scores, classes)
        for name, metric in objective.metrics.items()
    }


def tabulated(objective: Objective, output: Tensor, labels: Tensor, positions: Positions) -> dict[str, Rows] | None:
    """Return the tables of the model's output for these rows, both on the CPU; None of numbers."""
    if objective.task is Task.REGRESSION or all(isinstance(m, OfRawOutputs) for m in objective.metrics.values()):
        return None
    scores, targets = predictions(objective.task, objective.outputs, output, torch.nan_to_num(labels))
    known, weights = torch.ones(len(targets), dtype=torch.bool), None
    if objective.weighting is not None:
        known, weights = _counted(objective.weighting, len(targets), labels, positions)
    return tables_of(objective.task, scores[known], targets[known], weights)


def _counted(
    weighting: Weighting, n_targets: int, labels: Tensor, positions: Positions
) -> tuple[Tensor, Tensor | None]:
    """Return which of the flat targets are known, and the weights of those."""
    rows, each = torch.from_numpy(positions), n_targets // len(labels)
    known = torch.ones(n_targets, dtype=torch.bool)
    if weighting.known is not None:
        known = weighting.known[rows].reshape(len(labels), -1).expand(-1, each).reshape(-1)
    return known, None if weighting.weights is None else weighting.weights[rows].repeat_interleave(each)[known]


def _measured_by_weight(
    objective: Objective, weighting: Weighting, output: Tensor, labels: Tensor, positions: Positions
) -> dict[str, float | None]:
    """Return the metrics where rows do not count alike; labels that are not known are left out."""
    scores, targets = predictions(objective.task, objective.outputs, output, torch.nan_to_num(labels))
    known, weights = _counted(weighting, len(targets), labels, positions)
    if not bool(known.any() if weights is None else weights.any()):
        return dict.fromkeys(objective.metrics)
    if weights is not None:
        return {name: metric(scores[known], targets[known], weights) for name, metric in objective.weighted.items()}
    whole = known_rows(labels.numpy())
    return {
        name: (metric(output[whole], labels[whole]) if whole.any() else None)
        if isinstance(metric, OfRawOutputs)
        else metric(scores[known], targets[known])
        for name, metric in objective.metrics.items()
    }


def undefined_metrics(objective: Objective, batches: Batches) -> dict[str, str]:
    """Return which metrics the held-out rows do not define, and why; their labels and weights alone decide it."""
    if not batches.holdout_rows:
        return {}
    positions = np.concatenate([batches.holdout_part(index) for index in range(batches.holdout_parts)])
    if not objective.amount(positions):
        why = "no held-out row counts, because its label is not known or its weight is 0"
        return dict.fromkeys(["loss", *objective.metrics], why)
    labels = objective.labels[torch.from_numpy(positions)]
    output = torch.empty(len(labels), *objective.shape, device="meta")  # whose shape alone is looked at
    there = targets(objective.task, output, torch.nan_to_num(labels)) if objective.metrics else labels
    if objective.weighting is not None and objective.metrics:
        known, weights = _counted(objective.weighting, len(there), labels, positions)
        there = there[known] if weights is None else there[known][weights > 0]
    return undefined(objective.metrics, objective.task, there)


def why_not_finite(output: Tensor, model: str) -> str:
    """Return where a loss that is not finite comes from, as far as the output shows it, and what to do."""
    finite = output.detach().isfinite()
    if not finite.all():
        bad = int((~finite.reshape(len(output), -1).all(1)).sum())
        return (
            f"the output of {model} holds NaN or infinity in {bad} of {len(output)} rows, of finite activations: look "
            "in it for a division by zero, a logarithm or root of zero or less, or weights that a learning rate too "
            "high has driven away"
        )
    largest = float(output.detach().abs().max())
    if largest > _LARGE:
        return (
            f"the output of {model} has grown to {largest:.0e}: lower the learning rate, or bring features and labels "
            "to a scale near 1"
        )
    return (
        f"the output of {model} is finite, so the loss makes it: look in it for a division by zero, a logarithm or "
        "root of zero or less, and for labels that it is not made for"
    )

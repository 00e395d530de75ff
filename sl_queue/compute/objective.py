"""Objective of a run: the loss against the labels, and the metrics; tried out before anything is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sl_queue.compute.fitting import fitted, kind_of
from sl_queue.compute.losses import Loss, check_labels, label_tensor, loss_of
from sl_queue.compute.metrics import check_targets, metrics_of, predictions, targets, task_of, undefined
from sl_queue.compute.modules.handover import Take
from sl_queue.compute.names import loss_name, metric_name
from sl_queue.compute.other_metrics import Metric, OfRawOutputs, Task
from sl_queue.compute.outputs import Outputs, doubled, outputs_of
from sl_queue.compute.owned_loss import OwnedLoss, require_no_parameters
from sl_queue.compute.spec import ComputeSpec
from sl_queue.errors import ShapeError
from sl_queue.protocol.schedule.row_order import Batches
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


def objective_of(
    spec: ComputeSpec,
    table: Table,
    output: Tensor,
    scaled: Callable[[float], Tensor],
    where: str,
    models: Sequence[nn.Module] = (),
    take: Take | None = None,
) -> Objective:
    """Loss, labels and metrics, tried out on the fuse model's `output` for a few rows, with its graph.

    `scaled(s)` is the output for activations s times as large. What the loss shares with one of `models` is theirs;
    `take` says how to come by a loss that is given in code. Raises JobError, or ComputeError for a loss that fails.
    """
    assert spec.objective is not None
    wanted, tried = spec.objective, output.detach()
    loss = loss_of(spec, output.device, take)
    owned = OwnedLoss.of(loss, models, spec.party, where)
    name = loss_name(wanted.loss)
    check_labels(table.labels, tried, name, where)
    assert table.labels is not None
    kind = name if isinstance(name, str) and ":" not in name else kind_of(loss)
    try:
        with owned.trial():
            fit, warnings, (value, of) = fitted(loss, name, tried, table.labels, where)
        require_no_parameters(value, of, models, where)
        names = list(map(metric_name, wanted.metrics))
        task = Task(wanted.task) if wanted.task else task_of(kind, tried, table.labels, names, wanted.outputs)
        metrics = metrics_of(wanted.metrics, task, where, spec.code, tried.shape[1] if tried.dim() > 1 else 2)
        usual = [name for name, metric in metrics.items() if not isinstance(metric, OfRawOutputs)]
        check_targets(task, tried, table.labels, usual, where)
        labels = label_tensor(table.labels)
        if usual:
            targets(task, tried, labels[torch.arange(len(tried)) % len(labels)].to(tried.device))
    except ShapeError as error:
        raise ShapeError(f"{where}: {error}") from None
    outputs = outputs_of(wanted.outputs, kind, task, list(metrics), output, scaled, where)
    twice = doubled(kind, f"loss = {name!r}" if isinstance(name, str) else "the loss", output)
    warnings += [twice] if twice else []
    return Objective(fit, owned, labels, task, metrics, outputs, tuple(tried.shape[1:]), warnings)


def measured(objective: Objective, output: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Return the metrics of the model's output for these rows, both on the CPU."""
    of_raw = [metric for metric in objective.metrics.values() if isinstance(metric, OfRawOutputs)]
    scores, classes = output, labels
    if len(of_raw) < len(objective.metrics):
        scores, classes = predictions(objective.task, objective.outputs, output, labels)
    return {
        name: metric(output, labels) if metric in of_raw else metric(scores, classes)
        for name, metric in objective.metrics.items()
    }


def undefined_metrics(objective: Objective, batches: Batches) -> dict[str, str]:
    """Return which metrics the held-out rows do not define, and why; their labels alone decide it."""
    if not objective.metrics or not batches.holdout_rows:
        return {}
    parts = [torch.from_numpy(batches.holdout_part(index)) for index in range(batches.holdout_parts)]
    labels = objective.labels[torch.cat(parts)]
    output = torch.empty(len(labels), *objective.shape, device="meta")  # whose shape alone is looked at
    return undefined(objective.metrics, objective.task, targets(objective.task, output, labels))


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

"""An evaluation of predictions against labels, by the loss and the metrics that the label holder's file names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sl_queue.compute.objective import Objective, measured, tabulated
from sl_queue.compute.scoring import mean_by_amount

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results of a model on rows whose labels are known."""

    rows: int
    metrics: Mapping[str, float | None]  # the loss first
    tables: Mapping[str, Rows] = field(default_factory=dict)  # confusion, calibration, thresholds, as they apply

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "rows": self.rows,
            "metrics": dict(self.metrics),
            "tables": {k: list(v) for k, v in self.tables.items()},
        }


def evaluate(
    objective: Objective, outputs: npt.NDArray[Any], parts: Sequence[npt.NDArray[np.int64]] | None = None
) -> Evaluation:
    """Compare outputs, shape (rows, *outputs), with the labels of the same rows, in the same order.

    `parts`: positions of the rows to look at, as a run evaluates them: the loss is the mean of theirs, to the bit that
    of the run. None: all rows at once.
    """
    parts = [np.arange(len(outputs))] if parts is None else parts
    positions = np.concatenate(parts)
    output, labels = torch.from_numpy(outputs[positions]), objective.labels[torch.from_numpy(positions)]
    with torch.no_grad(), objective.owned.evaluating():
        losses = [(objective.amount(part), _loss(objective, outputs, part)) for part in parts]
    counts = any(amount for amount, _ in losses)
    found: dict[str, float | None] = {"loss": mean_by_amount(losses) if counts else None}
    if objective.metrics:
        found |= measured(objective, output, labels, positions)
    tables = tabulated(objective, output, labels, positions) if objective.metrics else None
    return Evaluation(len(positions), found, tables or {})


def _loss(objective: Objective, outputs: npt.NDArray[Any], part: npt.NDArray[np.int64]) -> float:
    labels = objective.labels[torch.from_numpy(part)]
    return float(objective.loss_of(torch.from_numpy(outputs[part]), labels, part))

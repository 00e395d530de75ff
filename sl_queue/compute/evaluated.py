"""An evaluation of predictions against labels, by the loss and the metrics that the label holder's file names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sl_queue.compute.objective import Objective, measured, tabulated

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
    objective: Objective, outputs: npt.NDArray[Any], positions: npt.NDArray[np.int64] | None = None
) -> Evaluation:
    """Compare outputs, shape (rows, *outputs), with the labels of the same rows, in the same order.

    `positions`: of the rows to look at; None: all.
    """
    positions = np.arange(len(outputs)) if positions is None else positions
    output, labels = torch.from_numpy(outputs[positions]), objective.labels[torch.from_numpy(positions)]
    with torch.no_grad(), objective.owned.evaluating():
        loss = float(objective.loss_of(output, labels, positions))
    found: dict[str, float | None] = {"loss": loss}
    if objective.metrics:
        found |= measured(objective, output, labels, positions)
    tables = tabulated(objective, output, labels, positions) if objective.metrics else None
    return Evaluation(len(positions), found, tables or {})

"""Held-out rows of one evaluation: losses and outputs by micro-batch, and what is measured of them all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sl_queue.compute.epoch_tables import Rows
from sl_queue.compute.losses import label_tensor
from sl_queue.compute.objective import Objective, measured, tabulated
from sl_queue.errors import LocalProtocolError
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table


@dataclass(frozen=True, slots=True)
class Scored:
    """One held-out micro-batch."""

    amount: float  # of its rows
    loss: float
    output: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)


@dataclass(slots=True)
class Scoring:
    """The running evaluation. Mutable: each micro-batch adds to it, and `metrics` empties it."""

    objective: Objective
    table: Table
    batches: Batches
    tables: Mapping[str, Rows] | None = None  # of the last evaluation
    truly: Mapping[str, float | None] = field(default_factory=dict)  # the last metrics on true labels, for this party
    _scored: dict[int, Scored] = field(default_factory=dict)  # by the number of the micro-batch

    def keep(self, index: int, loss: float, output: Tensor) -> None:
        """Keep what was scored until `metrics`; the output only where something is measured of it."""
        positions = self.batches.holdout_part(index)
        labels = self.objective.labels[torch.from_numpy(positions)]
        kept = (output.cpu(), labels) if self.objective.metrics else (output.new_empty(0), labels.new_empty(0))
        self._scored[index] = Scored(self.objective.amount(positions), loss, *kept)

    def metrics(self) -> Mapping[str, float | None]:
        """Return loss and metrics over all rows kept since the last call; None where rows do not define one."""
        parts = [self._scored[index] for index in sorted(self._scored)]
        if not parts:
            raise LocalProtocolError("metrics without an evaluation")
        self._scored.clear()
        self.tables = None
        losses = [(part.amount, part.loss) for part in parts]
        found: dict[str, float | None] = {"loss": mean_by_amount(losses) if any(p.amount for p in parts) else None}
        if self.objective.metrics:
            output, labels = torch.cat([p.output for p in parts]), torch.cat([p.labels for p in parts])
            rows = np.concatenate([self.batches.holdout_part(index) for index in range(self.batches.holdout_parts)])
            found |= measured(self.objective, output, labels, rows)
            self.tables = tabulated(self.objective, output, labels, rows)
            if self.table.truth is not None:
                self.truly = measured(self.objective, output, label_tensor(self.table.truth[rows]), rows)
        return found

    def forget(self) -> None:
        """Keep nothing: the evaluation begins again."""
        self._scored.clear()


def mean_by_amount(losses: Sequence[tuple[float, float]]) -> float:
    """Return the mean of losses by the amounts of their rows; 0 of rows that count for nothing."""
    return sum(amount * loss for amount, loss in losses) / (sum(amount for amount, _ in losses) or 1.0)

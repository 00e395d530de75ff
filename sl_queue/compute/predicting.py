"""Stages that predict: a prediction is a run whose stages learn nothing.

Every row of a table is one of a training run's rows, each activation is answered by a receipt (a gradient of no
bytes), and a commit makes the outputs since the last one durable. So pipelining, sealing, recovery and status are the
training run's own, and the loops of training do not know the difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.model import Model
from sl_queue.compute.running import aggregated, blame, predicted
from sl_queue.compute.spec import LayersSpec
from sl_queue.cut.crossing import FuseCut
from sl_queue.cut.guard import place
from sl_queue.cut.packing import is_unused, unused
from sl_queue.cut.rows import CutRows, RowKeys
from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.checkpoint import State, Weights
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.schedule.row_order import Batches

Outputs = npt.NDArray[np.generic]


class Pieces(Protocol):
    """Outputs on disk, a piece for each commit."""

    def write(self, first_row: int, outputs: Outputs) -> None:
        """Write durably the outputs of the rows from `first_row` on; once more, it replaces the same piece."""


@dataclass(slots=True)
class PredictingBase:
    """ports.BaseStage for prediction: each row's activation in evaluation mode."""

    stage: TorchBaseStage  # with trained weights
    batches: Batches

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Do nothing: rows are looked up by `forward`."""

    def forward(self, micro_batch: MicroBatch) -> Payload:
        """Return the activation of a micro-batch of rows, shape (rows, *cut)."""
        return self.stage.cut.leave(*self._activation(micro_batch))

    def in_place(self, micro_batch: MicroBatch) -> list[Tensor]:
        """Do as `forward`, for a fuse model in the same process: each output."""
        activation, _, rows = self._activation(micro_batch)
        self.stage.cut.check(activation, micro_batch, rows)
        outputs = self.stage.model.outputs
        return [activation] if outputs is None else outputs.split(activation)

    def backward(self, micro_batch: MicroBatch, gradient: Payload) -> None:
        """Take the receipt. Raises RemoteProtocolError for anything else."""
        rows = CutRows.of(self.stage.table.row_keys, self.batches.rows(micro_batch), held_out=True)
        if not is_unused(gradient) or gradient.rows != rows.digest:
            raise RemoteProtocolError(
                f"{place(self.stage.model.party, micro_batch)}: the label holder has answered with a gradient or of "
                "other rows, and this is a prediction"
            )

    def update(self) -> None:
        """Do nothing: a prediction learns nothing."""

    def predict(self, micro_batch: MicroBatch) -> Payload:
        """Do as `forward`; a prediction holds no rows out."""
        return self.forward(micro_batch)

    def state(self) -> State:
        """Return nothing: the weights are those of a version."""
        return State({}, {})

    def load(self, state: State) -> None:
        """Forget what is in flight."""

    def weights(self) -> Weights:
        """Return nothing."""
        return {}

    def _activation(self, micro_batch: MicroBatch) -> tuple[Tensor, MicroBatch, CutRows]:
        positions = self.batches.rows(micro_batch)
        rows = CutRows.of(self.stage.table.row_keys, positions, held_out=True)
        model = self.stage.model
        with model.evaluating(), model.drawing("predict", micro_batch):
            return model.run(self.stage.inputs(positions), place(model.party, micro_batch)), micro_batch, rows


@dataclass(slots=True)
class PredictingFuse:
    """ports.FuseStage for prediction: fuses, keeps the outputs, and answers each activation with a receipt.

    Mutable: it holds the outputs since the last commit.
    """

    model: Model  # the fuse model, with trained weights
    own: PredictingBase | None  # the label holder's base model
    row_keys: RowKeys
    batches: Batches
    cuts: Mapping[str, FuseCut]  # to the feature parties, in job order
    layers: LayersSpec
    pieces: Pieces
    _outputs: list[Tensor] = field(default_factory=list)
    _first_row: int | None = None  # of `_outputs`

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Do nothing."""

    def forward_backward(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> Mapping[str, Payload]:
        """Keep the outputs of a micro-batch of rows; return a receipt for each feature party."""
        positions = self.batches.rows(micro_batch)
        rows = CutRows.of(self.row_keys, positions, held_out=True)
        inputs = {p: cut.arrive_each(activations[p], micro_batch, rows)[0] for p, cut in self.cuts.items()}
        if self.own is not None:
            inputs[self.model.party] = self.own.in_place(micro_batch)
        output = self._fused(inputs, micro_batch)
        if self._first_row is None:
            self._first_row = int(positions[0])
        self._outputs.append(output)
        return {party: _receipt(activations[party], rows) for party in self.cuts}

    def late_gradients(self) -> Sequence[tuple[MicroBatch, Mapping[str, Payload]]]:
        """Return nothing: each receipt goes at once."""
        return ()

    def update(self) -> float:
        """Return 0: there is no loss without labels."""
        return 0.0

    def evaluate(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> None:
        """Do nothing; a prediction holds no rows out."""

    def metrics(self) -> Mapping[str, float | None]:
        """Return nothing."""
        return {}

    def training_metrics(self) -> None:
        """Return nothing."""

    def evaluation_tables(self) -> None:
        """Return nothing."""

    def state(self) -> State:
        """Make the outputs since the last commit durable."""
        if self._first_row is not None:
            self.pieces.write(self._first_row, torch.cat(self._outputs).numpy())
            self._outputs.clear()
            self._first_row = None
        return State({}, {})

    def load(self, state: State) -> None:
        """Forget the outputs since the last commit: their activations will come again."""
        self._outputs.clear()
        self._first_row = None

    def weights(self) -> Weights:
        """Return nothing."""
        return {}

    def _fused(self, inputs: Mapping[str, Sequence[Tensor]], micro_batch: MicroBatch) -> Tensor:
        where = place(self.model.party, micro_batch)
        with self.model.evaluating(), self.model.drawing("predict", micro_batch):
            with blame(f"{where}: aggregation {self.layers.aggregation!r} failed"):
                joined = aggregated(inputs, self.layers)
            output = self.model.run_on(joined, len(self.batches.rows(micro_batch)), where)
        return predicted(output)


def _receipt(activation: Payload, rows: CutRows) -> Payload:
    return unused(activation.dtype, activation.shape, rows.digest)

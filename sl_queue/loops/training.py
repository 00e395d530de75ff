"""Training, in full: the feature party above, the label holder below, one line an action.

An activation's way: rows -> forward -> send ... receive -> fuse -> send ... receive -> backward -> update. What crosses
between the two is made and checked at the cut, which belongs to the stages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from sl_queue.loops.lifecycle import Worker
from sl_queue.ports import BaseStage, Channel, FuseStage
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.messages import Activation, Gradient, Kind, MicroBatch, Payload
from sl_queue.protocol.schedule.actions import Backward, Begin, Commit, Forward, Fuse, Predict, Prepare, Score, Update
from sl_queue.protocol.schedule.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class FeatureParty:
    """Runs a base model on its own columns; learns from gradients."""

    label_holder: str
    channel: Channel
    stage: BaseStage
    pipeline: Pipeline
    worker: Worker

    def train(self, first_step: int) -> None:
        """Train from `first_step` to the end of the run, or until the scheduler ends it early."""
        for action in self.pipeline.feature_actions(first_step):
            match action:
                case Begin(epoch):
                    if not self.worker.may_begin(epoch):
                        return
                case Prepare(micro_batch):
                    self.stage.prepare(micro_batch)
                case Forward(micro_batch):
                    self._send(Activation(micro_batch, self.stage.forward(micro_batch)))
                case Backward(micro_batch):
                    self.stage.backward(micro_batch, self._gradient(micro_batch))
                case Update(step):
                    self._update(step)
                case Predict(micro_batch):
                    self._send(Activation(micro_batch, self.stage.predict(micro_batch), holdout=True))
                case Commit(step):
                    self.worker.commit(step)
                case _:
                    assert_never(action)

    def _send(self, activation: Activation) -> None:
        self.channel.send(self.label_holder, activation)

    def _gradient(self, micro_batch: MicroBatch) -> Payload:
        return self.channel.receive(self.label_holder, Kind.GRADIENT, micro_batch)

    def _update(self, step: int) -> None:
        self.stage.update()
        self.worker.advance(step, self.pipeline.batches.rows_in_step(step))


@dataclass(frozen=True, slots=True)
class LabelHolder:
    """Fuses activations, computes the loss against its labels, and answers with gradients."""

    feature_parties: tuple[str, ...]
    channel: Channel
    stage: FuseStage
    pipeline: Pipeline
    worker: Worker
    ends_early: bool = False  # each epoch may be the last

    def train(self, first_step: int) -> None:
        """Train from `first_step` to the end of the run, or until the scheduler ends it early."""
        for action in self.pipeline.label_actions(first_step):
            match action:
                case Begin(epoch):
                    if not self.worker.may_begin(epoch):
                        return
                case Prepare(micro_batch):
                    self.stage.prepare(micro_batch)
                case Fuse(micro_batch):
                    self._fuse(micro_batch)
                case Update(step):
                    self._update(step)
                case Score(micro_batch):
                    self.stage.evaluate(micro_batch, self._gather(Kind.HOLDOUT, micro_batch))
                case Commit(step):
                    self._commit(step)
                case _:
                    assert_never(action)

    def _fuse(self, micro_batch: MicroBatch) -> None:
        gradients = self.stage.forward_backward(micro_batch, self._gather(Kind.ACTIVATION, micro_batch))
        for answered, found in (*self.stage.late_gradients(), (micro_batch, gradients)):
            self.answer(answered, found)

    def answer(self, micro_batch: MicroBatch, gradients: Mapping[str, Payload]) -> None:
        """Send each party its gradient; a stage over hands calls this itself, when the gradients are there."""
        for party, gradient in gradients.items():
            self.channel.send(party, Gradient(micro_batch, gradient))

    def _gather(self, kind: Kind, micro_batch: MicroBatch) -> dict[str, Payload]:
        """Receive one activation of each feature party, by key: order of arrival means nothing."""
        return {party: self.channel.receive(party, kind, micro_batch) for party in self.feature_parties}

    def _update(self, step: int) -> None:
        """Apply the step, and add it to the epoch's mean loss."""
        loss, rows, sums = self.stage.update(), self.pipeline.batches.rows_in_step(step), self.worker.running
        sums["loss"] = sums.get("loss", 0.0) + loss * rows
        sums["rows"] = sums.get("rows", 0) + rows
        self.worker.advance(step, rows, loss)

    def _commit(self, step: int) -> None:
        """Commit; at the end of an epoch its result is part of the checkpoint, and reported after it is on disk."""
        batches = self.pipeline.batches
        if not batches.ends_epoch(step):
            self.worker.commit(step)
            return
        holdout = self.stage.metrics() if batches.holdout_rows else None
        sums, self.worker.running = self.worker.running, {}
        last = self.ends_early or batches.epoch_of(step) == batches.epochs - 1
        result = EpochResult(
            batches.epoch_of(step),
            step,
            sums["loss"] / sums["rows"],
            holdout,
            train=self.stage.training_metrics(),
            tables=self.stage.evaluation_tables() if last else None,
        )
        self.worker.commit(step, result)

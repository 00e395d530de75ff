"""The label holder, in full: gather one activation per party, fuse, send one gradient per party, update, commit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from sl_queue.errors import LocalProtocolError
from sl_queue.loops.lifecycle import Worker
from sl_queue.ports import Channel, FuseStage
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.messages import Gradient, Kind, MicroBatch, Payload
from sl_queue.protocol.schedule.pipeline import Backward, Begin, Commit, Evaluate, Forward, Fuse, Pipeline, Update


@dataclass(frozen=True, slots=True)
class LabelHolder:
    """Fuses activations, computes the loss against its labels, and answers with gradients."""

    feature_parties: tuple[str, ...]
    channel: Channel
    stage: FuseStage
    pipeline: Pipeline
    worker: Worker

    def train(self, first_step: int) -> None:
        """Train from `first_step` to the end of the run, or until the scheduler ends it early."""
        holdout: Mapping[str, float | None] | None = None
        for action in self.pipeline.label_actions(first_step):
            match action:
                case Begin(epoch):
                    if not self.worker.may_begin(epoch):
                        return
                case Fuse(micro_batch):
                    self.stage.prepare(micro_batch)
                    activations = self._gather(Kind.ACTIVATION, micro_batch)
                    for party, gradient in self.stage.forward_backward(micro_batch, activations).items():
                        self.channel.send(party, Gradient(micro_batch, gradient))
                case Update(step):
                    self._count(step, self.stage.update())
                case Evaluate():
                    for micro_batch in action.micro_batches():
                        self.stage.evaluate(micro_batch, self._gather(Kind.HOLDOUT, micro_batch))
                    holdout = self.stage.metrics()
                case Commit(step):
                    self._commit(step, holdout)
                    holdout = None
                case Forward() | Backward():
                    raise LocalProtocolError("the label holder fuses; it has no forward of its own")
                case _:
                    assert_never(action)

    def _gather(self, kind: Kind, micro_batch: MicroBatch) -> dict[str, Payload]:
        """One activation per feature party, by key: order of arrival means nothing."""
        return {party: self.channel.receive(party, kind, micro_batch) for party in self.feature_parties}

    def _count(self, step: int, loss: float) -> None:
        """Add a step to the epoch's mean loss."""
        rows = self.pipeline.batches.rows_in_step(step)
        sums = self.worker.running
        sums["loss"] = sums.get("loss", 0.0) + loss * rows
        sums["rows"] = sums.get("rows", 0) + rows
        self.worker.advance(step, rows, loss)

    def _commit(self, step: int, holdout: Mapping[str, float | None] | None) -> None:
        """Commit; at the end of an epoch its result is part of the checkpoint, and told after it is on disk."""
        if not self.pipeline.batches.ends_epoch(step):
            self.worker.commit(step)
            return
        sums = self.worker.running
        result = EpochResult(self.pipeline.batches.epoch_of(step), step, sums["loss"] / sums["rows"], holdout)
        self.worker.running = {}
        self.worker.commit(step, result)

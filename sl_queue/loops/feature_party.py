"""A feature party, in full: forward and send, receive and backward, update, commit.

An activation's whole way at its own party is here and in compute/base.py:
rows -> forward -> send ... receive -> backward -> update.
"""

from dataclasses import dataclass
from typing import assert_never

from sl_queue.errors import LocalProtocolError
from sl_queue.loops.lifecycle import Worker
from sl_queue.ports import BaseStage, Channel
from sl_queue.protocol.messages import Activation, Kind
from sl_queue.protocol.schedule.pipeline import Backward, Begin, Commit, Evaluate, Forward, Fuse, Pipeline, Update


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
                case Forward(micro_batch):
                    self.channel.send(self.label_holder, Activation(micro_batch, self.stage.forward(micro_batch)))
                    following = self.pipeline.batches.after(micro_batch)
                    if following is not None:
                        self.stage.prepare(following)
                case Backward(micro_batch):
                    gradient = self.channel.receive(self.label_holder, Kind.GRADIENT, micro_batch)
                    self.stage.backward(micro_batch, gradient)
                case Update(step):
                    self.stage.update()
                    self.worker.advance(step, self.pipeline.batches.rows_in_step(step))
                case Evaluate():
                    for micro_batch in action.micro_batches():
                        held_out = Activation(micro_batch, self.stage.predict(micro_batch), holdout=True)
                        self.channel.send(self.label_holder, held_out)
                case Commit(step):
                    self.worker.commit(step)
                case Fuse():
                    raise LocalProtocolError("a feature party does not fuse")
                case _:
                    assert_never(action)

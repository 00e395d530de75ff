"""Split equals joined, shown on a job's own models and tables: its first steps done both ways, compared.

The split steps are those of the run: the pipeline's actions in their order, with its depth and staleness, and every
tensor packed, encoded, decoded and unpacked on its way. Only the broker is left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from sl_queue.compute.base_stage import TorchBaseStage, base_stage
from sl_queue.compute.building import LAST
from sl_queue.compute.fuse_stage import TorchFuseStage, fuse_stage
from sl_queue.compute.reference import ReferenceRun, train_joined
from sl_queue.compute.spec import ComputeSpec
from sl_queue.cut.crossing import from_payload
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import Activation, Gradient, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.schedule.actions import (
    Action,
    Backward,
    Forward,
    Fuse,
    Predict,
    Prepare,
    Score,
    Update,
)
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table

Weights = Mapping[str, Mapping[str, Tensor]]  # of each module, "fuse" or "base of <party>", its state_dict

STEPS = 3  # so that momentum and running statistics have something to carry on
MAX_ROWS = 1 << 16  # of a step: enough of a job that trains on a huge table at once


def first_step_difference(
    specs: Sequence[ComputeSpec], tables: Mapping[str, Table], pipeline: Pipeline, steps: int = STEPS
) -> float:
    """Return the largest difference of any weight after the first steps, split as the job says and joined.

    0.0 means equal bit for bit. `staleness` and a narrower dtype on the wire make a difference on purpose.
    """
    split = split_weights(specs, tables, pipeline, steps)
    return largest_difference(split, first_joined_weights(specs, tables, pipeline.batches, steps))


def largest_difference(one: Weights, other: Weights) -> float:
    """Return the largest difference of any weight, on whatever devices. Raises KeyError if modules are missing."""
    pairs = [(tensor, other[module][name]) for module, weights in one.items() for name, tensor in weights.items()]
    return max((float((a.cpu().double() - b.cpu().double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def joined_weights(joined: ReferenceRun) -> Weights:
    """Return the weights of jointly trained modules, to compare."""
    bases = {_of(party): base.state_dict() for party, base in joined.bases.items()}
    return {**bases, "fuse": joined.fuse.state_dict()}


def _of(party: str) -> str:
    return f"base of {party}"


def first_joined_weights(
    specs: Sequence[ComputeSpec], tables: Mapping[str, Table], batches: Batches, steps: int = STEPS
) -> Weights:
    """Return copies of the weights after the first steps, joined."""
    batches = bounded(batches)
    weights = joined_weights(train_joined(specs, tables, batches, steps=min(steps, batches.steps)))
    return {module: {name: tensor.clone() for name, tensor in found.items()} for module, found in weights.items()}


def split_weights(
    specs: Sequence[ComputeSpec], tables: Mapping[str, Table], pipeline: Pipeline, steps: int = STEPS
) -> Weights:
    """Return copies of the weights after the first steps, split as the job says."""
    by_party, batches = {spec.party: spec for spec in specs}, bounded(pipeline.batches)
    holder = specs[0].layers.label_holder
    fuse = fuse_stage(by_party[holder], tables[holder], batches)
    features = specs[0].layers.feature_parties
    bases = {party: base_stage(by_party[party], tables[party], batches) for party in features}
    _Rehearsal(fuse, bases, replace(pipeline, batches=batches), min(steps, batches.steps)).play()
    stages: dict[str, TorchBaseStage | TorchFuseStage] = {**bases, holder: fuse}
    return {
        _of(party) if part == "base" else part: {name: from_payload(payload) for name, payload in weights.items()}
        for party, stage in stages.items()
        for part, weights in stage.weights().items()
        if not part.endswith(LAST)
    }


def bounded(batches: Batches) -> Batches:
    """Return the same batches with so few rows that a huge table does not take minutes."""
    return batches if batches.batch_size <= MAX_ROWS else replace(batches, batch_size=MAX_ROWS)


@dataclass(slots=True)
class _Rehearsal:
    """All parties of a run in this thread. Mutable: messages are on their way between them."""

    fuse: TorchFuseStage
    bases: Mapping[str, TorchBaseStage]
    pipeline: Pipeline
    steps: int
    on_their_way: dict[tuple[Kind, str, MicroBatch], bytes] = field(default_factory=dict)  # of and to feature parties

    def play(self) -> None:
        """Take turns: each party works until it waits for a message."""
        roles = [self._feature_party(party) for party in self.bases]
        roles.append(self._label_holder())
        while roles:
            roles = [role for role in roles if next(role, None) is not None]

    def _feature_party(self, party: str) -> Iterator[str]:
        """Play the loop of a feature party in loops/training.py; yields while it waits."""
        stage = self.bases[party]
        for action in self._first_steps(self.pipeline.feature_actions):
            match action:
                case Prepare(micro_batch):
                    stage.prepare(micro_batch)
                case Forward(micro_batch):
                    self._send(party, Activation(micro_batch, stage.forward(micro_batch)))
                case Backward(micro_batch):
                    while (Kind.GRADIENT, party, micro_batch) not in self.on_their_way:
                        yield party
                    stage.backward(micro_batch, self._receive(Kind.GRADIENT, party, micro_batch))
                case Update():
                    stage.update()
                case Predict(micro_batch):
                    self._send(party, Activation(micro_batch, stage.predict(micro_batch), holdout=True))

    def _label_holder(self) -> Iterator[str]:
        """Play the loop of the label holder there; yields while it waits."""
        for action in self._first_steps(self.pipeline.label_actions):
            match action:
                case Prepare(micro_batch):
                    self.fuse.prepare(micro_batch)
                case Fuse(micro_batch):
                    yield from self._until_all(Kind.ACTIVATION, micro_batch)
                    activations = self._gather(Kind.ACTIVATION, micro_batch)
                    gradients = self.fuse.forward_backward(micro_batch, activations)
                    for answered, found in (*self.fuse.late_gradients(), (micro_batch, gradients)):
                        for party, gradient in found.items():
                            self._send(party, Gradient(answered, gradient))
                case Update():
                    self.fuse.update()
                case Score(micro_batch):
                    yield from self._until_all(Kind.HOLDOUT, micro_batch)
                    self.fuse.evaluate(micro_batch, self._gather(Kind.HOLDOUT, micro_batch))

    def _first_steps(self, actions: Callable[[int], Iterator[Action]]) -> Iterator[Action]:
        """Return the actions up to the last update, and the evaluation that may follow it."""
        trained = False
        for action in actions(0):
            if trained and not isinstance(action, Predict | Score):
                return
            yield action
            trained = trained or action == Update(self.steps - 1)

    def _until_all(self, kind: Kind, micro_batch: MicroBatch) -> Iterator[str]:
        while not all((kind, party, micro_batch) in self.on_their_way for party in self.bases):
            yield "label holder"

    def _gather(self, kind: Kind, micro_batch: MicroBatch) -> dict[str, Payload]:
        return {party: self._receive(kind, party, micro_batch) for party in self.bases}

    def _send(self, party: str, message: Activation | Gradient) -> None:
        """Encode at once, as a channel does: the tensor behind the payload may change."""
        header = Header("rehearsal", 0, message.kind, party, party, message.micro_batch)
        self.on_their_way[message.kind, party, message.micro_batch] = encode(header, message)

    def _receive(self, kind: Kind, party: str, micro_batch: MicroBatch) -> Payload:
        _, message = decode(self.on_their_way.pop((kind, party, micro_batch)))
        assert isinstance(message, Activation | Gradient)
        return message.payload

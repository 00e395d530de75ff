"""The label holder's part: activations -> fuse model -> loss -> gradients, and the same in evaluation mode for metrics.

Its own base model, if it has one, is fused in place, without a message. Its backward pass is put off until the
gradients that others wait for are on their way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sl_queue.compute.base_stage import TorchBaseStage, base_stage, require_no_defence
from sl_queue.compute.epoch_tables import Rows
from sl_queue.compute.flight import InFlight
from sl_queue.compute.fuse_passes import FusePasses, GatheredInputs, PreparedTargets
from sl_queue.compute.model import Model
from sl_queue.compute.modules.handover import Copies, Take
from sl_queue.compute.objective import Objective, measured, objective_of
from sl_queue.compute.scoring import Scoring, mean_by_amount
from sl_queue.compute.spec import ComputeSpec, LayersSpec
from sl_queue.compute.stand_ins import drawn_inputs, fused
from sl_queue.compute.training_outputs import TrainingOutputs
from sl_queue.cut.crossing import FuseCut
from sl_queue.cut.guard import UNGUARDED, Guard, place
from sl_queue.cut.rows import CutRows
from sl_queue.cut.tensors import Inputs, described, dtype_name
from sl_queue.errors import LocalProtocolError, ShapeError
from sl_queue.protocol.checkpoint import State, Weights
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.schedule.row_order import Batches, Positions
from sl_queue.protocol.table import Table

_TRIAL_ROWS = 2
_RANGE_ROWS = 64  # on which the range of the output is looked at
_CPU = torch.device("cpu")


@dataclass(slots=True)
class TorchFuseStage:
    """ports.FuseStage over torch. Mutable: it holds the models and the sums of the step and of the evaluation."""

    passes: FusePasses
    scoring: Scoring
    cuts: Mapping[str, FuseCut]  # to the feature parties, in job order
    trained: TrainingOutputs  # of the epoch so far
    _losses: list[tuple[float, float]] = field(default_factory=list)  # of the step so far: amount of rows, mean loss
    _prepared: PreparedTargets | None = None
    _put_off: list[tuple[MicroBatch, InFlight, list[Tensor | None]]] = field(
        default_factory=list
    )  # the own base's backward passes
    _gathered: list[GatheredInputs] = field(default_factory=list)  # of a step whose rows are fused at once
    _late: list[tuple[MicroBatch, Mapping[str, Payload]]] = field(default_factory=list)  # gradients not yet sent
    _step: int = 0  # of the last micro-batch

    @property
    def layers(self) -> LayersSpec:
        return self.passes.layers

    @property
    def model(self) -> Model:
        return self.passes.model

    @property
    def own(self) -> TorchBaseStage | None:
        return self.passes.own

    @property
    def objective(self) -> Objective:
        return self.passes.objective

    @property
    def table(self) -> Table:
        return self.passes.table

    @property
    def batches(self) -> Batches:
        return self.passes.batches

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Prepare rows, labels and the own base model's forward pass, for `forward_backward`."""
        self._own_backward()
        self._prepared = self.passes.begun(micro_batch)

    def forward_backward(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> Mapping[str, Payload]:
        """Compute loss and gradients of one micro-batch, weighted by its share of the step's rows.

        A party on whose activation the loss does not depend gets a gradient of no bytes, which is not one of zeros.
        """
        if self._prepared is None or self._prepared.micro_batch != micro_batch:
            self.prepare(micro_batch)
        mine, self._prepared = self._prepared, None
        assert mine is not None
        gathered = self.passes.gathered(mine, self.arrived(activations, micro_batch, mine.rows))
        self._gathered = [*(self._gathered if micro_batch.index else ()), gathered]
        if self.layers.whole_batch and not self._ends_step(micro_batch):
            return {}
        parts, self._gathered = self._gathered if self.layers.whole_batch else self._gathered[-1:], []
        self._fuse(parts)
        self._look_for_overflow(parts)
        *self._late, (_, answers) = [(part.targets.micro_batch, self._answers(part)) for part in parts]
        return answers

    def late_gradients(self) -> Sequence[tuple[MicroBatch, Mapping[str, Payload]]]:
        """Return the gradients that had to wait for the last micro-batch of their step, and forget them."""
        late, self._late = self._late, []
        return late

    def _fuse(self, parts: Sequence[GatheredInputs]) -> None:
        """Do the forward and the backward pass of these micro-batches' rows, and keep what comes of it."""
        value, output, positions = self.passes.computed(parts)
        self.trained.add(output, positions)
        self.note(parts[-1].targets.micro_batch, positions, value)
        for part in parts:
            own = part.inputs.get(self.model.party)
            if part.targets.flight is not None and own is not None:
                self._put_off.append((part.targets.micro_batch, part.targets.flight, [each.gradient for each in own]))

    def _look_for_overflow(self, parts: Sequence[GatheredInputs]) -> None:
        """Note gradients that are not finite; those of the parameters once a step's last are there."""
        if self.model.scaling is None:
            return
        last = parts[-1].targets.micro_batch
        inputs = [each for part in parts for of_party in part.inputs.values() for each in of_party]
        self.model.scaling.see(each.gradient for each in inputs)
        if self._ends_step(last):
            self.model.scaling.see(parameter.grad for parameter in self.model.module.parameters())

    def _ends_step(self, micro_batch: MicroBatch) -> bool:
        return micro_batch.index + 1 == self.batches.parts(micro_batch.step)

    def note(self, micro_batch: MicroBatch, positions: Positions, loss: float) -> None:
        """Add the mean loss of these rows to the step."""
        self._losses.append((self.objective.amount(positions), loss))
        self._step = micro_batch.step

    def _answers(self, part: GatheredInputs) -> Mapping[str, Payload]:
        """Return the gradients of a micro-batch's activations, as they are sent."""
        about = (part.targets.micro_batch, part.targets.rows)
        scaling = self.model.scaling
        if scaling is not None and scaling.spoiled and self._ends_step(part.targets.micro_batch):
            return {p: cut.leave_each([o.overflow() for o in part.inputs[p]], *about) for p, cut in self.cuts.items()}
        return {p: cut.leave_each([o.gradient for o in part.inputs[p]], *about) for p, cut in self.cuts.items()}

    def update(self) -> float:
        """Make one optimizer step of fuse and own base; returns the step's loss, the mean over its rows."""
        if not self._losses:
            raise LocalProtocolError("an update without a micro-batch")
        self._own_backward()
        if self.own is not None and self.own.model.scaling is not None and self.model.scaling is not None:
            self.own.model.scaling.spoiled |= self.model.scaling.spoiled
        self.model.step(self._step)
        if self.own is not None:
            self.own.update()
        loss = mean_by_amount(self._losses)
        self._losses.clear()
        return loss

    def evaluate(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> None:
        """Add held-out rows to the running evaluation; their outputs stay in memory until `metrics`."""
        arrived = self.arrived(activations, micro_batch, self.passes.held_out(micro_batch))
        scored = self.passes.scored(micro_batch, {party: each for party, (each, _) in arrived.items()})
        self.scoring.keep(micro_batch.index, *scored)

    def metrics(self) -> Mapping[str, float | None]:
        """Return loss and metrics over all rows evaluated since the last call; None where rows do not define one."""
        return self.scoring.metrics()

    def training_metrics(self) -> Mapping[str, float | None] | None:
        """Return the metrics of the epoch's training passes, and forget them; None if they are not asked for."""
        found = self.trained.take()
        if found is None:
            return None
        output, rows = found
        return measured(self.objective, output, self.objective.labels[torch.from_numpy(rows)], rows)

    def evaluation_tables(self) -> Mapping[str, Rows] | None:
        """Return what a person looks at of the last evaluation; None of numbers, and without metrics."""
        return self.scoring.tables

    def state(self) -> State:
        """Return a copy of everything that a step changes: fuse, own base, both optimizers, the loss."""
        if self._losses:
            raise LocalProtocolError("a checkpoint in the middle of a step")
        states = [self.model.state(), self.objective.owned.state(), self.trained.state()] + (
            [] if self.own is None else [self.own.state()]
        )
        return State.merged(states)

    def load(self, state: State) -> None:
        """Become what `state` described."""
        self.model.load(state)
        self.objective.owned.load(state)
        self.trained.load(state)
        if self.own is not None:
            self.own.load(state)
        self._losses.clear()
        self.scoring.forget()
        for cut in self.cuts.values():
            cut.forget()
        self._prepared = None
        for waiting in (self._put_off, self._gathered, self._late):
            waiting.clear()

    def weights(self) -> Weights:
        """Return the state_dict of the fuse model, and of the own base model if there is one."""
        return {**self.model.weights(), **({} if self.own is None else self.own.weights())}

    def _own_backward(self) -> None:
        """Do the backward pass of the own base model that was put off, if there is one."""
        put_off, self._put_off = self._put_off, []
        for each in put_off:
            assert self.own is not None
            self.own.differentiate(*each)

    def arrived(
        self, activations: Mapping[str, Payload], micro_batch: MicroBatch, rows: CutRows
    ) -> dict[str, tuple[list[Tensor], tuple[int, ...]]]:
        """Return the feature parties' outputs in job order, and which of them want a gradient."""
        missing = [party for party in self.cuts if party not in activations]
        if missing:
            raise LocalProtocolError(f"{place(self.model.party, micro_batch)}: no activation of {', '.join(missing)}")
        return {party: cut.arrive_each(activations[party], micro_batch, rows) for party, cut in self.cuts.items()}


def fuse_stage(
    spec: ComputeSpec,
    table: Table,
    batches: Batches,
    take: Take | None = None,
    guards: Mapping[str, Guard] | None = None,
) -> TorchFuseStage:
    """Build the label holder's stage with initial weights.

    `take` says how to come by modules and a loss that are given in code; without it, as copies. `guards` are put in at
    the cuts to these feature parties. Raises JobError for labels, a loss or metrics that do not suit the model, and
    ShapeError if it fails on the cuts.
    """
    party, layers = spec.party, spec.layers

    def sample(dtype: torch.dtype, device: torch.device = _CPU, rows: int = _TRIAL_ROWS, scale: float = 0) -> Inputs:
        return fused(layers, drawn_inputs(layers, rows, dtype, device, scale, graph=True))

    if layers.precision is not None and layers.precision.name == "fp16":
        require_no_defence(party, (guards or {}).values())
    take = take or Copies()  # of fuse model and loss together: one may hold the other
    model = Model.build(spec, "fuse", sample, take, batches.steps)
    output = model.try_out(sample(model.dtype, model.device), graph=True)
    _require_rows_first(output, model)

    def scaled(scale: float) -> Tensor:
        return model.try_out(sample(model.dtype, model.device, _RANGE_ROWS, scale))

    own = base_stage(spec, table, batches, take) if party in layers.cuts else None
    modules = [model.module, *([] if own is None else [own.module])]
    with model.drawing("loss trial", MicroBatch(0, 0)):
        objective = objective_of(spec, table, output, scaled, f"party {party!r}", modules, take)
    peers = layers.feature_parties
    cuts = {peer: fuse_cut(layers, model, peer, (guards or {}).get(peer, UNGUARDED)) for peer in peers}
    assert spec.objective is not None
    trained = TrainingOutputs(spec.objective.train_metrics and bool(objective.metrics))
    passes = FusePasses(layers, model, own, objective, table, batches)
    return TorchFuseStage(passes, Scoring(objective, table, batches), cuts, trained)


def _require_rows_first(output: Tensor, model: Model) -> None:
    if output.shape[:1] != (_TRIAL_ROWS,):
        raise ShapeError(
            f"party {model.party!r}: {model.name} returns {described(output)} for {_TRIAL_ROWS} rows; "
            "its first axis must be the rows"
        )


def fuse_cut(layers: LayersSpec, model: Model, peer: str, guard: Guard) -> FuseCut:
    """Build the label holder's cut to a feature party."""
    return FuseCut(
        party=model.party,
        peer=peer,
        shape=layers.cut(peer) or (),
        dtypes=tuple(map(dtype_name, model.accepted())),
        device=model.device,
        wire=layers.wire,
        guard=guard,
        outputs=layers.outputs.get(peer),
        overflows=model.scaling is not None,
    )

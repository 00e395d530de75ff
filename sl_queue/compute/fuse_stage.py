"""The label holder's part: activations -> fuse model -> loss -> gradients, and the same in evaluation mode for metrics.

Its own base model, if it has one, is fused in place, without a message. Its backward pass is put off until the
gradients that others wait for are on their way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sl_queue.compute.aggregation import aggregated
from sl_queue.compute.base_stage import InFlight, TorchBaseStage, base_stage
from sl_queue.compute.building import Inputs, blame
from sl_queue.compute.epoch_tables import Rows
from sl_queue.compute.losses import label_tensor
from sl_queue.compute.model import Model
from sl_queue.compute.modules.cut_input import CutInput
from sl_queue.compute.modules.graph import hooks_made
from sl_queue.compute.modules.handover import Copies, Take
from sl_queue.compute.objective import Objective, measured, objective_of, tabulated, why_not_finite
from sl_queue.compute.spec import ComputeSpec, LayersSpec
from sl_queue.compute.stand_ins import drawn
from sl_queue.compute.training_outputs import TrainingOutputs
from sl_queue.cut.crossing import FuseCut, place
from sl_queue.cut.guard import UNGUARDED, Guard
from sl_queue.cut.rows import CutRows
from sl_queue.cut.several import fuse_inputs
from sl_queue.cut.tensors import described, dtype_name
from sl_queue.errors import ComputeError, LocalProtocolError, NonFiniteError, ShapeError
from sl_queue.protocol.checkpoint import State, Weights
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.schedule.row_order import Batches, Positions
from sl_queue.protocol.table import Table

_TRIAL_ROWS = 2
_RANGE_ROWS = 64  # on which the range of the output is looked at


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One held-out micro-batch."""

    amount: float  # of its rows
    loss: float
    output: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True)
class PreparedTargets:
    """The label holder's own share of a micro-batch: labels, and its base model's activation."""

    micro_batch: MicroBatch
    rows: CutRows
    labels: Tensor = field(repr=False)  # (rows,) or (rows, *anything)
    flight: InFlight | None = field(repr=False)  # of its base model


@dataclass(frozen=True, slots=True)
class GatheredInputs:
    """A micro-batch that is here in full."""

    targets: PreparedTargets
    inputs: Mapping[str, Sequence[CutInput]]  # each output of all parties with a base model


@dataclass(slots=True)
class TorchFuseStage:
    """ports.FuseStage over torch. Mutable: it holds the models and the sums of the step and of the evaluation."""

    layers: LayersSpec
    model: Model
    own: TorchBaseStage | None  # the label holder's base model
    objective: Objective
    table: Table
    batches: Batches
    cuts: Mapping[str, FuseCut]  # to the feature parties, in job order
    trained: TrainingOutputs  # of the epoch so far
    tables: Mapping[str, Rows] | None = None  # of the last evaluation
    truly: Mapping[str, float | None] = field(default_factory=dict)  # the last metrics on true labels, for this party
    _losses: list[tuple[float, float]] = field(default_factory=list)  # of the step so far: amount of rows, mean loss
    _amounts: tuple[int, float] = (-1, 0.0)  # of the rows of a step
    _evaluated: dict[int, Evaluated] = field(default_factory=dict)
    _prepared: PreparedTargets | None = None
    _put_off: list[tuple[MicroBatch, InFlight, list[Tensor | None]]] = field(
        default_factory=list
    )  # the own base's backward passes
    _gathered: list["GatheredInputs"] = field(default_factory=list)  # of a step whose rows are fused at once
    _late: list[tuple[MicroBatch, Mapping[str, Payload]]] = field(default_factory=list)  # gradients not yet sent
    _step: int = 0  # of the last micro-batch

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Prepare rows, labels and the own base model's forward pass, for `forward_backward`."""
        self._own_backward()
        self._prepared = self.begun(micro_batch)

    def begun(self, micro_batch: MicroBatch, own_weights: Mapping[str, Tensor] | None = None) -> PreparedTargets:
        """Return what a micro-batch takes of this party alone, of the base model with other weights if given."""
        positions = self.batches.rows(micro_batch)
        rows = CutRows.of(self.table.row_keys, positions)
        flight = None if self.own is None else self.own.fused_in_place(micro_batch, positions, rows, own_weights)
        return PreparedTargets(micro_batch, rows, self._labels(positions), flight)

    def forward_backward(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> Mapping[str, Payload]:
        """Compute loss and gradients of one micro-batch, weighted by its share of the step's rows.

        A party on whose activation the loss does not depend gets a gradient of no bytes, which is not one of zeros.
        """
        if self._prepared is None or self._prepared.micro_batch != micro_batch:
            self.prepare(micro_batch)
        mine, self._prepared = self._prepared, None
        assert mine is not None
        gathered = self.gathered(mine, self.arrived(activations, micro_batch, mine.rows))
        self._gathered = [*(self._gathered if micro_batch.index else ()), gathered]
        if self.layers.whole_batch and micro_batch.index + 1 < self.batches.parts(micro_batch.step):
            return {}
        parts, self._gathered = self._gathered if self.layers.whole_batch else self._gathered[-1:], []
        self._fuse(parts)
        *self._late, (_, answers) = [(part.targets.micro_batch, self._answers(part)) for part in parts]
        return answers

    def gathered(
        self, mine: PreparedTargets, arrived: Mapping[str, tuple[Sequence[Tensor], Sequence[int]]]
    ) -> GatheredInputs:
        """Put a micro-batch together: what has arrived of others, and what this party has."""
        inputs = {
            party: [CutInput(t, p in learn) for p, t in enumerate(each)] for party, (each, learn) in arrived.items()
        }
        if mine.flight is not None:
            inputs[self.model.party] = [CutInput(o.detach(), o.requires_grad) for o in mine.flight.outputs]
        return GatheredInputs(mine, inputs)

    def late_gradients(self) -> Sequence[tuple[MicroBatch, Mapping[str, Payload]]]:
        """Return the gradients that had to wait for the last micro-batch of their step, and forget them."""
        late, self._late = self._late, []
        return late

    def _fuse(self, parts: Sequence["GatheredInputs"]) -> None:
        """Do the forward and the backward pass of these micro-batches' rows, and keep what comes of it."""
        value, output, positions = self.computed(parts)
        self.trained.add(output, positions)
        self.note(parts[-1].targets.micro_batch, positions, value)
        for part in parts:
            own = part.inputs.get(self.model.party)
            if part.targets.flight is not None and own is not None:
                self._put_off.append((part.targets.micro_batch, part.targets.flight, [each.gradient for each in own]))

    def note(self, micro_batch: MicroBatch, positions: Positions, loss: float) -> None:
        """Add the mean loss of these rows to the step."""
        self._losses.append((self.objective.amount(positions), loss))
        self._step = micro_batch.step

    def computed(
        self, parts: Sequence["GatheredInputs"], weights: Mapping[str, Tensor] | None = None
    ) -> tuple[float, Tensor, Positions]:
        """Compute these micro-batches' rows, all at once; returns their mean loss, the output and the rows.

        Gradients are added to the parameters, or to `weights`.
        """
        first, last = parts[0].targets.micro_batch, parts[-1].targets.micro_batch
        where, positions = (
            place(self.model.party, last),
            _joined([self.batches.rows(p.targets.micro_batch) for p in parts]),
        )
        hooks = hooks_made()
        entered = [{party: [o.enter() for o in each] for party, each in part.inputs.items()} for part in parts]
        inputs = entered[0]
        if len(parts) > 1:
            inputs = {p: [torch.cat(each) for each in zip(*(of[p] for of in entered), strict=True)] for p in entered[0]}
        labels = parts[0].targets.labels if len(parts) == 1 else torch.cat([part.targets.labels for part in parts])
        with self.model.drawing("forward", first):
            output = self._fused(inputs, where, weights)
            loss, value = self._loss(output, labels, positions, where)
        amount = self.objective.amount(positions)
        self._differentiate(loss * (amount / (self._amount_of_step(last.step) or 1.0)), hooks, first)
        return value, output, positions

    def _answers(self, part: "GatheredInputs") -> Mapping[str, Payload]:
        """Return the gradients of a micro-batch's activations, as they are sent."""
        about = (part.targets.micro_batch, part.targets.rows)
        return {p: cut.leave_each([o.gradient for o in part.inputs[p]], *about) for p, cut in self.cuts.items()}

    def _differentiate(self, loss: Tensor, hooks: int, micro_batch: MicroBatch) -> None:
        """Do the backward pass from the loss to the activations; random draws in it are keyed by the micro-batch."""
        where = place(self.model.party, micro_batch)
        if not loss.requires_grad:
            raise ComputeError(
                f"{where}: the loss of {self.model.name} depends on no activation and on no parameter that is trained, "
                "so nothing can be learned; check for detach(), no_grad() and argmax() in model and loss"
            )
        scope = self.model.differentiating([loss], hooks, micro_batch)
        with blame(f"{where}: the backward pass of {self.model.name} failed"), scope:
            torch.autograd.backward(loss)

    def update(self) -> float:
        """Make one optimizer step of fuse and own base; returns the step's loss, the mean over its rows."""
        if not self._losses:
            raise LocalProtocolError("an update without a micro-batch")
        self._own_backward()
        self.model.step(self._step)
        if self.own is not None:
            self.own.update()
        loss = _mean(self._losses)
        self._losses.clear()
        return loss

    def evaluate(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> None:
        """Add held-out rows to the running evaluation; their outputs stay in memory until `metrics`."""
        arrived = self.arrived(activations, micro_batch, self.held_out(micro_batch))
        self.keep(micro_batch, *self.scored(micro_batch, {party: each for party, (each, _) in arrived.items()}))

    def held_out(self, micro_batch: MicroBatch) -> CutRows:
        """Return the held-out rows of a micro-batch."""
        return CutRows.of(self.table.row_keys, self.batches.holdout_part(micro_batch.index), held_out=True)

    def scored(
        self,
        micro_batch: MicroBatch,
        arrived: Mapping[str, Sequence[Tensor]],
        weights: Mapping[str, Tensor] | None = None,
        own_weights: Mapping[str, Tensor] | None = None,
    ) -> tuple[float, Tensor]:
        """Return loss and output for held-out rows, with other weights if given."""
        positions, inputs = self.batches.holdout_part(micro_batch.index), dict(arrived)
        where = f"{place(self.model.party, micro_batch)} (held-out rows)"
        if self.own is not None:
            inputs[self.model.party] = self.own.prediction(micro_batch, own_weights)
        loss = self.objective.owned
        with self.model.evaluating(), loss.evaluating(), self.model.drawing("evaluate", micro_batch):
            output = self._fused(inputs, where, weights)
            _, value = self._loss(output, self._labels(positions), positions, where)
        return value, output

    def keep(self, micro_batch: MicroBatch, loss: float, output: Tensor) -> None:
        """Keep what was scored until `metrics`; the output only where something is measured of it."""
        positions = self.batches.holdout_part(micro_batch.index)
        labels = self._labels(positions).cpu()
        kept = (output.cpu(), labels) if self.objective.metrics else (output.new_empty(0), labels.new_empty(0))
        self._evaluated[micro_batch.index] = Evaluated(self.objective.amount(positions), loss, *kept)

    def metrics(self) -> Mapping[str, float | None]:
        """Return loss and metrics over all rows evaluated since the last call; None where rows do not define one."""
        parts = [self._evaluated[index] for index in sorted(self._evaluated)]
        if not parts:
            raise LocalProtocolError("metrics without an evaluation")
        self._evaluated.clear()
        self.tables = None
        found: dict[str, float | None] = {"loss": _mean([(part.amount, part.loss) for part in parts])}
        if self.objective.metrics:
            output, labels = torch.cat([p.output for p in parts]), torch.cat([p.labels for p in parts])
            rows = np.concatenate([self.batches.holdout_part(index) for index in range(self.batches.holdout_parts)])
            found |= measured(self.objective, output, labels, rows)
            self.tables = tabulated(self.objective, output, labels, rows)
            if self.table.truth is not None:
                self.truly = measured(self.objective, output, label_tensor(self.table.truth[rows]), rows)
        return found

    def training_metrics(self) -> Mapping[str, float | None] | None:
        """Return the metrics of the epoch's training passes, and forget them; None if they are not asked for."""
        found = self.trained.take()
        if found is None:
            return None
        output, rows = found
        return measured(self.objective, output, self.objective.labels[torch.from_numpy(rows)], rows)

    def evaluation_tables(self) -> Mapping[str, Rows] | None:
        """Return what a person looks at of the last evaluation; None of numbers, and without metrics."""
        return self.tables

    def state(self) -> State:
        """Return a copy of everything that a step changes: fuse, own base, both optimizers, the loss."""
        if self._losses:
            raise LocalProtocolError("a checkpoint in the middle of a step")
        states = [self.model.state(), self.objective.owned.state(), self.trained.state()] + (
            [] if self.own is None else [self.own.state()]
        )
        return State(
            {name: tensor for state in states for name, tensor in state.tensors.items()},
            {name: value for state in states for name, value in state.values.items()},
        )

    def load(self, state: State) -> None:
        """Become what `state` described."""
        self.model.load(state)
        self.objective.owned.load(state)
        self.trained.load(state)
        if self.own is not None:
            self.own.load(state)
        self._losses.clear()
        self._evaluated.clear()
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

    def _fused(
        self, inputs: Mapping[str, Sequence[Tensor]], where: str, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the fuse model's output; inputs in job order, whatever order they came in."""
        with blame(f"{where}: aggregation {self.layers.aggregation!r} failed"):
            each = fuse_inputs(inputs, self.layers.outputs, self.layers.fused)
            joined = aggregated(each, self.layers.aggregation)
        return self.model.run(joined, where, weights)

    def _labels(self, positions: Positions) -> Tensor:
        return self.objective.labels[torch.from_numpy(positions)].to(self.model.device)

    def _amount_of_step(self, step: int) -> float:
        """Return how much the rows of a step count together."""
        if self.objective.weighting is None:
            return float(self.batches.rows_in_step(step))
        if self._amounts[0] != step:
            parts = [self.batches.rows(MicroBatch(step, index)) for index in range(self.batches.parts(step))]
            self._amounts = (step, sum(map(self.objective.amount, parts)))
        return self._amounts[1]

    def _loss(self, output: Tensor, labels: Tensor, positions: Positions, where: str) -> tuple[Tensor, float]:
        with blame(f"{where}: the loss failed"):
            loss = self.objective.loss_of(output, labels, positions)
            value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(f"{where}: the loss is {value}; {why_not_finite(output, self.model.name)}")
        return loss, value


def _joined(positions: Sequence[Positions]) -> Positions:
    return positions[0] if len(positions) == 1 else np.concatenate(positions)


def _mean(losses: Sequence[tuple[float, float]]) -> float:
    """Return the mean of losses by the amounts of their rows; 0 of rows that count for nothing."""
    return sum(amount * loss for amount, loss in losses) / (sum(amount for amount, _ in losses) or 1.0)


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

    def sample(
        dtype: torch.dtype,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        rows: int = _TRIAL_ROWS,
        scale: float | None = None,
    ) -> Inputs:
        numbers = [drawn(layers.seed, p, (rows, *cut), scale) for p, cut in layers.cuts.items()]
        inputs = [x.to(device, dtype).requires_grad_().clone() for x in numbers]  # in the graph, and no leaves of it
        each = {
            p: layers.outputs[p].split(x) if p in layers.outputs else [x]
            for p, x in zip(layers.cuts, inputs, strict=True)
        }
        return aggregated(fuse_inputs(each, layers.outputs, layers.fused), layers.aggregation)

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
    return TorchFuseStage(layers, model, own, objective, table, batches, cuts, trained)


def _require_rows_first(output: Tensor, model: Model) -> None:
    if output.shape[:1] != (_TRIAL_ROWS,):
        raise ShapeError(
            f"party {model.party!r}: {model.name} returns {described(output)} for {_TRIAL_ROWS} rows; "
            "its first axis must be the rows"
        )


def fuse_cut(layers: LayersSpec, model: Model, peer: str, guard: Guard) -> FuseCut:
    """Build the label holder's cut to a feature party."""
    dtypes = tuple(map(dtype_name, model.accepted()))
    return FuseCut(
        model.party, peer, layers.cut(peer) or (), dtypes, model.device, layers.wire, guard, layers.outputs.get(peer)
    )

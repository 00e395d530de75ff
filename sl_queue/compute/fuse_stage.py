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
from sl_queue.compute.losses import label_tensor
from sl_queue.compute.model import Model
from sl_queue.compute.modules.cut_input import CutInput
from sl_queue.compute.modules.graph import hooks_made
from sl_queue.compute.modules.handover import Copies, Take
from sl_queue.compute.objective import Objective, measured, objective_of, why_not_finite
from sl_queue.compute.spec import ComputeSpec, LayersSpec
from sl_queue.compute.stand_ins import drawn
from sl_queue.cut.crossing import FuseCut, place
from sl_queue.cut.guard import UNGUARDED, Guard
from sl_queue.cut.rows import CutRows
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

    rows: int
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
class Fused:
    """The outcome of a micro-batch: its mean loss, and the gradient of each activation that the loss depends on."""

    loss: float
    gradients: Mapping[str, Tensor | None] = field(repr=False)  # of the feature parties
    own: Tensor | None = field(repr=False)


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
    truly: Mapping[str, float | None] = field(default_factory=dict)  # the last metrics on true labels, for this party
    _losses: list[tuple[int, float]] = field(default_factory=list)  # of the step so far: rows, mean loss
    _evaluated: dict[int, Evaluated] = field(default_factory=dict)
    _prepared: PreparedTargets | None = None
    _put_off: tuple[MicroBatch, InFlight, Tensor] | None = None  # the own base model's backward pass: its gradient
    _step: int = 0  # of the last micro-batch

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Rows, labels and the own base model's forward pass, for `forward_backward`."""
        self._own_backward()
        self._prepared = self.begun(micro_batch)

    def begun(self, micro_batch: MicroBatch, own_weights: Mapping[str, Tensor] | None = None) -> PreparedTargets:
        """Return what a micro-batch takes of this party alone, the base model with other weights if given."""
        positions = self.batches.rows(micro_batch)
        rows = CutRows.of(self.table.row_keys, positions)
        flight = None if self.own is None else self.own.fused_in_place(micro_batch, positions, rows, own_weights)
        return PreparedTargets(micro_batch, rows, self._labels(positions), flight)

    def forward_backward(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> Mapping[str, Payload]:
        """Loss and gradients of one micro-batch, weighted by its share of the step's rows.

        A party on whose activation the loss does not depend gets a gradient of no bytes, which is not one of zeros.
        """
        if self._prepared is None or self._prepared.micro_batch != micro_batch:
            self.prepare(micro_batch)
        mine, self._prepared = self._prepared, None
        assert mine is not None
        fused = self.fused(mine, self.arrived(activations, micro_batch, mine.rows))
        self.note(micro_batch, fused.loss)
        if mine.flight is not None and fused.own is not None:
            self._put_off = (micro_batch, mine.flight, fused.own)
        return {p: cut.leave(fused.gradients[p], micro_batch, mine.rows) for p, cut in self.cuts.items()}

    def fused(
        self, mine: PreparedTargets, arrived: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> Fused:
        """Do forward and backward pass of the fuse model; gradients are added to its parameters, or to `weights`."""
        micro_batch, n_rows = mine.micro_batch, len(mine.rows)
        where = place(self.model.party, micro_batch)
        inputs = {party: CutInput(tensor) for party, tensor in arrived.items()}
        own = None if mine.flight is None else CutInput(mine.flight.activation.detach())
        hooks, entering = hooks_made(), inputs if own is None else {**inputs, self.model.party: own}
        entered = {party: each.enter() for party, each in entering.items()}
        with self.model.drawing("forward", micro_batch):
            output = self._fused(entered, where, weights)
            loss, value = self._loss(output, mine.labels, where)
        self._differentiate(loss * (n_rows / self.batches.rows_in_step(micro_batch.step)), hooks, micro_batch)
        return Fused(value, {p: each.gradient for p, each in inputs.items()}, None if own is None else own.gradient)

    def note(self, micro_batch: MicroBatch, loss: float) -> None:
        """Add the mean loss of a micro-batch to the step."""
        self._losses.append((self.batches.sizes(micro_batch.step)[micro_batch.index], loss))
        self._step = micro_batch.step

    def _differentiate(self, loss: Tensor, hooks: int, micro_batch: MicroBatch) -> None:
        """Do the backward pass from the loss to the activations; random draws in it are keyed by the micro-batch."""
        where = place(self.model.party, micro_batch)
        if not loss.requires_grad:
            raise ComputeError(
                f"{where}: the loss of {self.model.name} depends on no activation and on no parameter that is trained, "
                "so nothing can be learnt; check for detach(), no_grad() and argmax() in model and loss"
            )
        scope = self.model.differentiating(loss, hooks, micro_batch)
        with blame(f"{where}: the backward pass of {self.model.name} failed"), scope:
            torch.autograd.backward(loss)

    def update(self) -> float:
        """One optimizer step of fuse and own base; returns the step's loss, the mean over its rows."""
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
        self.keep(micro_batch, *self.scored(micro_batch, arrived))

    def held_out(self, micro_batch: MicroBatch) -> CutRows:
        """Return the held-out rows of a micro-batch."""
        return CutRows.of(self.table.row_keys, self.batches.holdout_part(micro_batch.index), held_out=True)

    def scored(
        self,
        micro_batch: MicroBatch,
        arrived: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None = None,
        own_weights: Mapping[str, Tensor] | None = None,
    ) -> tuple[float, Tensor]:
        """Return loss and output for held-out rows, with other weights if given."""
        where, inputs = f"{place(self.model.party, micro_batch)} (held-out rows)", dict(arrived)
        if self.own is not None:
            inputs[self.model.party] = self.own.prediction(micro_batch, own_weights)
        loss = self.objective.owned
        with self.model.evaluating(), loss.evaluating(), self.model.drawing("evaluate", micro_batch):
            output = self._fused(inputs, where, weights)
            _, value = self._loss(output, self._labels(self.batches.holdout_part(micro_batch.index)), where)
        return value, output

    def keep(self, micro_batch: MicroBatch, loss: float, output: Tensor) -> None:
        """Keep what was scored until `metrics`; the output only where something is measured of it."""
        positions = self.batches.holdout_part(micro_batch.index)
        labels = self._labels(positions).cpu()
        kept = (output.cpu(), labels) if self.objective.metrics else (output.new_empty(0), labels.new_empty(0))
        self._evaluated[micro_batch.index] = Evaluated(len(positions), loss, *kept)

    def metrics(self) -> Mapping[str, float | None]:
        """Loss and metrics over all rows evaluated since the last call; None where these rows do not define one."""
        parts = [self._evaluated[index] for index in sorted(self._evaluated)]
        if not parts:
            raise LocalProtocolError("metrics without an evaluation")
        self._evaluated.clear()
        found: dict[str, float | None] = {"loss": _mean([(part.rows, part.loss) for part in parts])}
        if self.objective.metrics:
            output, labels = torch.cat([p.output for p in parts]), torch.cat([p.labels for p in parts])
            found |= measured(self.objective, output, labels)
            if self.table.truth is not None:
                self.truly = measured(self.objective, output, self._true_labels(len(parts)))
        return found

    def _true_labels(self, parts: int) -> Tensor:
        """The labels of the first held-out micro-batches, in whose place the stage is given others."""
        assert self.table.truth is not None
        positions = [self.batches.holdout_part(index) for index in range(parts)]
        return label_tensor(self.table.truth[np.concatenate(positions)])

    def state(self) -> State:
        """Return a copy of everything that a step changes: fuse, own base, both optimizers, the loss."""
        if self._losses:
            raise LocalProtocolError("a checkpoint in the middle of a step")
        states = [self.model.state(), self.objective.owned.state()] + ([] if self.own is None else [self.own.state()])
        return State(
            {name: tensor for state in states for name, tensor in state.tensors.items()},
            {name: value for state in states for name, value in state.values.items()},
        )

    def load(self, state: State) -> None:
        """Become what `state` described."""
        self.model.load(state)
        self.objective.owned.load(state)
        if self.own is not None:
            self.own.load(state)
        self._losses.clear()
        self._evaluated.clear()
        for cut in self.cuts.values():
            cut.forget()
        self._put_off = self._prepared = None

    def weights(self) -> Weights:
        """Return the state_dict of the fuse model, and of the own base model if there is one."""
        return {**self.model.weights(), **({} if self.own is None else self.own.weights())}

    def _own_backward(self) -> None:
        """Do the backward pass of the own base model that was put off, if there is one."""
        if self._put_off is not None and self.own is not None:
            put_off, self._put_off = self._put_off, None
            self.own.differentiate(*put_off)

    def arrived(self, activations: Mapping[str, Payload], micro_batch: MicroBatch, rows: CutRows) -> dict[str, Tensor]:
        """Return the feature parties' activations in job order."""
        missing = [party for party in self.cuts if party not in activations]
        if missing:
            raise LocalProtocolError(f"{place(self.model.party, micro_batch)}: no activation of {', '.join(missing)}")
        return {party: cut.arrive(activations[party], micro_batch, rows) for party, cut in self.cuts.items()}

    def _fused(self, inputs: Mapping[str, Tensor], where: str, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the fuse model's output; inputs in job order, whatever order they came in."""
        with blame(f"{where}: aggregation {self.layers.aggregation!r} failed"):
            joined = aggregated([inputs[party] for party in self.layers.fused], self.layers.aggregation)
        return self.model.run(joined, where, weights)

    def _labels(self, positions: Positions) -> Tensor:
        return self.objective.labels[torch.from_numpy(positions)].to(self.model.device)

    def _loss(self, output: Tensor, labels: Tensor, where: str) -> tuple[Tensor, float]:
        with blame(f"{where}: the loss failed"):
            loss = self.objective.loss(output, labels)
            value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(f"{where}: the loss is {value}; {why_not_finite(output, self.model.name)}")
        return loss, value


def _mean(losses: Sequence[tuple[int, float]]) -> float:
    return sum(rows * loss for rows, loss in losses) / sum(rows for rows, _ in losses)


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
        return aggregated(inputs, layers.aggregation)

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
    cuts = {peer: _cut(layers, model, peer, (guards or {}).get(peer, UNGUARDED)) for peer in peers}
    return TorchFuseStage(layers, model, own, objective, table, batches, cuts)


def _require_rows_first(output: Tensor, model: Model) -> None:
    if output.shape[:1] != (_TRIAL_ROWS,):
        raise ShapeError(
            f"party {model.party!r}: {model.name} returns {described(output)} for {_TRIAL_ROWS} rows; "
            "its first axis must be the rows"
        )


def _cut(layers: LayersSpec, model: Model, peer: str, guard: Guard) -> FuseCut:
    dtypes = tuple(map(dtype_name, model.accepted()))
    return FuseCut(model.party, peer, layers.cut(peer) or (), dtypes, model.device, layers.wire, guard)

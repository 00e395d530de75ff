"""Forward and backward passes of the label holder's models, as functions of weights and inputs.

Nothing is remembered from one micro-batch to the next, so a hand computes them for its party as well as the party
itself does. Gradients are left at the parameters, or at the weights that were given in their place.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.flight import InFlight
from sl_queue.compute.model import Model
from sl_queue.compute.modules.graph import draws_nothing, hooks_made
from sl_queue.compute.objective import Objective, why_not_finite
from sl_queue.compute.running import aggregated, blame
from sl_queue.compute.spec import LayersSpec
from sl_queue.cut.guard import place
from sl_queue.cut.rows import CutRows
from sl_queue.cut.tensors import described
from sl_queue.errors import ComputeError, NonFiniteError, ShapeError
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches, Positions
from sl_queue.protocol.table import Table


@dataclass(frozen=True, slots=True)
class PreparedTargets:
    """The label holder's own share of a micro-batch: labels, and its base model's activation."""

    micro_batch: MicroBatch
    rows: CutRows
    labels: Tensor = field(repr=False)  # (rows,) or (rows, *anything)
    flight: InFlight | None = field(repr=False)  # of its base model


class CutInput:
    """An activation on its way into the fuse model's graph, and its gradient once the backward pass has been there.

    The gradient stays None if the loss does not depend on the activation. Mutable for that. Not a leaf of the graph,
    since models may change their inputs in place, as they may when joined; nor a copy, nor is its gradient one: that of
    the own base model keeps the layout that it has when joined, on which the last bit may depend.
    """

    def __init__(self, activation: Tensor, learning: bool = True) -> None:
        self._waiting, self._learning = [activation], learning
        self._form = (activation.shape, activation.dtype, activation.device)
        self.gradient: Tensor | None = None

    def enter(self) -> Tensor:
        """Return the activation as a tensor whose gradient will be kept here; once."""
        if not self._learning:
            return self._waiting.pop()
        anchor = torch.empty(0, requires_grad=True)
        entered: Tensor = _GradientTap.apply(anchor, self)  # type: ignore[no-untyped-call]
        return entered

    def overflow(self) -> Tensor | None:
        """Return a gradient that says that the step is to be left out; None where none is wanted."""
        shape, dtype, device = self._form
        return torch.full(shape, torch.nan, dtype=dtype, device=device) if self._learning else None


class _GradientTap(torch.autograd.Function):
    """Outputs a tensor that came from nowhere in this graph; keeps what the backward pass brings."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, entering: CutInput) -> Tensor:
        ctx.entered = entering
        ctx.set_materialize_grads(False)  # an operator of the fuse model may return None for it
        return entering._waiting.pop()  # not kept: the graph would hold itself

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None]:
        ctx.entered.gradient = gradient
        return None, None


draws_nothing(_GradientTap)


@dataclass(frozen=True, slots=True)
class GatheredInputs:
    """A micro-batch that is here in full."""

    targets: PreparedTargets
    inputs: Mapping[str, Sequence[CutInput]]  # each output of all parties with a base model


@dataclass(slots=True)
class FusePasses:
    """Passes of the fuse model, the label holder's own base model and the loss.

    Mutable for a memo alone: the amount of rows of the newest step.
    """

    layers: LayersSpec
    model: Model
    own: TorchBaseStage | None  # the label holder's base model
    objective: Objective
    table: Table
    batches: Batches
    _amounts: tuple[int, float] = (-1, 0.0)  # of the rows of a step

    def begun(self, micro_batch: MicroBatch, own_weights: Mapping[str, Tensor] | None = None) -> PreparedTargets:
        """Return what a micro-batch takes of this party alone, of the base model with other weights if given."""
        positions = self.batches.rows(micro_batch)
        rows = CutRows.of(self.table.row_keys, positions)
        flight = None if self.own is None else self.own.fused_in_place(micro_batch, positions, rows, own_weights)
        return PreparedTargets(micro_batch, rows, self.labels(positions), flight)

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

    def computed(
        self, parts: Sequence[GatheredInputs], weights: Mapping[str, Tensor] | None = None
    ) -> tuple[float, Tensor, Positions]:
        """Compute these micro-batches' rows, all at once; returns their mean loss, the output and the rows.

        Gradients are added to the parameters, or to `weights`, and are left at the inputs.
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
        share = amount / (self._amount_of_step(last.step) or 1.0)
        self._differentiate(loss * (share * self.model.loss_scale), hooks, first)
        return value, output, positions

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
            _, value = self._loss(output, self.labels(positions), positions, where)
        return value, output

    def _fused(
        self, inputs: Mapping[str, Sequence[Tensor]], where: str, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the fuse model's output; inputs in job order, whatever order they came in."""
        with blame(f"{where}: aggregation {self.layers.aggregation!r} failed"):
            joined = aggregated(inputs, self.layers)
        return self.model.run(joined, where, weights)

    def labels(self, positions: Positions) -> Tensor:
        """Return the labels of these rows."""
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
        if output.dim() == 0 or len(output) != len(positions):
            raise ShapeError(
                f"{where}: {self.model.name} puts out {described(output)} for {len(positions)} row(s); the first axis "
                "must be that of the rows, of one row as well: squeeze() without an axis takes it away"
            )
        with blame(f"{where}: the loss failed"):
            loss = self.objective.loss_of(output, labels, positions)
            value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(f"{where}: the loss is {value}; {why_not_finite(output, self.model.name)}")
        return loss, value


def _joined(positions: Sequence[Positions]) -> Positions:
    return positions[0] if len(positions) == 1 else np.concatenate(positions)

"""The same layers trained as one module in one process: what a split run must equal.

Plain PyTorch, and on purpose without the stages, payloads and pipeline of a split run. Only what defines the layers is
shared: how they are built, aggregated, seeded and measured.

The chain rule is applied in two halves, first to the activations and then to each base model, so that whatever draws
random numbers in a backward pass does so in its own part's scope.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sl_queue.compute.base_stage import base_stage
from sl_queue.compute.fuse_stage import fuse_stage
from sl_queue.compute.model import Model
from sl_queue.compute.objective import Objective, measured
from sl_queue.compute.precision import LossScale, computing, repeated, scaling_of
from sl_queue.compute.running import aggregated, called, is_penalised
from sl_queue.compute.spec import ComputeSpec, LayersSpec
from sl_queue.cut.tensors import take_rows
from sl_queue.errors import JobError
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches, Positions
from sl_queue.protocol.table import Table


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """Weights and history that joined training left."""

    history: list[dict[str, Any]]  # one dict an epoch: epoch, step, loss, holdout
    losses: list[float]  # one a step
    bases: Mapping[str, nn.Module] = field(repr=False)
    fuse: nn.Module = field(repr=False)


def train_joined(
    specs: Sequence[ComputeSpec], tables: Mapping[str, Table], batches: Batches, steps: int | None = None
) -> ReferenceRun:
    """Train all layers in this process for `steps` optimizer steps, or to the end of the job; staleness is ignored.

    `specs` and `tables` are those of all parties. Raises what building a stage raises.
    """
    whole = _Whole.build({spec.party: spec for spec in specs}, tables, batches)
    history: list[dict[str, Any]] = []
    losses: list[float] = []
    for step in range(batches.steps if steps is None else steps):
        parts = [MicroBatch(step, index) for index in range(batches.parts(step))]
        amount = sum(whole.objective.amount(batches.rows(micro_batch)) for micro_batch in parts) or 1.0
        if whole.layers.whole_batch:
            summed = whole.differentiate(parts, amount)
        else:
            summed = sum(whole.differentiate([micro_batch], amount) for micro_batch in parts)
        whole.update(step)
        losses.append(summed / amount)
        if batches.ends_epoch(step):
            epoch = batches.epoch_of(step)
            weights = [batches.rows_in_step(s) for s in range(step + 1 - batches.steps_per_epoch, step + 1)]
            mean = float(np.average(losses[-batches.steps_per_epoch :], weights=weights))
            history.append({"epoch": epoch, "step": step, "loss": mean, "holdout": whole.evaluate(step)})
    for model in whole.models:
        if model.learning is not None:
            model.learning.finish()
    bases = {party: model.module.eval() for party, model in whole.bases.items()}
    return ReferenceRun(history, losses, bases, whole.fuse.module.eval())


class _Cut:
    """An activation where its base model's graph ends and that of the fuse model begins. Mutable: it gets a gradient.

    `crosses`: its numbers are in C order on both sides, as in messages. Kernels may sum up a slice of a wider tensor in
    another order than a tensor of its own: the last bit would differ.
    """

    def __init__(self, activation: Tensor, device: torch.device, crosses: bool, learning: bool = True) -> None:
        self._activation, self._crosses = activation, crosses
        self.gradient: Tensor | None = None  # stays None if the loss does not depend on it
        leaf = activation.detach()
        self._leaf = leaf.contiguous().to(device) if crosses else leaf
        if learning:
            self._leaf.requires_grad_()
            self._leaf.register_hook(self._keep)  # type: ignore[no-untyped-call]

    def entered(self) -> Tensor:
        """Return a copy that models may change in place, laid out as the activation is."""
        if 0 in self._leaf.stride():
            return self._leaf.clone()
        empty = torch.empty_strided(
            self._leaf.size(), self._leaf.stride(), dtype=self._leaf.dtype, device=self._leaf.device
        )
        return empty.copy_(self._leaf)

    def end(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return the activation and its gradient, if the loss depends on it and there is anything to learn."""
        if self.gradient is None or not self._activation.requires_grad:
            return None
        return self._activation, self.gradient.contiguous().to(device) if self._crosses else self.gradient

    def _keep(self, gradient: Tensor | None) -> None:
        self.gradient = gradient


def _differentiate(cuts: Sequence[_Cut], base: Model, micro_batch: MicroBatch, *, keep: bool) -> None:
    """Do the backward pass of a base model from all of its outputs that the loss depends on."""
    ends = [end for cut in cuts if (end := cut.end(base.device)) is not None]
    if not ends:
        return
    outputs, gradients = [a for a, _ in ends], [g for _, g in ends]
    with base.drawing("backward", micro_batch):
        if base.scaling is None:
            torch.autograd.backward(outputs, gradients, retain_graph=keep)
            return

        def backward(factor: float) -> None:
            torch.autograd.backward(outputs, [g * factor for g in gradients], retain_graph=True)

        repeated(list(base.module.parameters()), backward, base.where)


@dataclass(frozen=True, slots=True)
class _Whole:
    """All layers as one function of the rows."""

    layers: LayersSpec
    bases: Mapping[str, Model]
    fuse: Model
    objective: Objective
    tables: Mapping[str, Table]
    batches: Batches
    scaling: LossScale | None  # of the loss, in fp16

    @classmethod
    def build(cls, specs: Mapping[str, ComputeSpec], tables: Mapping[str, Table], batches: Batches) -> "_Whole":
        """Return the layers with their initial weights, built as the parties build them."""
        if not specs:
            raise JobError("joined training needs every party's file and table; there are none")
        layers = next(iter(specs.values())).layers
        missing = [party for party in layers.parties if party not in specs or party not in tables]
        if missing:
            raise JobError(f"joined training needs every party's file and table; missing: {', '.join(missing)}")
        holder = layers.label_holder
        label = fuse_stage(specs[holder], tables[holder], batches)
        stages = {p: base_stage(specs[p], tables[p], batches) for p in layers.feature_parties}
        if label.own is not None:
            stages[holder] = label.own
        bases = {party: stage.model for party, stage in stages.items()}
        taken = {party: replace(tables[party], features=stage.features) for party, stage in stages.items()}
        scaling = scaling_of(layers.precision)
        return cls(layers, bases, label.model, label.objective, {**tables, **taken}, batches, scaling)

    @property
    def models(self) -> list[Model]:
        return [*self.bases.values(), self.fuse]

    def update(self, step: int) -> None:
        """Make one optimizer step with the gradients that are there, or leave it out after an overflow."""
        parameters = [parameter for model in self.models for parameter in model.module.parameters()]
        if self.scaling is not None:
            self.scaling.see(parameter.grad for parameter in self.fuse.module.parameters())
            if not self.scaling.finish(parameters, "joined training"):
                return
        for model in self.models:
            if model.learning is not None:
                with model.drawing("update", MicroBatch(step, 0)):
                    model.learning.step(step)
                model.learning.built.optimizer.zero_grad()

    def differentiate(self, parts: Sequence[MicroBatch], amount_in_step: float) -> float:
        """Add the gradients of micro-batches that are fused at once, and return the loss summed over their rows."""
        rows = np.concatenate([self.batches.rows(micro_batch) for micro_batch in parts])
        penalties: list[dict[str, Tensor]] = [{} for _ in parts]
        cuts = [
            {
                party: [self._cut(party, output) for output in outputs]
                for party, outputs in self.activations(self.batches.rows(part), "forward", part, own).items()
            }
            for part, own in zip(parts, penalties, strict=True)
        ]
        entered = [{party: [cut.entered() for cut in of] for party, of in each.items()} for each in cuts]
        inputs = entered[0]
        if len(parts) > 1:
            inputs = {p: [torch.cat(of) for of in zip(*(each[p] for each in entered), strict=True)] for p in inputs}
        loss, _ = self.loss(inputs, rows, "forward", parts[0])
        scale = 1.0 if self.scaling is None else self.scaling.scale
        with self.fuse.drawing("backward", parts[0]):
            (loss * (self.objective.amount(rows) / amount_in_step * scale)).backward()  # type: ignore[no-untyped-call]
        if self.scaling is not None and not self.scaling.see(
            cut.gradient for each in cuts for of in each.values() for cut in of
        ):
            return loss.item() * self.objective.amount(rows)  # nobody learns of this step
        for part, each, own in zip(parts, cuts, penalties, strict=True):
            share = len(self.batches.rows(part)) / self.batches.rows_in_step(part.step) * scale
            for party, of in each.items():
                _differentiate(of, self.bases[party], part, keep=party in own)
                if party in own:
                    with self.bases[party].drawing("backward", part):
                        (own[party] * share).backward()  # type: ignore[no-untyped-call]
        return loss.item() * self.objective.amount(rows)

    def _cut(self, party: str, output: Tensor) -> _Cut:
        learning = output.requires_grad or party not in self.layers.outputs
        return _Cut(output, self.fuse.device, party != self.layers.label_holder, learning)

    def activations(
        self, rows: Positions, purpose: str, micro_batch: MicroBatch, penalties: dict[str, Tensor] | None = None
    ) -> dict[str, list[Tensor]]:
        """Return the outputs of all base models for these rows, in job order; their own losses go into `penalties`."""
        found = {}
        for party in self.layers.fused:
            base, features = self.bases[party], self.tables[party].features
            assert features is not None
            with base.drawing(purpose, micro_batch), computing(self.layers.precision, base.device):
                output = called(base.module, take_rows(features, rows, base.dtype, base.device))
            penalised = is_penalised(output, base.outputs)
            if penalised and penalties is not None:
                penalties[party] = output[1]
            output = output[0] if penalised else output
            found[party] = [output] if base.outputs is None else base.outputs.listed(output, len(rows), party)
        return found

    def loss(
        self, activations: Mapping[str, Sequence[Tensor]], rows: Positions, purpose: str, micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss over these rows, and the output."""
        labels = self.objective.labels[torch.from_numpy(rows)].to(self.fuse.device)
        with self.fuse.drawing(purpose, micro_batch):
            with computing(self.layers.precision, self.fuse.device):
                output = self.fuse.module(aggregated(activations, self.layers))
            if self.layers.precision is not None:
                output = output.to(self.fuse.dtype)
            return self.objective.loss_of(output, labels, rows), output

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float | None] | None:
        """Return loss and metrics of the held-out rows, None if there are none."""
        if not self.batches.holdout_rows:
            return None
        parts = [self.batches.holdout_part(index) for index in range(self.batches.holdout_parts)]
        with ExitStack() as modes:
            for scope in (*(model.evaluating() for model in self.models), self.objective.owned.evaluating()):
                modes.enter_context(scope)
            found = [self._evaluated(rows, MicroBatch(step, index)) for index, rows in enumerate(parts)]
        amounts = [self.objective.amount(rows) for rows in parts]
        summed = sum(amount * loss.item() for amount, (loss, _) in zip(amounts, found, strict=True))
        outputs, everywhere = torch.cat([output for _, output in found]).cpu(), np.concatenate(parts)
        labels = self.objective.labels[torch.from_numpy(everywhere)]
        return {"loss": summed / (sum(amounts) or 1.0), **measured(self.objective, outputs, labels, everywhere)}

    def _evaluated(self, rows: Positions, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        found = self.activations(rows, "evaluate", micro_batch)
        mine = self.layers.label_holder
        activations = {
            party: of if party == mine else [output.contiguous().to(self.fuse.device) for output in of]
            for party, of in found.items()
        }
        return self.loss(activations, rows, "evaluate", micro_batch)

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

from sl_queue.compute.aggregation import aggregated
from sl_queue.compute.base_stage import base_stage
from sl_queue.compute.fuse_stage import fuse_stage
from sl_queue.compute.model import Model
from sl_queue.compute.objective import Objective, measured
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
        n_rows = batches.rows_in_step(step)
        summed = 0.0
        for index in range(batches.parts(step)):
            summed += whole.differentiate(MicroBatch(step, index), n_rows)
        for model in whole.models:
            if model.learning is not None:
                with model.drawing("update", MicroBatch(step, 0)):
                    model.learning.step(step)
                model.learning.built.optimizer.zero_grad()
        losses.append(summed / n_rows)
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

    def __init__(self, activation: Tensor, device: torch.device, crosses: bool) -> None:
        self._activation, self._crosses = activation, crosses
        self.gradient: Tensor | None = None  # stays None if the loss does not depend on it
        leaf = activation.detach()
        self._leaf = leaf.contiguous().to(device) if crosses else leaf
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

    def differentiate(self, base: Model, micro_batch: MicroBatch) -> None:
        """Do the backward pass of the base model, if the loss depends on it and it has anything to learn."""
        if self.gradient is None or not self._activation.requires_grad:
            return
        gradient = self.gradient.contiguous().to(base.device) if self._crosses else self.gradient
        with base.drawing("backward", micro_batch):
            self._activation.backward(gradient)  # type: ignore[no-untyped-call]

    def _keep(self, gradient: Tensor | None) -> None:
        self.gradient = gradient


@dataclass(frozen=True, slots=True)
class _Whole:
    """All layers as one function of the rows."""

    layers: LayersSpec
    bases: Mapping[str, Model]
    fuse: Model
    objective: Objective
    tables: Mapping[str, Table]
    batches: Batches

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
        return cls(layers, bases, label.model, label.objective, {**tables, **taken}, batches)

    @property
    def models(self) -> list[Model]:
        return [*self.bases.values(), self.fuse]

    def differentiate(self, micro_batch: MicroBatch, rows_in_step: int) -> float:
        """Add a micro-batch's gradients to those of its step, and return the loss summed over its rows."""
        rows = self.batches.rows(micro_batch)
        cuts = {
            party: _Cut(activation, self.fuse.device, crosses=party != self.layers.label_holder)
            for party, activation in self.activations(rows, "forward", micro_batch).items()
        }
        loss, _ = self.loss([cut.entered() for cut in cuts.values()], rows, "forward", micro_batch)
        with self.fuse.drawing("backward", micro_batch):
            (loss * (len(rows) / rows_in_step)).backward()  # type: ignore[no-untyped-call]
        for party, cut in cuts.items():
            cut.differentiate(self.bases[party], micro_batch)
        return loss.item() * len(rows)

    def activations(self, rows: Positions, purpose: str, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Return the outputs of all base models for these rows, in job order."""
        found = {}
        for party in self.layers.fused:
            base, features = self.bases[party], self.tables[party].features
            assert features is not None
            with base.drawing(purpose, micro_batch):
                found[party] = base.module(take_rows(features, rows, base.dtype, base.device))
        return found

    def loss(
        self, activations: list[Tensor], rows: Positions, purpose: str, micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss over these rows, and the output."""
        labels = self.objective.labels[torch.from_numpy(rows)].to(self.fuse.device)
        with self.fuse.drawing(purpose, micro_batch):
            output = self.fuse.module(aggregated(activations, self.layers.aggregation))
            return self.objective.loss(output, labels), output

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float | None] | None:
        """Loss and metrics of the held-out rows, None if there are none."""
        if not self.batches.holdout_rows:
            return None
        parts = [self.batches.holdout_part(index) for index in range(self.batches.holdout_parts)]
        with ExitStack() as modes:
            for scope in (*(model.evaluating() for model in self.models), self.objective.owned.evaluating()):
                modes.enter_context(scope)
            found = [self._evaluated(rows, MicroBatch(step, index)) for index, rows in enumerate(parts)]
        summed = sum(len(rows) * loss.item() for rows, (loss, _) in zip(parts, found, strict=True))
        outputs = torch.cat([output for _, output in found]).cpu()
        labels = self.objective.labels[torch.from_numpy(np.concatenate(parts))]
        return {"loss": summed / self.batches.holdout_rows, **measured(self.objective, outputs, labels)}

    def _evaluated(self, rows: Positions, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        found = self.activations(rows, "evaluate", micro_batch)
        mine = self.layers.label_holder
        activations = [a if party == mine else a.contiguous().to(self.fuse.device) for party, a in found.items()]
        return self.loss(activations, rows, "evaluate", micro_batch)

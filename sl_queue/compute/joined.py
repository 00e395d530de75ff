"""The same layers trained as one module in one process: what a split run must equal.

Plain PyTorch, and on purpose without the stages, payloads and pipeline of a split run. Only what defines the layers is
shared: how they are built, aggregated, seeded and measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sl_queue.compute.aggregation import aggregated
from sl_queue.compute.base import base_stage
from sl_queue.compute.fuse import Objective, fuse_stage, measured
from sl_queue.compute.models import Model
from sl_queue.compute.tensors import gathered
from sl_queue.errors import JobError
from sl_queue.job import Job, PartyFile
from sl_queue.ports import Table
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.row_order import Batches, Positions


@dataclass(frozen=True, slots=True)
class Joined:
    """What joined training left."""

    history: list[dict[str, Any]]  # one dict an epoch: epoch, step, loss, holdout
    losses: list[float]  # one a step
    bases: Mapping[str, nn.Module] = field(repr=False)
    fuse: nn.Module = field(repr=False)


def train_joined(
    job: Job, party_files: Sequence[PartyFile], tables: Mapping[str, Table], batches: Batches, steps: int | None = None
) -> Joined:
    """Train all layers in this process for `steps` optimizer steps, or to the end of the job; staleness is ignored.

    `party_files` and `tables` are those of all parties. Raises what building a stage raises.
    """
    whole = _Whole.build(job, {file.party: file for file in party_files}, tables, batches)
    history: list[dict[str, Any]] = []
    losses: list[float] = []
    for step in range(batches.steps if steps is None else steps):
        n_rows = batches.rows_in_step(step)
        summed = 0.0
        for index in range(batches.parts(step)):
            micro_batch = MicroBatch(step, index)
            rows = batches.rows(micro_batch)
            loss, _ = whole.loss(rows, "forward", micro_batch)
            (loss * (len(rows) / n_rows)).backward()  # type: ignore[no-untyped-call]
            summed += loss.item() * len(rows)
        for model in whole.models:
            if model.optimizer is not None:
                model.optimizer.step()
                model.optimizer.zero_grad()
        losses.append(summed / n_rows)
        if batches.ends_epoch(step):
            epoch = batches.epoch_of(step)
            weights = [batches.rows_in_step(s) for s in range(step + 1 - batches.steps_per_epoch, step + 1)]
            mean = float(np.average(losses[-batches.steps_per_epoch :], weights=weights))
            history.append({"epoch": epoch, "step": step, "loss": mean, "holdout": whole.evaluate(step)})
    bases = {party: model.module.eval() for party, model in whole.bases.items()}
    return Joined(history, losses, bases, whole.fuse.module.eval())


@dataclass(frozen=True, slots=True)
class _Whole:
    """All layers as one function of the rows."""

    job: Job
    bases: Mapping[str, Model]
    fuse: Model
    objective: Objective
    tables: Mapping[str, Table]
    batches: Batches

    @classmethod
    def build(cls, job: Job, files: Mapping[str, PartyFile], tables: Mapping[str, Table], batches: Batches) -> "_Whole":
        """The layers with their initial weights, built as the parties build them."""
        missing = [party for party in job.parties if party not in files or party not in tables]
        if missing:
            raise JobError(f"joined training needs every party's file and table; missing: {', '.join(missing)}")
        holder = job.label_holder
        label = fuse_stage(job, files[holder], tables[holder], batches)
        stages = {p: base_stage(job, files[p], tables[p], batches) for p in job.feature_parties}
        if label.own is not None:
            stages[holder] = label.own
        bases = {party: stage.model for party, stage in stages.items()}
        taken = {party: replace(tables[party], features=stage.features) for party, stage in stages.items()}
        return cls(job, bases, label.model, label.objective, {**tables, **taken}, batches)

    @property
    def models(self) -> list[Model]:
        return [*self.bases.values(), self.fuse]

    def loss(self, rows: Positions, purpose: str, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The mean loss over these rows, and the output."""
        activations = []
        for party in self.job.fused:
            base, features = self.bases[party], self.tables[party].features
            assert features is not None
            with base.drawing(purpose, micro_batch):
                activation = base.module(gathered(features, rows, base.dtype, base.device))
            activations.append(activation if party == self.job.label_holder else _across(activation, self.fuse.device))
        labels = self.objective.labels[torch.from_numpy(rows)].to(self.fuse.device)
        with self.fuse.drawing(purpose, micro_batch):
            output = self.fuse.module(aggregated(activations, self.job.fuse.aggregation))
            return self.objective.loss(output, labels), output

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float | None] | None:
        """Loss and metrics of the held-out rows, None if there are none."""
        if not self.batches.holdout_rows:
            return None
        for model in self.models:
            model.module.eval()
        parts = [self.batches.holdout_part(index) for index in range(self.batches.holdout_parts)]
        found = [self.loss(rows, "evaluate", MicroBatch(step, index)) for index, rows in enumerate(parts)]
        summed = sum(len(rows) * loss.item() for rows, (loss, _) in zip(parts, found, strict=True))
        for model in self.models:
            model.module.train()
        outputs = torch.cat([output for _, output in found]).cpu()
        labels = self.objective.labels[torch.from_numpy(np.concatenate(parts))]
        return {"loss": summed / self.batches.holdout_rows, **measured(self.objective, outputs, labels)}


def _across(activation: Tensor, device: torch.device) -> Tensor:
    """The same numbers on the other side of the cut, in C order both ways, as messages are.

    Kernels may sum up a slice of a wider tensor in another order than a tensor of its own: the last bit would differ.
    """
    if activation.requires_grad:
        activation.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
    return activation.contiguous().to(device)

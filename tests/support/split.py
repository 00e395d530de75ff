"""Stages driven by the pipeline's actions in one loop, without a channel: a whole split run in one thread."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.schedule.actions import Backward, Commit, Forward, Fuse, Predict, Prepare, Score, Update
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.table import Table
from tests.support.resolved import base_stage, fuse_stage

SGD = {"name": "sgd", "lr": 0.1}


def table_of(features: npt.NDArray[Any] | None, labels: npt.NDArray[Any] | None = None) -> Table:
    """Return a table whose row i has the key i."""
    n_rows = len(features if features is not None else labels)  # type: ignore[arg-type]
    return Table(features, labels, np.arange(n_rows, dtype=np.uint64), "digest", "integer")


@dataclass(slots=True)
class Parties:
    """Everything that a split run is made of: what each party holds and has agreed to."""

    job: Job
    files: dict[str, PartyFile]
    tables: dict[str, Table]
    given: dict[str, Any]  # base models by party, the fuse model under "fuse"

    @property
    def n_rows(self) -> int:
        return self.tables[self.job.label_holder].n_rows

    @property
    def pipeline(self) -> Pipeline:
        return self.job.pipeline_of(self.job.batches(self.n_rows))

    def stages(self) -> "Stages":
        batches = self.job.batches(self.n_rows)
        holder = self.job.label_holder
        return Stages(
            {p: base_stage(self.job, self.files[p], self.tables[p], batches) for p in self.job.feature_parties},
            fuse_stage(self.job, self.files[holder], self.tables[holder], batches),
        )


@dataclass(slots=True)
class Stages:
    """All stages of a run, and what was measured and is under way between them."""

    bases: dict[str, TorchBaseStage]
    fuse: TorchFuseStage
    losses: list[float] = field(default_factory=list)
    evaluations: list[Mapping[str, float | None]] = field(default_factory=list)
    under_way: dict[tuple[str, str, MicroBatch], Payload] = field(default_factory=dict)

    def train(self, pipeline: Pipeline, first_step: int = 0, stop_after: int | None = None) -> "Stages":
        """From `first_step` to the end, or to the commit of step `stop_after`."""
        roles = [self._feature(party, pipeline, first_step, stop_after) for party in self.bases]
        roles.append(self._label(pipeline, first_step, stop_after))
        while roles:
            roles = [role for role in roles if next(role, None) is not None]
        return self

    def modules(self) -> dict[str, Any]:
        """Return base models by party, the fuse model under "fuse"."""
        found: dict[str, Any] = {"fuse": self.fuse.model.module}
        found |= {party: stage.module for party, stage in self.bases.items()}
        if self.fuse.own is not None:
            found[self.fuse.own.model.party] = self.fuse.own.module
        return found

    def _feature(self, party: str, pipeline: Pipeline, first: int, stop_after: int | None) -> Iterator[str]:
        stage = self.bases[party]
        for action in pipeline.feature_actions(first):
            match action:
                case Prepare(micro_batch):
                    stage.prepare(micro_batch)
                case Forward(micro_batch):
                    self.under_way["activation", party, micro_batch] = stage.forward(micro_batch)
                case Backward(micro_batch):
                    key = ("gradient", party, micro_batch)
                    while key not in self.under_way:
                        yield f"{party} waits for {micro_batch}"
                    stage.backward(micro_batch, self.under_way.pop(key))
                case Update():
                    stage.update()
                case Predict(micro_batch):
                    self.under_way["holdout", party, micro_batch] = stage.predict(micro_batch)
                case Commit(step) if step == stop_after:
                    return

    def _label(self, pipeline: Pipeline, first: int, stop_after: int | None) -> Iterator[str]:
        for action in pipeline.label_actions(first):
            match action:
                case Prepare(micro_batch):
                    self.fuse.prepare(micro_batch)
                case Fuse(micro_batch):
                    keys = [("activation", party, micro_batch) for party in self.bases]
                    while not all(key in self.under_way for key in keys):
                        yield f"label holder waits for {micro_batch}"
                    activations = {key[1]: self.under_way.pop(key) for key in reversed(keys)}  # in any order
                    gradients = self.fuse.forward_backward(micro_batch, activations)
                    for answered, found in (*self.fuse.late_gradients(), (micro_batch, gradients)):
                        self.under_way |= {("gradient", party, answered): g for party, g in found.items()}
                case Update():
                    self.losses.append(self.fuse.update())
                case Score(micro_batch):
                    keys = [("holdout", party, micro_batch) for party in self.bases]
                    while not all(key in self.under_way for key in keys):
                        yield f"label holder waits for held-out {micro_batch}"
                    self.fuse.evaluate(micro_batch, {key[1]: self.under_way.pop(key) for key in keys})
                case Commit(step):
                    if pipeline.batches.ends_epoch(step) and pipeline.batches.holdout_rows:
                        self.evaluations.append(self.fuse.metrics())
                    if step == stop_after:
                        return


def parties(
    bases: Mapping[str, Any],
    fuse: Any,
    features: Mapping[str, npt.NDArray[Any]],
    labels: npt.NDArray[Any],
    *,
    cuts: Mapping[str, list[int]],
    label_holder: str = "holder",
    optimizer: Mapping[str, Any] = SGD,
    loss: Any = "bce_with_logits",
    metrics: list[str] | None = None,
    aggregation: str = "list",
    **job: Any,
) -> Parties:
    """Job, party files and tables from modules and arrays, by party; `label_holder` may be one with a base model."""
    roles: dict[str, Any] = {p: {"role": "label" if p == label_holder else "feature", "cut": cuts[p]} for p in bases}
    roles.setdefault(label_holder, {"role": "label"})
    settings: dict[str, Any] = {"name": "test", "seed": 7, "epochs": 2, "batch_size": 12} | job
    files, tables = {}, {}
    for party in roles:
        own = features.get(party)
        tables[party] = table_of(own, labels if party == label_holder else None)
        parts: dict[str, Any] = {}
        if party in bases:
            parts["base"] = {"model": bases[party], "optimizer": dict(optimizer)}
        if party == label_holder:
            parts["fuse"] = {"model": fuse, "optimizer": dict(optimizer), "loss": loss, "metrics": metrics or []}
        data = Rows(np.arange(len(labels)), own, tables[party].labels)
        files[party] = PartyFile(party=party, data=data, **parts)
    settings |= {"parties": roles, "fuse": {"aggregation": aggregation}}
    return Parties(Job(**settings), files, tables, {**bases, "fuse": fuse})


class Concatenated(nn.Module):
    """The fuse model of tutorials: joins a list of activations, then one linear layer."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        joined = torch.cat([x.flatten(1) for x in inputs], dim=1)
        return self.linear(joined)  # type: ignore[no-any-return]


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Return True if two modules hold the same bits."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in mine)


def furthest(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference between the weights of two modules."""
    mine, theirs = one.state_dict(), other.state_dict()
    return max((float((mine[n].cpu().double() - theirs[n].cpu().double()).abs().max()) for n in mine), default=0.0)

"""Stages that predict, built from the weights of a version."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from sl_queue.compute.answering import AnsweringFuse
from sl_queue.compute.base_stage import TorchBaseStage, base_stage
from sl_queue.compute.final_weights import settled
from sl_queue.compute.fuse_stage import fuse_cut, fuse_stage
from sl_queue.compute.model import Model
from sl_queue.compute.modules.snapshots import left_no_trace
from sl_queue.compute.objective import Objective
from sl_queue.compute.predicting import Pieces, PredictingBase, PredictingFuse
from sl_queue.compute.spec import ComputeSpec, LayersSpec
from sl_queue.compute.stand_ins import drawn_inputs, fused
from sl_queue.cut.crossing import require_shape
from sl_queue.cut.guard import UNGUARDED, Guard
from sl_queue.cut.tensors import Inputs
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table

_TRIAL_ROWS = 2
_SINGLE = "a trial with a single row"


def predicting_base(
    spec: ComputeSpec, table: Table, batches: Batches, weights: Path, guard: Guard = UNGUARDED
) -> PredictingBase:
    """Build a party's base model with trained weights. Raises JobError, CheckpointError, ShapeError."""
    stage = base_stage(spec, table, batches, guard=guard)
    return _predicting(stage, batches, weights)


def _predicting(stage: TorchBaseStage, batches: Batches, weights: Path) -> PredictingBase:
    settled(stage.model.module, stage.model.party, weights).to(stage.model.device)
    if _has_single(batches):
        require_row_kept(stage)
    return PredictingBase(stage, batches)


def predicting_fuse(
    spec: ComputeSpec,
    table: Table,
    batches: Batches,
    weights: Mapping[str, Path],
    pieces: Pieces,
    guards: Mapping[str, Guard],
) -> PredictingFuse:
    """Build the label holder's models with trained weights, by part; the table needs no labels."""
    own = predicting_base(spec, table, batches, weights["base"]) if spec.party in spec.layers.cuts else None
    return _fuse(spec, fuse_model(spec), own, table, batches, weights, pieces, guards)


def evaluating_fuse(
    spec: ComputeSpec,
    table: Table,
    batches: Batches,
    weights: Mapping[str, Path],
    pieces: Pieces,
    guards: Mapping[str, Guard],
) -> tuple[PredictingFuse, Objective]:
    """As `predicting_fuse`, with the loss and the metrics against the labels of the table."""
    stage = fuse_stage(spec, table, batches, guards=guards)
    own = None
    if stage.own is not None:
        own = _predicting(stage.own, batches, weights["base"])
    return _fuse(spec, stage.model, own, table, batches, weights, pieces, guards), stage.objective


def fuse_model(spec: ComputeSpec) -> Model:
    """Build the fuse model; lazy layers are given their shapes by drawn activations."""
    layers = spec.layers

    def sample(dtype: torch.dtype) -> Inputs:
        return fused(layers, drawn_inputs(layers, _TRIAL_ROWS, dtype))

    return Model.build(spec, "fuse", sample)


def _fuse(
    spec: ComputeSpec,
    model: Model,
    own: PredictingBase | None,
    table: Table,
    batches: Batches,
    weights: Mapping[str, Path],
    pieces: Pieces,
    guards: Mapping[str, Guard],
) -> PredictingFuse:
    layers = spec.layers
    settled(model.module, spec.party, weights["fuse"]).to(model.device)
    if _has_single(batches):
        require_output_kept(model, layers)
    cuts = {p: fuse_cut(layers, model, p, guards.get(p, UNGUARDED)) for p in layers.feature_parties}
    return PredictingFuse(model, own, table.row_keys, batches, cuts, layers, pieces)


def trained_fuse(spec: ComputeSpec, model: Model, weights: Path) -> AnsweringFuse:
    """Give a fuse model its trained weights, to answer single requests with. Raises ComputeError."""
    layers = spec.layers
    settled(model.module, spec.party, weights).to(model.device)
    require_output_kept(model, layers)
    cuts = {party: fuse_cut(layers, model, party, UNGUARDED) for party in layers.feature_parties}
    return AnsweringFuse(model, cuts, layers)


def require_row_kept(stage: TorchBaseStage) -> None:
    """Raise ComputeError unless a base model gives a single row's activation, which training may never have tried."""
    where = f"party {stage.model.party!r}, {_SINGLE}"
    with _trying(stage.model):
        require_shape(stage.model.run(stage.inputs(np.arange(1)), where), 1, stage.cut, where)


def require_output_kept(model: Model, layers: LayersSpec) -> None:
    """Raise ComputeError unless a fuse model gives a single row's output."""
    inputs = fused(layers, drawn_inputs(layers, 1, model.dtype, model.device))
    with _trying(model):
        model.run_on(inputs, 1, f"party {model.party!r}, {_SINGLE}")


@contextmanager
def _trying(model: Model) -> Iterator[None]:
    """Evaluate, and leave no trace."""
    with left_no_trace(model.module), model.evaluating(), model.drawing("trial", MicroBatch(0, 0)):
        yield


def _has_single(batches: Batches) -> bool:
    """Return True if a micro-batch of the rows to predict is a single row."""
    return 1 in batches.sizes(batches.last_step(0))

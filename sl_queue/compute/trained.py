"""Stages that predict, built from the weights of a version."""

from collections.abc import Mapping
from pathlib import Path

import torch

from sl_queue.compute.answering import AnsweringFuse
from sl_queue.compute.base_stage import base_stage
from sl_queue.compute.final_weights import settled
from sl_queue.compute.fuse_stage import fuse_cut, fuse_stage
from sl_queue.compute.model import Model
from sl_queue.compute.objective import Objective
from sl_queue.compute.predicting import Pieces, PredictingBase, PredictingFuse
from sl_queue.compute.spec import ComputeSpec
from sl_queue.compute.stand_ins import drawn_inputs, fused
from sl_queue.cut.guard import UNGUARDED, Guard
from sl_queue.cut.tensors import Inputs
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table

_TRIAL_ROWS = 2


def predicting_base(
    spec: ComputeSpec, table: Table, batches: Batches, weights: Path, guard: Guard = UNGUARDED
) -> PredictingBase:
    """Build a party's base model with trained weights. Raises JobError, CheckpointError, ShapeError."""
    stage = base_stage(spec, table, batches, guard=guard)
    settled(stage.model.module, spec.party, weights).to(stage.model.device)
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
        settled(stage.own.model.module, spec.party, weights["base"]).to(stage.own.model.device)
        own = PredictingBase(stage.own, batches)
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
    cuts = {p: fuse_cut(layers, model, p, guards.get(p, UNGUARDED)) for p in layers.feature_parties}
    return PredictingFuse(model, own, table.row_keys, batches, cuts, layers, pieces)


def trained_fuse(spec: ComputeSpec, model: Model, weights: Path) -> AnsweringFuse:
    """Give a fuse model its trained weights, to answer single requests with."""
    layers = spec.layers
    settled(model.module, spec.party, weights).to(model.device)
    cuts = {party: fuse_cut(layers, model, party, UNGUARDED) for party in layers.feature_parties}
    return AnsweringFuse(model, cuts, layers)

"""Stages, tables and fingerprints straight from a job and party files, for tests that build those in code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sl_queue.compute import base_stage as bases
from sl_queue.compute import building, equality, reference
from sl_queue.compute import fingerprint as fingerprints
from sl_queue.compute import fuse_stage as fuses
from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.spec import ComputeSpec
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import compute_spec
from sl_queue.config.user_code import Importer
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table
from tests.support.tables import read_table

__all__ = [
    "base_stage",
    "computes",
    "final_module",
    "fingerprint",
    "first_step_difference",
    "fuse_stage",
    "read_table",
    "split_weights",
    "train_joined",
]


def computes(job: Job, files: Sequence[PartyFile]) -> list[ComputeSpec]:
    """Resolve what the parties compute."""
    importer = Importer()
    return [compute_spec(job, file, importer) for file in files]


def base_stage(job: Job, file: PartyFile, table: Table, batches: Batches, **more: Any) -> TorchBaseStage:
    """Build a base stage."""
    return bases.base_stage(computes(job, [file])[0], table, batches, **more)


def fuse_stage(job: Job, file: PartyFile, table: Table, batches: Batches, **more: Any) -> TorchFuseStage:
    """Build the label holder's stage."""
    return fuses.fuse_stage(computes(job, [file])[0], table, batches, **more)


def fingerprint(job: Job, file: PartyFile, table: Table | None = None) -> dict[str, Any]:
    """Collect the fingerprint of a party."""
    return fingerprints.fingerprint(computes(job, [file])[0], table)


def final_module(job: Job, file: PartyFile, path: Path) -> nn.Module:
    """Load a trained module."""
    return building.final_module(computes(job, [file])[0], path)


def train_joined(
    job: Job, files: Sequence[PartyFile], tables: Mapping[str, Table], batches: Batches, steps: int | None = None
) -> reference.ReferenceRun:
    """Train all layers in one process."""
    return reference.train_joined(computes(job, files), tables, batches, steps)


def split_weights(
    job: Job, files: Sequence[PartyFile], tables: Mapping[str, Table], batches: Batches
) -> equality.Weights:
    """Return the weights after the first steps, split."""
    return equality.split_weights(computes(job, files), tables, job.pipeline_of(batches))


def first_step_difference(
    job: Job, files: Sequence[PartyFile], tables: Mapping[str, Table], batches: Batches, **changes: Any
) -> float:
    """Return the largest difference of any weight after the first steps, split and joined."""
    return equality.first_step_difference(computes(job, files), tables, job.pipeline_of(batches), **changes)

"""A party's trained parts, exported: its base model on its own rows, the fuse model on drawn activations."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from sl_queue.compute.export import EXPORT_ROWS, SUFFIX, Exported, Target, export_base, export_fuse
from sl_queue.compute.final_weights import settled
from sl_queue.compute.trained import fuse_model, predicting_base
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import PartySpec, resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.to_predict import read_to_predict
from sl_queue.launch.asked import Asked
from sl_queue.launch.prediction import spec_to_predict
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.storage.versions import Version, choose_version


def export_party(
    job: Job, party_file: PartyFile, state: Path, target: Target, run: str | None, out: Path | None
) -> Iterator[Exported]:
    """Export the parts of a version one by one. Raises JobError, CheckpointError, ComputeError."""
    spec, version = resolve(job, party_file, Importer()), choose_version(state, run)
    folder = out or version.path
    folder.mkdir(parents=True, exist_ok=True)
    if spec.compute.base is not None:
        yield _base(spec, version, target, folder / f"base{SUFFIX[target]}")
    if spec.compute.fuse is not None:
        yield _fuse(spec, version, target, folder / f"fuse{SUFFIX[target]}")


def _base(spec: PartySpec, version: Version, target: Target, path: Path) -> Exported:
    of_training = spec_to_predict(spec, None, Asked(held_out=True)).table
    of_training = replace(of_training, labels=False, holdout_seed=None)
    table = read_to_predict(of_training, None, version.recipe, version.columns, whole=version.whole).table
    n_rows = min(EXPORT_ROWS, table.n_rows)
    batches = Batches(table.n_rows, spec.compute.layers.seed, 1, n_rows, 1, shuffle=False)
    stage = predicting_base(spec.compute, table, batches, version.weights("base")).stage
    return export_base(stage.model.module, stage.inputs(np.arange(n_rows)), target, path)


def _fuse(spec: PartySpec, version: Version, target: Target, path: Path) -> Exported:
    model = fuse_model(spec.compute)
    module = settled(model.module, spec.party, version.weights("fuse"))
    return export_fuse(module, spec.compute.layers, model.dtype, target, path)

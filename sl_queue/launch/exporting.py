"""A party's trained parts, exported: its base model on its own rows, the fuse model on drawn activations."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sl_queue.compute.export import SUFFIX, ByName, ByParty, Exported, Target, export_part, named_inputs
from sl_queue.compute.final_weights import settled
from sl_queue.compute.spec import LayersSpec
from sl_queue.compute.stand_ins import drawn_inputs
from sl_queue.compute.trained import fuse_model, predicting_base
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import PartySpec, resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.table import read_table
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.storage.versions import Version, choose_version

_ROWS = 64  # compared


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
    table = read_table(spec.table)
    n_rows = min(_ROWS, table.n_rows)
    batches = Batches(table.n_rows, spec.compute.layers.seed, 1, n_rows, 1, shuffle=False)
    stage = predicting_base(spec.compute, table, batches, version.weights("base")).stage
    inputs = named_inputs(stage.inputs(np.arange(n_rows)))
    return export_part(ByName(stage.model.module.cpu(), tuple(inputs)), inputs, target, path)


def _fuse(spec: PartySpec, version: Version, target: Target, path: Path) -> Exported:
    layers, model = spec.compute.layers, fuse_model(spec.compute)
    module = settled(model.module, spec.party, version.weights("fuse"))
    outputs = drawn_inputs(layers, _ROWS, model.dtype)
    inputs = {name: tensor for party in outputs for name, tensor in _named(layers, party, outputs[party])}
    return export_part(ByParty(module, layers), inputs, target, path)


def _named(layers: LayersSpec, party: str, outputs: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Name the outputs of a party: by the party, and by the output where it has several."""
    if party not in layers.outputs:
        yield party, outputs[0]
        return
    names = layers.outputs[party].names or tuple(map(str, range(len(outputs))))
    yield from ((f"{party}.{name}", output) for name, output in zip(names, outputs, strict=True))

"""Evaluation of trained modules on rows that are at hand: outputs and measures, without a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sl_queue.compute.export import EXPORT_ROWS, SUFFIX, Exported, Target, export_base, export_fuse
from sl_queue.compute.fuse_stage import fuse_stage
from sl_queue.compute.inputs import n_offers, offer
from sl_queue.compute.metrics import predictions
from sl_queue.compute.modules.handover import copied
from sl_queue.compute.modules.state import in_evaluation
from sl_queue.compute.objective import Objective, measured
from sl_queue.compute.other_metrics import Task
from sl_queue.compute.outputs import Outputs as OutputScale
from sl_queue.compute.precision import computing
from sl_queue.compute.running import aggregated, called, is_penalised
from sl_queue.compute.seeds import key, seeded
from sl_queue.compute.spec import ComputeSpec, LayersSpec
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import compute_spec, layers_of
from sl_queue.config.user_code import Importer
from sl_queue.cut.packing import Wire
from sl_queue.cut.several import Outputs
from sl_queue.cut.tensors import take_rows
from sl_queue.errors import JobError
from sl_queue.protocol.schedule.row_order import Positions
from sl_queue.protocol.table import Table

PART = 4096  # rows that go through the models at once
CPU = torch.device("cpu")


def _cut_of(output: Any) -> Any:
    """Return the cut of a base model's output: a shape, or those of several; None if it is no such thing."""
    if isinstance(output, Tensor):
        return list(output.shape[1:]) if output.dim() > 1 else None
    each = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    if not each or not all(isinstance(tensor, Tensor) and tensor.dim() > 1 for tensor in each):
        return None
    if isinstance(output, dict):
        return {str(name): list(tensor.shape[1:]) for name, tensor in output.items()}
    return [list(tensor.shape[1:]) for tensor in output]


def shape_of_cut(party: str, table: Table, module: nn.Module) -> Any:
    """Find the cut, one shape or several, by trying a copy of the base model on a few rows. Raises JobError."""
    refused = []
    for choice in range(n_offers(_with_features(table))):
        tried = copied(module)
        features = offer(_alone(party), table, _dtype(tried), choice).features
        rows = take_rows(features, np.arange(min(2, len(features))), _dtype(tried), CPU)
        try:
            with seeded(key(0, party, "shape"), CPU), in_evaluation(tried):
                output = called(tried, rows)
                output = output[0] if is_penalised(output, None) else output
        except Exception as error:
            refused.append(f"{type(error).__name__}: {error}")
            continue
        if (found := _cut_of(output)) is not None:
            return found
        refused.append(f"it returns {type(output).__name__}; it must return one tensor (rows, ...)")
    told = "; and with the same numbers in another form: ".join(refused)
    raise JobError(f"party {party!r}: the base model fails on two rows of its features: {told}")


def outputs_of(job: Job, tables: Mapping[str, Table], modules: Mapping[str, nn.Module]) -> Tensor:
    """Compute the fuse model's output for all rows of the tables, in canonical order, on the CPU.

    `modules` are trained ones by party, the fuse model under "fuse". Raises JobError if parties hold other rows.
    """
    digests = {tables[party].digest for party in job.fused}
    if len(digests) > 1:
        counts = ", ".join(f"{party} {tables[party].n_rows}" for party in job.fused)
        raise JobError(f"the parties' ids differ; rows: {counts}; give the same rows for each party")
    n_rows = tables[job.fused[0]].n_rows
    taken = {party: _taken(party, tables[party], modules[party]) for party in job.fused}
    fuse, found, layers = modules["fuse"], [], layers_of(job)
    with seeded(key(job.seed, "", "predict"), CPU), torch.no_grad(), computing(layers.precision, CPU):
        for first in range(0, n_rows, PART):
            rows = np.arange(first, min(first + PART, n_rows))
            each = {
                party: _of_rows(modules[party], taken[party], rows, layers.outputs.get(party)) for party in job.fused
            }
            found.append(fuse(aggregated(each, layers)))
    output = torch.cat(found)
    return output if layers.precision is None else output.to(_dtype(fuse))


def measures_of(job: Job, file: PartyFile, table: Table, output: Tensor) -> dict[str, float | None]:
    """Compute loss and metrics of an output for the labels of the label holder's table."""
    objective = objective_for(job, file, table)
    with torch.no_grad():
        rows = np.arange(table.n_rows)
        loss = objective.loss_of(output, objective.labels, rows).item()
    return {"loss": loss, **measured(objective, output, objective.labels, rows)}


def objective_for(job: Job, file: PartyFile, table: Table) -> Objective:
    """Return the loss and the metrics, for the labels of a table."""
    whole = job.replace(holdout=0.0, early_stopping=None, batch_size=table.n_rows, pipeline={})
    spec = compute_spec(whole, file.replace(device="cpu"), Importer())
    return fuse_stage(spec, table, whole.batches(table.n_rows)).objective


def chances(output: Tensor, task: Task, outputs: OutputScale) -> Tensor:
    """Return probabilities of a model's output. Raises JobError for a model that predicts numbers."""
    if task is Task.REGRESSION:
        raise JobError("this model predicts numbers, which have no probabilities")
    wide = output.reshape(len(output), -1) if task is Task.BINARY else output
    labels = torch.zeros(len(output), *(wide.shape[1:] if task is Task.BINARY else ()))
    return predictions(task, outputs, wide, labels)[0].reshape(output.shape).to(output.dtype)


def export_parts(
    job: Job, tables: Mapping[str, Table], modules: Mapping[str, nn.Module], target: Target, folder: Path
) -> list[Exported]:
    """Export trained modules, by party and "fuse", each into its party's folder. Raises JobError, ComputeError."""
    if target not in SUFFIX:
        raise JobError(f"export to {target!r} is unknown; allowed are {', '.join(SUFFIX)}")
    found = []
    for party in job.fused:
        module = modules[party]
        features = _taken(party, tables[party], module)
        rows = take_rows(features, np.arange(min(EXPORT_ROWS, len(features))), _dtype(module), CPU)
        found.append(export_base(module, rows, target, _folder(folder, party) / f"base{SUFFIX[target]}"))
    layers = layers_of(job)
    path = _folder(folder, job.label_holder) / f"fuse{SUFFIX[target]}"
    return [*found, export_fuse(modules["fuse"], layers, _dtype(modules["fuse"]), target, path)]


def _folder(folder: Path, party: str) -> Path:
    (folder / party).mkdir(parents=True, exist_ok=True)
    return folder / party


def _taken(party: str, table: Table, module: nn.Module) -> npt.NDArray[Any]:
    """Return the features in the form that the base model takes."""
    refused: list[Exception] = []
    for choice in range(n_offers(_with_features(table))):
        features = offer(_alone(party), table, _dtype(module), choice).features
        try:
            with seeded(key(0, party, "shape"), CPU), torch.no_grad():
                called(module, take_rows(features, np.arange(min(2, len(features))), _dtype(module), CPU))
        except Exception as error:
            refused.append(error)
            continue
        return features
    raise JobError(f"party {party!r}: the base model fails on its features: {refused[0]}") from refused[0]


def _of_rows(module: nn.Module, features: npt.NDArray[Any], rows: Positions, outputs: Outputs | None) -> list[Tensor]:
    """Compute a base model's outputs of these rows, mostly one."""
    found = called(module, take_rows(features, rows, _dtype(module), CPU))
    found = found[0] if is_penalised(found, outputs) else found
    return [found] if outputs is None else outputs.listed(found, len(rows), "the base model")


def _alone(party: str) -> ComputeSpec:
    """Return the spec of a party of which nothing but its rows and its base model is known."""
    layers = LayersSpec("", 0, "", (), {}, "list", Wire(), 1, 0)
    return ComputeSpec(party, layers, None, None, None, "cpu", Importer().within(None))


def _with_features(table: Table) -> Table:
    if table.features is None:
        raise JobError("a party with a base model has no features")
    return table


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)

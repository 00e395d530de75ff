"""A party's part of the model, built for a run, with what a person should know of it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sl_queue.compute.advice import advice
from sl_queue.compute.base_stage import TorchBaseStage, base_stage
from sl_queue.compute.fuse_stage import TorchFuseStage, fuse_stage
from sl_queue.compute.going_on import begin_with, begin_with_moments, digest_of_start
from sl_queue.compute.model import Model
from sl_queue.compute.modules.handover import Take
from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.cut.guard import UNGUARDED, Guard
from sl_queue.errors import CheckpointError
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.table import Table
from sl_queue.storage.checkpoints import newest_state
from sl_queue.storage.final import read_final, run_json

if TYPE_CHECKING:
    from sl_queue.launch.hands import Lanes

log = logging.getLogger("sl_queue")


def build_stage(
    job: Job,
    spec: PartySpec,
    table: Table,
    pipeline: Pipeline,
    take: Take,
    guards: Mapping[str, Guard],
    lanes: "Lanes | None",
) -> TorchBaseStage | TorchFuseStage:
    """Build the party's part of the model, and say what a person should know of it."""
    compute = spec.compute if lanes is None else lanes.computes(spec.compute)
    if spec.role == "label":
        fuse = fuse_stage(compute, table, pipeline.batches, take, guards)
        _remark(fuse.own)
        _begin(spec, [fuse.model, *([] if fuse.own is None else [fuse.own.model])])
        for found in advice(fuse, job.stops_on):
            log.warning("%s: %s", spec.party, found.text)
        return fuse
    base = base_stage(compute, table, pipeline.batches, take, guards.get(job.label_holder, UNGUARDED))
    _remark(base)
    _begin(spec, [base.model])
    return base


def of_start(spec: PartySpec) -> dict[str, str]:
    return {} if spec.start is None else {"start": digest_of_start(spec.start.folder, spec.start.optimizer)}


def _begin(spec: PartySpec, models: Sequence[Model]) -> None:
    """Give the models the weights of an earlier run, if the party's file says so."""
    if spec.start is None:
        return
    _require_whole(spec.party, spec.start.folder)
    for model in models:
        model.shares_all = True  # a hand has none of them
    for said in begin_with(models, spec.start.folder):
        log.warning("%s", said)
    if spec.start.optimizer:
        begin_with_moments(models, newest_state(spec.start.folder))


def _require_whole(party: str, folder: Path) -> None:
    """Raise CheckpointError for final weights that were altered since they were written; say if they are another's."""
    if not run_json(folder / "final").exists():
        return
    try:
        _, says = read_final(folder / "final")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"party {party!r}: [start] from = {str(folder)!r}: its final weights are not those that its run.json says "
            f"({error}); restore them, or remove run.json beside them to begin with them as they are"
        ) from error
    if says.get("party", party) != party:
        log.warning("%s: [start] from = %r holds the weights of party %r", party, str(folder), says["party"])


def _remark(stage: TorchBaseStage | None) -> None:
    if stage is not None and stage.remark is not None:
        log.warning("%s", stage.remark)

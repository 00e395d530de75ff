"""The version that a finished run leaves at a party, with its model card."""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.errors import CheckpointError
from sl_queue.privacy.report import paragraph
from sl_queue.protocol.checkpoint import Final
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table
from sl_queue.storage.history_file import Journal
from sl_queue.storage.model_card import Card, Column
from sl_queue.storage.versions import keep_version

log = logging.getLogger("sl_queue")

_LIBRARIES = ("sl_queue", "torch", "numpy")


def keep_trained(
    job: Job, spec: PartySpec, table: Table, batches: Batches, state: Path, stage: Any, final: Final
) -> None:
    """Keep what a run has left in `final/` as a version; the same once more changes nothing.

    What keeps it from that is logged: the run has finished anyway.
    """
    history = Journal(state / "history.jsonl").load() if spec.role == "label" else ()
    ended = next((result for result in history if result.step == final.step), None)
    metrics = {} if ended is None else dict(ended.holdout or {})
    about = {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "party": spec.party,
        "role": spec.role,
        "job_says": job.canonical(),
        "holdout": metrics,
        "rows": table.n_rows,
        "columns": None if table.columns is None or table.fitted is not None else list(table.columns),
        "whole": table.fitted is None and table.features_dtype is not None and table.features_dtype.kind in "iu",
        "libraries": _libraries(),
        **_task(getattr(stage, "objective", None)),
    }
    privacy = state / "final" / "privacy.json"
    told = paragraph(json.loads(privacy.read_bytes())) if privacy.exists() else ""
    card = _card(job, spec, table, batches, final, metrics, about, told)
    extra = [path for path in (state / "final" / "features.json", privacy) if path.exists()]
    try:
        keep_version(state, about, card.markdown(), extra)
    except (OSError, CheckpointError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        log.warning("%s: no version of run %s was kept (%s); final/ holds its weights", spec.party, final.run, reason)


def _task(objective: Any) -> dict[str, Any]:
    """Return what the outputs of the fuse model mean, for whoever predicts without labels."""
    if objective is None:
        return {}
    return {"task": str(objective.task), "outputs": str(objective.outputs), "shape": list(objective.shape)}


def _card(
    job: Job,
    spec: PartySpec,
    table: Table,
    batches: Batches,
    final: Final,
    metrics: Mapping[str, float | None],
    about: Mapping[str, Any],
    privacy: str,
) -> Card:
    parts = {"base": spec.compute.base, "fuse": spec.compute.fuse}
    loss = spec.compute.objective.loss if spec.compute.objective is not None else None
    task = f"{about.get('task', 'learning')} by the loss {loss if isinstance(loss, str) else type(loss).__name__}"
    return Card(
        job=job.name,
        job_digest=job.digest,
        run=final.run,
        party=spec.party,
        role="label holder" if spec.role == "label" else "feature party",
        parts={part: _name(model.model) for part, model in parts.items() if model is not None},
        cuts={party: job.cut(party) or () for party in job.parties if job.cut(party) is not None},
        rows=table.n_rows,
        held_out=batches.holdout_rows,
        epochs=batches.epoch_of(final.step) + 1,
        step=final.step,
        finished_at=about["finished_at"],
        columns=[Column(name, str(table.features_dtype or "")) for name in table.columns or ()],
        task="" if loss is None else task,
        metrics=metrics,
        privacy=privacy,
        versions=about["libraries"],
    )


def _name(model: Any) -> str:
    return model if isinstance(model, str) else getattr(model, "__qualname__", type(model).__qualname__)


def _libraries() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

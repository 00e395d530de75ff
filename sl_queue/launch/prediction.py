"""A prediction, put together for a party: the rows to predict, a version of the weights, and the run that joins them.

It is a run of its own under `<state>/predictions/<name>/`, with the queues of the training run. A worker that starts
again goes on where it was; one that finds the prediction done writes the file again and leaves.
"""

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sl_queue.compute.fingerprint import of_table
from sl_queue.compute.objective import Objective
from sl_queue.compute.predicting import PredictingFuse
from sl_queue.compute.trained import evaluating_fuse, predicting_base, predicting_fuse
from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.cut.guard import UNGUARDED, Guard
from sl_queue.data.spec import FileSpec
from sl_queue.data.to_predict import ToPredict, read_to_predict
from sl_queue.errors import AlignmentError, JobError
from sl_queue.launch.alignment import align_party
from sl_queue.launch.asked import Asked, canonical_of, digest_of, folder_of, for_alignment, schedule_of
from sl_queue.launch.party import channel_of
from sl_queue.launch.privacy import parts_of
from sl_queue.launch.rows import own_version
from sl_queue.launch.spending import release_rows
from sl_queue.launch.workplace import Workplace
from sl_queue.loops.lifecycle import Identity, Worker
from sl_queue.loops.record import Record
from sl_queue.loops.training import FeatureParty, LabelHolder
from sl_queue.observe.meter import Meter
from sl_queue.protocol import events
from sl_queue.protocol.fingerprints import differences
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.text import counted
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.history_file import Journal
from sl_queue.storage.holdout_file import read_held_out
from sl_queue.storage.pieces import PieceFolder
from sl_queue.storage.secret_file import read_secret
from sl_queue.storage.versions import Version, choose_version, trained_with
from sl_queue.transport.party_channel import PartyChannel

log = logging.getLogger("sl_queue")


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """Outcome of a prediction at the label holder."""

    version: Version
    rows: ToPredict
    outputs: npt.NDArray[Any] = field(repr=False)  # (rows, *outputs), in canonical order
    objective: Objective | None = None  # if there are labels
    loss: str = ""  # by name, if it has one
    held_out: Sequence[npt.NDArray[np.int64]] | None = None  # positions of what training held out, in its parts


def predict_party(
    job: Job, spec: PartySpec, asked: Asked, place: Workplace, folder: Path | None = None
) -> Predicted | None:
    """Take part in a prediction to its end; the label holder returns what was predicted, all others None.

    `spec.table` is that of the rows to predict; the state folder holds the weights. `folder`: for the state of the
    prediction; None: its place in the state folder. Raises SlQueueError.
    """
    require_kept(job, asked)
    version, meter = choose_version(place.state, asked.run), Meter()
    spec, state = with_own_secret(spec, place.state), place.state
    place = place.watched_by(meter).in_folder(folder or folder_of(place.state, asked.name))
    about, digest = canonical_of(job, asked.name), digest_of(job, asked.name)
    with Folder(place.state, job_digest=digest, party=spec.party, job=about) as kept:
        rows = _rows(job, spec, asked, version, state, place)
        about_rows = named_rows(version, rows)
        kept.require(about_rows)
        release_rows(job, spec, state, "/".join(("predicted", *about_rows.values())), place.state)
        pieces = PieceFolder(place.state / "pieces")
        pipeline = schedule_of(job, rows.table.n_rows)
        guards = _guards(spec, rows, pipeline.batches)
        stage, objective = _stage(spec, rows, version, pipeline.batches, pieces, guards, labels=asked.labels)
        done = kept.finished()
        if done is None or not done.reported:
            identity = _identity(job, asked.name, version, rows, spec.party)
            channel = channel_of(job, spec.party, place, identity.incarnation, pipeline, meter)
            record = Record(Journal(place.state / "history.jsonl") if spec.role == "label" else None)
            worker = Worker(identity, channel, stage, kept, pipeline, record=record, observe=place.observe)
            with place.opened(channel):
                place.observe(events.Ready(spec.party))
                worker.serve(_loop(job, spec, channel, stage, pipeline, worker))
        told = counted(rows.table.n_rows, "row is", "rows are")
        log.info("%s: %s predicted with run %s", spec.party, told, version.run)
        if spec.role != "label":
            return None
        outputs = pieces.read(rows.table.n_rows)
        held_out = _evaluated(job, rows, state, asked) if asked.of_training else None
        return Predicted(version, rows, outputs, objective, loss_of(spec), held_out)


def loss_of(spec: PartySpec) -> str:
    """Return the name of the loss that a party file names, empty if it has none."""
    loss = None if spec.compute.objective is None else spec.compute.objective.loss
    return loss if isinstance(loss, str) else ""


def _rows(job: Job, spec: PartySpec, asked: Asked, version: Version, state: Path, place: Workplace) -> ToPredict:
    """Read the rows that all parties hold. Raises AlignmentError if some of the label holder's are not among them."""
    aligned = align_party(for_alignment(job), spec.table, place, own_version())
    positions = None if aligned is None else aligned.positions
    rows = read_to_predict(spec.table, positions, version.recipe, version.columns, whole=version.whole)
    for note in rows.table.notes:
        log.info("%s: %s", spec.party, note)
    for found in rows.unseen:
        log.warning("%s: %s", spec.party, found)
    if asked.of_training and (differing := _differences(spec, rows, trained_with(state, version))):
        told = "%s: the table is not that of run %s any more, and what is measured is of the present one: %s"
        log.warning(told, spec.party, version.run, "; ".join(differing))
    if spec.role == "label" and rows.missing and not asked.of_training:  # which was of the shared rows too
        others = ", ".join(spec.peers)
        told = f"{rows.missing} of {len(rows.positions)} rows to predict are not held by every party ({others})"
        if not asked.leave_out:
            raise AlignmentError(f'{told}; complete their tables, or set missing = "leave-out" in [predict]')
        log.warning("%s: %s, and get no prediction", spec.party, told)
    return rows


def _differences(spec: PartySpec, rows: ToPredict, begun: Mapping[str, Any]) -> list[str]:
    """Say in what the rows differ from those that a run was trained on; nothing where that is not known."""
    if not begun:
        return []
    other = {"data.fitted", "data.held_out"}  # of how training read the table
    other |= set() if spec.privacy.labels is None else {"data.labels"}  # it learnt from responses
    sides = (begun, of_table(spec.compute, rows.table))
    found, own = ({k: side[k] for k in side if k.startswith("data.") and k not in other} for side in sides)
    return differences(found, own)


def require_kept(job: Job, asked: Asked) -> None:
    """Raise JobError if the job keeps no rows of the kind that is asked about."""
    if asked.of_training and not (job.test if asked.test else job.holdout):
        told = "keeps no rows for a test: set test" if asked.test else "holds no rows out: set holdout"
        raise JobError(f"the job {told}, or evaluate on the rows of [predict]")


def _evaluated(job: Job, rows: ToPredict, state: Path, asked: Asked) -> Sequence[npt.NDArray[np.int64]]:
    """Return the rows that training held out, in its parts, or kept for a test."""
    by: Any = rows.table.hashes
    if job.tells_holdout:
        held = read_held_out(state)
        if held is None:
            raise JobError(f"{state}: held_out.json is missing, which says what rows training held out; restore it")
        held.require(rows.table.digest, f"party {job.label_holder!r}")
        by = held.chosen
    batches = job.batches(rows.table.n_rows, by)
    held_out = [batches.holdout_part(index) for index in range(batches.holdout_parts)]
    parts = [batches.test_positions] if asked.test else held_out
    if not sum(map(len, parts)):
        raise JobError(f"the job's share for a {'test' if asked.test else 'holdout'} is no row of this table")
    return parts


def _stage(
    spec: PartySpec,
    rows: ToPredict,
    version: Version,
    batches: Batches,
    pieces: PieceFolder,
    guards: Mapping[str, Guard],
    *,
    labels: bool,
) -> tuple[Any, Objective | None]:
    if spec.role != "label":
        guard = guards.get(spec.peers[0], UNGUARDED)
        return predicting_base(spec.compute, rows.table, batches, version.weights("base"), guard), None
    parts = ("base", "fuse") if spec.party in spec.compute.layers.cuts else ("fuse",)
    weights = {part: version.weights(part) for part in parts}
    if labels:
        return evaluating_fuse(spec.compute, rows.table, batches, weights, pieces, guards)
    return predicting_fuse(spec.compute, rows.table, batches, weights, pieces, guards), None


def _guards(spec: PartySpec, rows: ToPredict, batches: Batches) -> Mapping[str, Guard]:
    """Return the defences of the activations that leave; the label holder sends nothing but receipts."""
    if spec.role == "label":
        return {}
    unmeasured = replace(spec, privacy=replace(spec.privacy, meter=False))
    return parts_of(unmeasured, rows.table, batches).guards


def _loop(
    job: Job, spec: PartySpec, channel: PartyChannel, stage: Any, pipeline: Pipeline, worker: Worker
) -> Callable[[int], None]:
    if isinstance(stage, PredictingFuse):
        return LabelHolder(spec.peers, channel, stage, pipeline, worker).train
    return FeatureParty(job.label_holder, channel, stage, pipeline, worker).train


def _identity(job: Job, name: str, version: Version, rows: ToPredict, party: str) -> Identity:
    about = (canonical_of(job, name), rows.table.n_rows, rows.table.digest, rows.table.id_type)
    return Identity(secrets.token_hex(8), *about, version=own_version(), weights=version.run, party=party)


def with_own_secret(spec: PartySpec, state: Path) -> PartySpec:
    """Key what the models draw in evaluation as the party's own; a version is predicted with by one party's secret."""
    path = spec.chosen_secret
    return spec.with_secret(read_secret(path)) if isinstance(path, Path) else spec


def named_rows(version: Version, rows: ToPredict) -> dict[str, Any]:
    """Return what must not change between two starts of one prediction."""
    from hashlib import sha256

    features = rows.table.features
    about = b"" if features is None else np.ascontiguousarray(features).tobytes()
    return {"weights": version.run, "rows": rows.table.digest, "features": sha256(about).hexdigest()}


def spec_to_predict(spec: PartySpec, data: Any, asked: Asked) -> PartySpec:
    """Return a party of the job with other rows: a FileSpec or Rows. Raises JobError if there are none."""
    if asked.of_training:
        own = spec.table.data
        own = replace(own, unseen="other") if isinstance(own, FileSpec) else own
        return replace(spec, table=replace(spec.table, data=own, choices=None))
    if data is None:
        raise JobError(
            f"party {spec.party!r} has no rows to predict: write [predict] path into its file, beside a [data] path"
        )
    labelled = asked.labels and spec.role == "label"
    if isinstance(data, FileSpec) and isinstance(spec.table.data, FileSpec):
        data = replace(data, set_aside=spec.table.data.set_aside)
    return replace(spec, table=replace(spec.table, data=data, labels=labelled, holdout_seed=None, choices=None))

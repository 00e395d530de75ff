"""Resolution of job, party file and user code for one party: checked together, into small frozen values.

Below the launch of a worker everything works on these, and nothing knows of files in TOML.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, Self

from sl_queue.compute.names import HIGHER_IS_BETTER, LOWER_IS_BETTER, metric_name
from sl_queue.compute.spec import ComputeSpec, LayersSpec, ModelSpec, ObjectiveSpec, Precision
from sl_queue.config.features import specs_of
from sl_queue.config.job import Job
from sl_queue.config.party import BaseFile, DataFile, FuseFile, PartyFile
from sl_queue.config.privacy import about_defences, settings_of
from sl_queue.config.user_code import Importer
from sl_queue.data.spec import Choices, FileSpec, Rows, TableSpec
from sl_queue.errors import JobError
from sl_queue.privacy.settings import Settings
from sl_queue.protocol.text import nearest


@dataclass(frozen=True, slots=True)
class Start:
    """State folder of an earlier run."""

    folder: Path
    optimizer: bool  # take what its optimizer remembered too


@dataclass(frozen=True, slots=True)
class PartySpec:
    """One party of one job."""

    party: str
    role: Literal["feature", "label"]
    peers: tuple[str, ...]  # whom it exchanges tensors with
    table: TableSpec
    compute: ComputeSpec
    privacy: Settings
    chosen_secret: Path | str | None  # what keys its draws, as its file says: a file, "seed", or nothing chosen
    start: "Start | None" = None  # an earlier run that this one begins with

    def with_secret(self, secret: bytes) -> Self:
        """Return the same party with a secret for its draws."""
        return replace(self, compute=replace(self.compute, secret=secret))


def resolve(job: Job, party_file: PartyFile, importer: Importer) -> PartySpec:
    """Check job and party file together, and make of them what a worker needs. Raises JobError."""
    agree(job, party_file)
    party = party_file.party
    peers = job.feature_parties if party == job.label_holder else (job.label_holder,)
    table, compute = table_spec(job, party_file, importer), compute_spec(job, party_file, importer)
    return PartySpec(
        party,
        job.parties[party].role,
        peers,
        table,
        compute,
        settings_of(party_file.privacy),
        party_file.privacy.secret,
        None if party_file.start is None else Start(party_file.start.from_, party_file.start.optimizer),
    )


def table_spec(job: Job, party_file: PartyFile, importer: Importer) -> TableSpec:
    """Return the table of a party, and what the job needs of it."""
    labels = party_file.party == job.label_holder
    return TableSpec(
        party_file.party,
        _set_aside(_data(party_file.data), party_file, job.choices if labels else None),
        features=job.cut(party_file.party) is not None,
        labels=labels,
        holdout_seed=job.seed_of_holdout if job.holdout or job.test else None,
        code=importer.within(party_file.folder),
        declared=specs_of(party_file.features),
        normalise=tuple(job.alignment.normalise),
        training=lambda n_rows, by: job.batches(n_rows, by).training_positions,
        choices=job.choices,
        missing_labels=party_file.fuse is not None and party_file.fuse.missing_labels == "mask",
    )


def compute_spec(job: Job, party_file: PartyFile, importer: Importer) -> ComputeSpec:
    """Return the models of a party, and the network that they are a part of."""
    fuse = party_file.fuse
    return ComputeSpec(
        party_file.party,
        layers_of(job),
        _model(party_file.base),
        _model(fuse),
        _objective(fuse),
        party_file.device,
        importer.within(party_file.folder),
        table_is_file=_names_a_file(party_file.data),
        label_column=_label_column(party_file.data),
    )


def layers_of(job: Job) -> LayersSpec:
    """Return the network that all parties have agreed on."""
    cuts = {party: table.flat for party, table in job.parties.items() if table.flat is not None}
    return LayersSpec(
        job_digest=job.digest,
        seed=job.seed,
        label_holder=job.label_holder,
        feature_parties=job.feature_parties,
        cuts=cuts,
        aggregation=job.fuse.aggregation,
        wire=job.on_the_wire,
        micro_batches=job.pipeline.micro_batches,
        staleness=job.pipeline.staleness,
        whole_batch=job.fuse.whole_batch,
        outputs={party: table.outputs for party, table in job.parties.items() if table.outputs is not None},
        precision=_precision(job),
    )


def _precision(job: Job) -> Precision | None:
    table = job.precision
    return None if table.name == "float32" else Precision(table.name, table.scale, table.growth_interval)


def data_to_predict(party_file: PartyFile) -> FileSpec | None:
    """Return the rows that [predict] names, read as those of [data] are; None without it or without [data] path."""
    if party_file.predict is None or not _names_a_file(party_file.data):
        return None
    found = _data(party_file.data)
    assert isinstance(found, FileSpec)
    return replace(found, path=party_file.predict.path, unseen=party_file.predict.unseen)


def require_read_alike(party_file: PartyFile) -> None:
    """Raise JobError for rows to predict of which no [data] says how they are read."""
    if party_file.predict is not None and not _names_a_file(party_file.data):
        raise JobError(
            f"party {party_file.party!r}: [predict] path is read as [data] path is, and its [data] names no file; let "
            "[data] name one, with its id, or remove [predict]"
        )


def _names_a_file(data: DataFile | Rows) -> bool:
    return isinstance(data, DataFile) and data.source is None


def _set_aside(data: FileSpec | Rows, party_file: PartyFile, choices: Choices | None) -> FileSpec | Rows:
    """Take columns that choose rows out of the features, unless the party names them there."""
    if choices is None or isinstance(data, Rows):
        return data
    named = {*(data.features or ()), *(party_file.features or ())}
    return replace(data, set_aside=tuple(name for name in choices.columns if name not in named))


def _data(data: DataFile | Rows) -> FileSpec | Rows:
    if isinstance(data, Rows):
        return data
    features = None if data.features is None else tuple(data.features)
    return FileSpec(
        data.path,
        data.ids,
        features,
        tuple(data.label) if isinstance(data.label, list) else data.label,
        data.id_type,
        data.source,
        data.format,
        data.csv.spec(),
        tuple(data.exclude),
        data.duplicates,
        data.weight,
        mapped=data.mapped,
    )


def _label_column(data: DataFile | Rows) -> str | None:
    label = data.label if isinstance(data, DataFile) else None
    return ", ".join(label) if isinstance(label, list) else label


def _model(table: BaseFile | FuseFile | None) -> ModelSpec | None:
    if table is None:
        return None
    how = (table.optimizer, tuple(table.groups), table.schedule, table.clip_norm, table.clip_value, table.ema)
    return ModelSpec(table.model, table.args, *how, inputs=table.inputs)


def _objective(table: FuseFile | None) -> ObjectiveSpec | None:
    if table is None:
        return None
    about = (table.outputs, table.task, table.missing_labels == "mask", table.train_metrics)
    return ObjectiveSpec(table.loss, tuple(table.metrics), *about)


# What only job and party file together show ---------------------------------------------------------------------


def require_apart(files: Sequence[PartyFile]) -> None:
    """Raise JobError for two files of one party, and for two parties with one state folder."""
    for one, other in combinations(files, 2):
        if one.party == other.party:
            raise JobError(f"two files are of the party {one.party!r}; give one for each party")
        if one.state is not None and other.state is not None and one.state.resolve() == other.state.resolve():
            both = f"{one.party!r} and {other.party!r}"
            raise JobError(f"the parties {both} have one state folder, {one.state}; give each its own")


def agree(job: Job, party_file: PartyFile) -> None:
    """Raise one JobError for everything that a party's file and the job show only together."""
    party = party_file.party
    if party not in job.parties:
        known = list(job.parties)
        raise JobError(
            f"party = {party!r}: job {job.name!r} has no such party; {nearest(party, known)}"
            f"its parties are {', '.join(known)}"
        )
    about_labels = _about_labels if party == job.label_holder else _about_no_labels
    holder = job.label_holder
    defences = about_defences(party_file.privacy, holds_labels=party == holder, party=party, label_holder=holder)
    problems = [*_about_base(party_file, job), *about_labels(party_file, job), *defences]
    if problems:
        raise JobError("\n  ".join(f"party {party!r}: {problem}" for problem in problems))


def _about_base(party: PartyFile, job: Job) -> Iterator[str]:
    cut = job.cut(party.party)
    if cut is not None and party.base is None:
        yield f"[base] is missing; the job gives this party a cut, {list(cut)}, so it needs a base model"
    if cut is None and party.base is not None:
        yield f"[base] has no use; the job gives this party no cut: remove [base], or set parties.{party.party}.cut"
    features = party.data.features
    if cut is not None and (features is None if isinstance(party.data, Rows) else features == []):
        yield "data.features is empty; the base model needs features"


def _about_labels(party: PartyFile, job: Job) -> Iterator[str]:
    """Yield what the label holder lacks."""
    if party.fuse is None:
        yield "[fuse] is missing; the label holder has the fuse model"
    data = party.data
    if isinstance(data, Rows) and data.labels is None:
        yield "its Rows have no labels; the label holder needs them"
    if isinstance(data, DataFile) and data.source is None and data.label is None:
        yield "data.label is missing; the label holder names the column with the labels"
    rule = job.early_stopping
    if rule is None or party.fuse is None:
        return
    names = list(map(metric_name, party.fuse.metrics))
    of_training = ["train_loss", *(f"train_{name}" for name in names if party.fuse.train_metrics)]
    held_out = [name for name in names if not name.startswith("train_")]  # a rule reads those on training rows
    measured, metric = ["loss", *held_out, *of_training], rule.metric
    if metric not in measured:
        yield (
            f"early_stopping.metric = {metric!r} is not measured; {nearest(metric, measured)}"
            f"it must be {', '.join(measured)}, or be added to fuse.metrics"
        )
    elif rule.mode is None and metric.removeprefix("train_") not in LOWER_IS_BETTER | HIGHER_IS_BETTER:
        yield f'early_stopping.mode is missing: whether {metric!r} is better when it is larger; "min" or "max"'


def _about_no_labels(party: PartyFile, job: Job) -> Iterator[str]:
    """Yield what a feature party has no use for."""
    if party.fuse is not None:
        yield f"[fuse] has no use; the label holder {job.label_holder!r} has the fuse model"
    if isinstance(party.data, DataFile) and party.data.label is not None:
        yield f"data.label has no use; only {job.label_holder!r} has labels (data.features can leave a column out)"
    if isinstance(party.data, DataFile) and party.data.weight is not None:
        yield f"data.weight has no use; {job.label_holder!r} says how much each row counts"

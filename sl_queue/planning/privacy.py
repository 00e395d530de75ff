"""Trade-off of each defence, tried on the user's own tables before a run: utility against the worst attack.

Each option is a short run of its own in this process, with the meter on at every party. Nothing is recommended: the
table is to choose from, and what to paste is printed with it.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.privacy import PrivacyFile
from sl_queue.config.resolve import table_spec
from sl_queue.config.user_code import Importer
from sl_queue.data.table import read_table
from sl_queue.errors import AlignmentError, JobError, SlQueueError
from sl_queue.launch.privacy import class_numbers
from sl_queue.local.threads import require_all, run_local
from sl_queue.privacy import attacks
from sl_queue.privacy.accounting import cap_of_epsilon
from sl_queue.privacy.sampled import sample
from sl_queue.protocol.text import counted

EPOCHS = 5  # of each option, if the job has as many
HOLDOUT = 0.2  # where the job holds no rows out
ON_LABELS = ("norm", "direction", "spectral", "patient", "completion", "change")  # what the worst is taken of


@dataclass(frozen=True, slots=True)
class Option:
    """One way to defend: what to write into [privacy] of the label holder, and of each feature party."""

    name: str
    labels: Mapping[str, Any]
    features: Mapping[str, Any]
    epsilon: float | None = None

    def toml(self, label_holder: str, feature_parties: Sequence[str]) -> Iterator[str]:
        """Yield what to paste, a file each."""
        for parties, table in (((label_holder,), self.labels), (feature_parties, self.features)):
            for party in parties if table else ():
                yield f"# {party}.toml"
                yield "[privacy]"
                yield from (f"{key} = {_toml(value)}" for key, value in table.items())


NONE = Option("none", {}, {})
OPTIONS = (
    NONE,
    *(Option(f"labels, epsilon {e:g}", {"labels": {"epsilon": e}}, {}, e) for e in (3.0, 2.0, 1.0)),
    Option("gradients, max-norm", {"gradients": "max-norm"}, {}),
    *(Option(f"gradients, noise {n:g}", {"gradients": {"noise": n}}, {}) for n in (1.0, 4.0)),
    Option("labels, epsilon 2, and max-norm", {"labels": {"epsilon": 2.0}, "gradients": "max-norm"}, {}, 2.0),
    *(Option(f"activations, sigma {s:g}", {}, {"activations": {"clip": 1.0, "sigma": s}}) for s in (0.1, 1.0)),
    Option("nopeek 1", {}, {"nopeek": 1.0}),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one option; None where it could not be measured."""

    option: Option
    utility: float | None  # on true labels of held-out rows
    labels: float | None  # the worst attack on labels, of any party
    patient: float | None
    chance: float | None
    columns: float | None  # the largest share of a party's columns that is recovered
    problem: str = ""

    @property
    def cap(self) -> float | None:
        """The AUC above which no attack on the response can be."""
        return None if self.option.epsilon is None else cap_of_epsilon(self.option.epsilon)


@dataclass(frozen=True, slots=True)
class Trial:
    """The job and files as they are tried."""

    job: Job
    files: Sequence[PartyFile]
    metric: str
    bytes_a_row: int  # of activation and gradient, on the way to and from all feature parties
    raw: Mapping[str, float]  # by party, how well its raw columns tell labels with a few labels known


def trial_of(job: Job, files: Sequence[PartyFile]) -> Trial:
    """Make the short job that is tried. Raises JobError unless all parties' files are here and fit together."""
    require_all(job, files)
    changes: dict[str, Any] = {"epochs": min(job.epochs, EPOCHS), "early_stopping": None}
    short = job.model_copy(update=changes if job.holdout else {**changes, "holdout": HOLDOUT})
    holder = next(file for file in files if file.party == job.label_holder)
    assert holder.fuse is not None
    metric = next(iter(holder.fuse.metrics), "loss")
    shapes = [job.cut(party) or () for party in job.feature_parties]
    wire = job.on_the_wire
    size = sum(2 * wire.bytes_of("float32", (1, *shape)) for shape in shapes if prod(shape))
    return Trial(short, files, metric, size, _raw(short, files, Importer()))


def _raw(job: Job, files: Sequence[PartyFile], importer: Importer) -> dict[str, float]:
    """Return what each party's own columns say of the labels, with forty labels known: nothing defends that."""
    tables = {file.party: read_table(table_spec(job, file, importer)) for file in files}
    holder = tables[job.label_holder]
    if len({(table.digest, table.id_type) for table in tables.values()}) > 1:
        raise AlignmentError("the parties' ids differ; `sl-queue check` with the same files says how")
    labels = class_numbers(holder)
    if labels is None:
        raise JobError(
            f"party {job.label_holder!r}: its labels are numbers, not classes; attacks on labels are measured for "
            "classes only"
        )
    rows, found = sample(labels, np.arange(holder.n_rows), b"raw columns of all"), {}
    for party in job.feature_parties:
        features = tables[party].features
        if features is not None:
            columns = features[rows].reshape(len(rows), -1).astype(np.float64)
            found[party] = attacks.completion(columns, labels[rows], np.random.default_rng(0))
    return found


def outcomes(trial: Trial, options: Sequence[Option] = OPTIONS) -> Iterator[Outcome]:
    """Try each option in turn."""
    for option in options:
        try:
            yield _tried(trial, option)
        except SlQueueError as error:
            yield Outcome(option, None, None, None, None, None, str(error))


def _tried(trial: Trial, option: Option) -> Outcome:
    job = trial.job
    files = [_with(file, option.labels if file.party == job.label_holder else option.features) for file in trial.files]
    with tempfile.TemporaryDirectory(prefix="sl_queue-privacy-") as folder:
        history = run_local(job, files, out=folder).history
        places = {party: Path(folder) / party / "final" / "privacy.json" for party in job.parties}
        reports = {party: json.loads(place.read_text()) for party, place in places.items()}
    leaks = [found for epoch in history for found in (epoch.get("leak") or {}).values()]
    last = list((history[-1].get("leak") or {}).values())
    truth = reports[job.label_holder].get("holdout_true") or history[-1]["holdout"] or {}
    columns = [_columns(reports[party].get("measured")) for party in job.feature_parties]
    return Outcome(
        option,
        truth.get(trial.metric),
        max((found[name] for found in leaks for name in ON_LABELS), default=None),
        max((found["patient"] for found in last), default=None),
        max((found["chance"] for found in leaks), default=None),
        max((found for found in columns if found is not None), default=None),
    )


def _with(file: PartyFile, table: Mapping[str, Any]) -> PartyFile:
    """Return a file with this [privacy] and the meter, its draws keyed by the seed: nothing leaves this process."""
    prior = {"labels": {**table["labels"], "prior_ok": True}} if "labels" in table else {}
    return file.model_copy(update={"privacy": PrivacyFile(**{**table, **prior, "meter": True})})


def _columns(measured: Mapping[str, Mapping[str, float]] | None) -> float | None:
    """Return the larger share of variance that ridge or network recovers."""
    found = [each for numbers in (measured or {}).values() for each in (numbers["ridge"], numbers["network"])]
    return max(found, default=None)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value)


# To read --------------------------------------------------------------------------------------------------------

_WIDTHS = {"utility": 9, "worst attack": 14, "patient": 9, "chance": 8, "cap": 7, "columns": 9, "bytes/row": 11}
HEADER = f"{'defence':<33}" + "".join(f"{name:>{width}}" for name, width in _WIDTHS.items())


def line(outcome: Outcome, trial: Trial) -> str:
    """Return one line of the table."""
    if outcome.problem:
        return f"{outcome.option.name:<33} not measured: {outcome.problem}"
    numbers = (outcome.utility, outcome.labels, outcome.patient, outcome.chance, outcome.cap, outcome.columns)
    texts = [*("-" if number is None else f"{number:.3f}" for number in numbers), str(trial.bytes_a_row)]
    cells = [f"{text:>{width}}" for text, width in zip(texts, _WIDTHS.values(), strict=True)]
    return f"{outcome.option.name:<33}{''.join(cells)}"


def explanation(trial: Trial) -> Iterator[str]:
    """Yield what the columns of the table mean, and what no defence changes."""
    epochs = counted(trial.job.epochs, "epoch", "epochs")
    yield f"utility: {trial.metric} on true labels of held-out rows, after {epochs}"
    yield "worst attack: the largest two-sided AUC of norm, direction, patient, spectral, completion and change"
    yield "patient: the attack that adds up all epochs; chance: the worst on shuffled labels"
    yield "cap: what no attack on the responses can pass, but for what a party's columns say anyway"
    yield "columns: the share of a party's columns that the label holder recovers from activations"
    for party, value in trial.raw.items():
        yield f"{party}: its raw columns and forty known labels have an AUC of {value:.3f}; nothing defends that"


def pasted(found: Sequence[Outcome], trial: Trial) -> Iterator[str]:
    """Yield the TOML of every option that was measured."""
    for outcome in found:
        if not outcome.problem and (outcome.option.labels or outcome.option.features):
            yield ""
            yield f"# {outcome.option.name}"
            yield from outcome.option.toml(trial.job.label_holder, trial.job.feature_parties)
    yield ""
    yield "# a deployed party that draws for its rows names a secret too: sl-queue key --private --out FILE"


def picture(found: Sequence[Outcome], trial: Trial) -> str:
    """Return an SVG of utility against the worst attack on labels; further left is safer, higher is better."""
    points = [(o.option.name, o.labels, o.utility) for o in found if o.labels is not None and o.utility is not None]
    heights = [utility for _, _, utility in points] or [0.0]
    low, high = min(heights), max(heights)
    span = (high - low) or 1.0
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 420" font-family="sans-serif" font-size="12">',
        '<rect width="760" height="420" fill="white"/>',
        '<path d="M60 20V380H560" fill="none" stroke="black"/>',
        '<text x="310" y="412" text-anchor="middle">worst attack on labels, two-sided AUC</text>',
        f'<text x="16" y="200" text-anchor="middle" transform="rotate(-90 16 200)">utility ({trial.metric})</text>',
    ]
    ticks = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    parts += [f'<text x="{_across(tick):.0f}" y="396" text-anchor="middle">{tick:.1f}</text>' for tick in ticks]
    for value in (low, high):
        y = 370 - 340 * (value - low) / span
        parts.append(f'<text x="54" y="{y + 4:.0f}" text-anchor="end">{value:.3f}</text>')
    for number, (name, attack, utility) in enumerate(points, 1):
        x, y = _across(attack), 370 - 340 * (utility - low) / span
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#2563a8"><title>{name}</title></circle>')
        parts.append(f'<text x="{x + 8:.1f}" y="{y - 6:.1f}">{number}</text>')
        parts.append(f'<text x="575" y="{20 + 18 * number}">{number} {name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _across(auc: float) -> float:
    return 60 + 1000 * (auc - 0.5)

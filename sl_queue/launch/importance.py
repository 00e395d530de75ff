"""Findings about a version: importances and evaluations, kept in its folder for reports."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sl_queue.compute.names import is_lower_better, metric_name
from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.errors import JobError
from sl_queue.protocol.text import counted
from sl_queue.storage.files import write_durably
from sl_queue.storage.model_card import with_table

NAME, EVALUATION, CARD = "importance.csv", "evaluation.json", "card.md"
REPEATS = 3  # permutations of each column
WHOLE = "(all)"


@dataclass(frozen=True, slots=True)
class Importance:
    """Worth of one party, or of one of its columns, to the model."""

    party: str
    column: str | None  # None: all of the party's columns together, which is what the party brings
    worse: float  # by how much the metric is worse without it: above 0 where it helps


@dataclass(frozen=True, slots=True)
class Explained:
    """Importances, and the result that they are measured against."""

    metric: str
    value: float
    rows: int
    importances: Sequence[Importance]

    def ranked(self) -> list[tuple[str, str, str]]:
        """Return a line for each, the most important first."""
        ranked = sorted(self.importances, key=lambda one: -one.worse)
        return [(one.party, one.column or WHOLE, f"{one.worse:.4g}") for one in ranked]

    def of(self, party: str, *, others: bool) -> "Explained":
        """Return what is kept at a party: its own columns, and of `others` what each brings in all."""
        kept = [one for one in self.importances if one.party == party or (others and one.column is None)]
        return Explained(self.metric, self.value, self.rows, kept)

    def keep(self, folder: Path) -> None:
        """Write a table of them beside a version's weights, and into its model card. Raises OSError."""
        self.write(folder / NAME)
        note = "By how much the metric is worse without it; columns that tell the same thing share their worth."
        _into_card(folder, "Importance", note, ("party", "column", f"{self.metric} worse by"), self.ranked())

    def write(self, path: Path) -> None:
        """Write a table of them, durably. Raises OSError."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [("party", "column", f"{self.metric} worse by"), *self.ranked()]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, text.getvalue().encode())


def keep_evaluation(folder: Path, found: Mapping[str, Any]) -> None:
    """Write an evaluation beside a version's weights, and its metrics into the model card. Raises OSError."""
    write_durably(folder / EVALUATION, json.dumps(found, indent=1).encode())
    rows = [(name, "undefined" if value is None else f"{value:.6g}") for name, value in found["metrics"].items()]
    _into_card(folder, "Evaluation", f"On {counted(found['rows'], 'row', 'rows')}.", ("metric", "value"), rows)


def _into_card(folder: Path, title: str, note: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    path = folder / CARD
    if path.exists():  # not in a folder of an earlier release
        write_durably(path, with_table(path.read_text(encoding="utf-8"), title, note, head, rows).encode())


def measure_of(job: Job, spec: PartySpec) -> tuple[str, float]:
    """Return the metric that parties are measured by, and 1 if it is better the lower it is, else -1.

    It is the first that the label holder's file names, else the loss. Raises JobError if its direction is not known.
    """
    objective, rule = spec.compute.objective, job.early_stopping
    assert objective is not None
    metric = next(iter(objective.metrics), "loss")
    name = metric_name(metric)
    source = metric["name"] if isinstance(metric, Mapping) else metric
    if isinstance(source, str) and ":" in source:
        source = spec.compute.code.load(source)
    said = getattr(source, "higher_is_better", None)
    if rule is not None and rule.mode is not None and rule.metric.removeprefix("train_") == name:
        lower: bool | None = rule.mode == "min"
    else:
        lower = is_lower_better(metric_name(source)) if said is None else not said
    if lower is None:
        raise JobError(
            f"party {spec.party!r}: whether {name!r}, the first of [fuse] metrics, is better when it is larger is not "
            'known; write "loss" or a metric of sl_queue or torchmetrics before it, or give it an attribute '
            "higher_is_better"
        )
    return name, 1.0 if lower else -1.0


def require_defined(metric: str, value: float | None, rows: int) -> float:
    """Return what was measured. Raises JobError if these rows do not define the metric."""
    if value is None or value != value:
        raise JobError(
            f"{metric} is not defined on the {counted(rows, 'row', 'rows')} of [predict], so nothing can get worse; "
            "take rows with different labels, of both classes for instance, or begin [fuse] metrics with another metric"
        )
    return value


def lines_of(path: Path) -> Iterator[str]:
    """Yield what a file says, for a report; nothing if there is none. Raises OSError."""
    if not path.exists():
        return
    head, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    yield f"{head[2]} without it, on rows with labels; columns that tell the same thing share their worth"
    for party, column, worse in rows:
        yield f"{party}  {' '.join(column.split())}  {worse}"


def evaluation_lines(path: Path) -> Iterator[str]:
    """Yield what an evaluation says, nothing if there is none. Raises OSError, ValueError, LookupError."""
    if path.exists():
        found = json.loads(path.read_bytes())
        yield f"on {counted(found['rows'], 'row', 'rows')}"
        yield from (f"{name}  {value}" for name, value in found["metrics"].items())

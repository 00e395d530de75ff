"""One file of a run that opens anywhere: what the live page shows, kept by the scheduler; and its curves as a table."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sl_queue.config.job import Job
from sl_queue.errors import CheckpointError
from sl_queue.launch.importance import EVALUATION, evaluation_lines, lines_of
from sl_queue.launch.importance import NAME as IMPORTANCE
from sl_queue.observe.activity import Spent, spent_of
from sl_queue.observe.keeper import read_kept
from sl_queue.observe.trace import MOST_EPOCHS, Trace
from sl_queue.observe.web import kept_page
from sl_queue.protocol.event_json import finite
from sl_queue.protocol.scheduler.state import Phase, RunState, history_line
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus, from_json
from sl_queue.protocol.scheduler.status import as_json as status_as_json
from sl_queue.storage.run_file import read_run
from sl_queue.storage.versions import choose_version

REPORT, CURVES = "report.html", "curves.csv"
FOUND = {"chaos.txt": "Under faults", "check.txt": "Check", "privacy.txt": "What each defence costs and keeps"}


def write_report(job: Job, state: Path, out: Path) -> tuple[Path, Path]:
    """Write report.html and curves.csv of the run in a scheduler's state folder. Raises CheckpointError, OSError."""
    run = read_run(state, job.canonical(), job.digest)
    if run is None or run.run is None:
        raise CheckpointError(f"{state} holds no run that has begun: name the scheduler's folder with --state")
    kept = read_kept(state)
    if kept is None or kept["status"]["run"] != run.run:
        kept = {**Trace().as_json(), "parties": {}, "log": []}  # by an earlier version, or lost
    epochs = [history_line(result) for result in run.history]
    every = len(epochs) // MOST_EPOCHS + 1
    status = _status(job, run, kept["status"], len(epochs))
    parties = {name: {**_nobody(), **kept["parties"].get(name, {})} for name in job.parties}
    document = {
        **kept,
        "status": status_as_json(status),
        "parties": parties,
        "epochs": epochs[::every],
        "bubble": _bubble({name: spent_of(party["whole"]) for name, party in parties.items()}),
        "extra": [{"title": title, "lines": lines} for title, lines in _sections(job, state)],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text(kept_page(finite(document)), encoding="utf-8")
    (out / CURVES).write_text(curves(kept["curves"]["points"], epochs), encoding="utf-8")
    return out / REPORT, out / CURVES


def _nobody() -> dict[str, Any]:
    nothing = Spent(0.0, 0.0, {}, {}).as_json()
    return {"lately": nothing, "whole": nothing, "lost": False}


def _status(job: Job, run: RunState, kept: Mapping[str, Any] | None, epochs: int) -> RunStatus:
    """Return where the run is by what is on disk, and for the rest by the last status that was kept."""
    told = RunStatus(phase=run.phase.value) if kept is None else from_json(kept)
    unknown = PartyStatus("finished" if run.phase is Phase.FINISHED else "")
    parties = {name: told.parties.get(name, unknown) for name in job.parties}
    last = run.history[-1] if epochs else None
    return replace(
        told,
        job=job.name,
        run=run.run,
        generation=run.generation,
        phase=run.phase.value,
        reason=run.reason,
        epoch=epochs,
        epochs=job.epochs,
        step=max(told.step, -1 if last is None else last.step),
        loss=told.loss if told.loss is not None or last is None else last.loss,
        parties=parties,
    )


def _bubble(whole: Mapping[str, Spent]) -> dict[str, Any] | None:
    busy = {name: spent.busy_s / spent.seconds for name, spent in whole.items() if spent.seconds > 0}
    if not busy:
        return None
    busiest = max(busy, key=busy.__getitem__)
    return {"measured": max(0.0, 1.0 - busy[busiest]), "of": busiest, "ideal": None}


# What other commands found ------------------------------------------------------------------------------------------


def _sections(job: Job, state: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield what lies beside the scheduler's folder, where it does, and the job."""
    for party in job.parties:
        found = _privacy(state.parent / party / "final" / "privacy.json")
        if found is not None:
            yield f"Privacy of {party}", [found]
        yield from _after(party, state.parent / party)
    for name, title in FOUND.items():
        path = next((place for place in (folder / name for folder in _beside(state)) if place.is_file()), None)
        if path is not None:
            yield title, path.read_text(errors="replace").strip().splitlines()
    importances = next((found for found in map(_importances, _beside(state)) if found), None)
    if importances is not None:
        yield "Importance of each party", importances
    yield "Job", json.dumps(job.canonical(), indent=2, default=str).splitlines()


def _after(party: str, state: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield what was found of a party's version in use since the run."""
    with suppress(CheckpointError, OSError, ValueError, LookupError, TypeError):  # there is none, or it was spoilt
        folder = choose_version(state).path
        if importance := list(lines_of(folder / IMPORTANCE)):
            yield f"What the columns of {party} are worth", importance
        if evaluated := list(evaluation_lines(folder / EVALUATION)):
            yield f"Evaluation at {party}", evaluated


def _beside(state: Path) -> tuple[Path, ...]:
    return state, state.parent, state.parent.parent


def _importances(folder: Path) -> list[str] | None:
    """Return what `sl-queue explain` found of whole parties; no report names a column."""
    try:
        with (folder / IMPORTANCE).open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        return [f"{party}: {head[2]} {worse} without it" for party, column, worse in rows if column == "(all)"] or None
    except (OSError, ValueError, IndexError):
        return None


def _privacy(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["text"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# Curves -------------------------------------------------------------------------------------------------------------


def curves(points: Sequence[Sequence[Any]], epochs: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of all points: one line a step that was seen, and one an epoch, in the order of their steps."""
    metrics = list(dict.fromkeys(name for epoch in epochs for name in epoch["holdout"] or {}))
    columns = ["step", "loss", "samples_per_s", "epoch", "mean_loss", *(f"held_out_{name}" for name in metrics)]
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": loss, "samples_per_s": rate} for step, loss, rate in finite(points)
    ]
    for epoch in finite(epochs):
        held_out = {f"held_out_{name}": value for name, value in (epoch["holdout"] or {}).items()}
        lines.append({"step": epoch["step"], "epoch": epoch["epoch"], "mean_loss": epoch["loss"], **held_out})
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(lines, key=lambda line: (line["step"], "epoch" in line)))
    return text.getvalue()

"""The commands for a trained model: predict, evaluate, versions, promote and export."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sl_queue.cli.options import MEMORY, Broker, JobPath, PartyPaths, read_broker_url
from sl_queue.errors import JobError
from sl_queue.protocol.text import counted

if TYPE_CHECKING:
    from sl_queue.compute.evaluated import Evaluation
    from sl_queue.config.party import PartyFile
    from sl_queue.launch.prediction import Predicted

Run = Annotated[
    str | None, typer.Option("--run", help="Run whose weights to use, as `sl-queue versions` names it; may be short.")
]
Keys = Annotated[
    Path | None, typer.Option(help="For a job that seals, over amqp://: a folder as `sl-queue provision` writes it.")
]
State = Annotated[
    Path | None, typer.Option("--state", help="Folder that holds STATE/<party>; default: the party files' state.")
]
PartyPath = Annotated[Path, typer.Argument(metavar="PARTY", help="The party file.")]


def predict(
    job: JobPath,
    parties: PartyPaths,
    run: Run = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the predictions; default: as [predict] says.")] = None,
    state: State = None,
    broker: Broker = None,
    keys: Keys = None,
) -> None:
    """Predict on this machine for the rows that the party files name under [predict]."""
    from sl_queue.launch.outcome import place_of, write_outcome

    holder, predicted = _predicted(job, parties, run, state, broker, keys, labels=False)
    for line in write_outcome(predicted, place_of(holder, out)):
        print(line)


def evaluate(
    job: JobPath,
    parties: PartyPaths,
    run: Run = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json; default: beside the label holder's file.")
    ] = None,
    state: State = None,
    broker: Broker = None,
    keys: Keys = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Evaluate on the rows that training held out, in place of [predict].")
    ] = False,
    test: Annotated[
        bool, typer.Option("--test", help="Evaluate on the rows that the job kept for a test, in place of [predict].")
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw calibration and thresholds: evaluation.svg.")] = False,
) -> None:
    """Predict as `predict` does, and compare with the labels in the label holder's table."""
    from sl_queue.launch.outcome import write_evaluation

    if held_out and test:
        raise JobError("--held-out and --test name two sets of rows; give one of them")
    holder, predicted = _predicted(job, parties, run, state, broker, keys, labels=True, held_out=held_out, test=test)
    folder = out or holder.folder or Path()
    found = write_evaluation(predicted, folder)
    print(f"run {predicted.version.run}, {counted(found.rows, 'row', 'rows')}: {folder / 'evaluation.json'}")
    for line in evaluation_lines(found):
        print(line)
    if plot:
        from sl_queue.observe.plots import evaluation_svg

        (folder / "evaluation.svg").write_text(evaluation_svg(found.tables), encoding="utf-8")
        print(folder / "evaluation.svg")


def explain(
    job: JobPath,
    parties: PartyPaths,
    run: Run = None,
    out: Annotated[Path | None, typer.Option(help="Folder for importance.csv; default: beside the first file.")] = None,
    state: State = None,
) -> None:
    """Tell what each party and each column is worth to the model, on rows of [predict] with labels (permutation)."""
    from sl_queue.config.job import Job, PartyFile

    agreed, files = Job.load(job), [PartyFile.load(path) for path in parties]
    from sl_queue.launch.importance import NAME
    from sl_queue.local.explaining import explain as explained
    from sl_queue.observe.console import stdout, table_of

    found = explained(agreed, files, {file.party: _state_of(file, state) for file in files}, run)
    print(f"{found.metric} {found.value:.6g} on {counted(found.rows, 'row', 'rows')}; worse by so much without")
    stdout().print(table_of(("party", "column", "worse by"), found.ranked()))
    path = (out or parties[0].parent) / NAME
    found.write(path)
    print(path)


def versions(job: JobPath, party: PartyPath, state: State = None) -> None:
    """List the versions of a party's trained parts."""
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.observe.console import stdout, table_of
    from sl_queue.storage.versions import choose_version, versions_in

    agreed, file = Job.load(job), PartyFile.load(party)
    folder = _state_of(file, state)
    found, used = versions_in(folder), choose_version(folder).run
    lines = [
        (
            version.run,
            version.finished_at or "",
            str(version.step + 1),
            " ".join(f"{name} {value:.4g}" for name, value in version.metrics.items() if value is not None),
            "this job" if version.job == agreed.digest else f"another job ({version.job[:12]})",
            "in use" if version.run == used else "",
        )
        for version in found
    ]
    stdout().print(table_of(("run", "finished", "steps", "held-out rows", "job", ""), lines))


def promote(
    job: JobPath,
    party: PartyPath,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run whose version is used from now on.")],
    state: State = None,
) -> None:
    """Put a version in use: `predict` takes it from now on, and a service takes it over without a pause."""
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.storage.versions import promote as put_in_use

    Job.load(job)
    before, version = put_in_use(_state_of(PartyFile.load(party), state), run)
    back = f"; to go back: promote {before}" if before is not None and before != version.run else ""
    print(f"run {version.run} is in use{back}")


def export(
    job: JobPath,
    party: PartyPath,
    to: Annotated[
        Literal["torch", "onnx"], typer.Option(help="torch: .pt2, by torch.export; onnx: needs sl_queue[onnx].")
    ],
    run: Run = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: the folder of the version.")] = None,
    state: State = None,
) -> None:
    """Export a party's trained parts, compared with the models on rows."""
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.launch.exporting import export_party

    agreed, file = Job.load(job), PartyFile.load(party)
    for done in export_party(agreed, file, _state_of(file, state), to, run, out):
        print(
            f"{done.path}: inputs {', '.join(done.inputs)}; differs by {done.difference:.1e} on "
            f"{counted(done.rows, 'row', 'rows')}"
        )


def evaluation_lines(found: "Evaluation") -> Iterator[str]:
    """Write an evaluation for a terminal."""
    for name, value in found.metrics.items():
        yield f"  {name:<18} {'undefined on these rows' if value is None else f'{value:.6g}'}"
    confusion = found.tables.get("confusion")
    if confusion is not None:
        yield "  confusion: a row for each true class, in it how many were taken for each"
        yield from (f"    {' '.join(f'{count:>8.6g}' for count in row)}" for row in confusion)
    thresholds = found.tables.get("thresholds")
    if thresholds is not None:
        yield "  threshold  precision     recall         f1   accuracy"
        yield from (f"  {''.join(f'{value:>9.3f}  ' for value in row)}" for row in thresholds)


def _predicted(
    job: Path,
    parties: list[Path],
    run: str | None,
    state: Path | None,
    broker: str | None,
    keys: Path | None,
    *,
    labels: bool,
    held_out: bool = False,
    test: bool = False,
) -> "tuple[PartyFile, Predicted]":
    from sl_queue.config.job import Job, PartyFile

    agreed = Job.load(job)
    files = [PartyFile.load(path) for path in parties]
    states = {file.party: _state_of(file, state) for file in files}
    from sl_queue.launch.asked import NAME, Asked
    from sl_queue.local.prediction import predict_threads
    from sl_queue.observe.console import Screen

    holders = [file for file in files if file.party == agreed.label_holder]
    leave_out = bool(holders and holders[0].predict is not None and holders[0].predict.missing == "leave-out")
    asked = Asked(NAME, run, labels, leave_out, held_out, test)
    url = read_broker_url(broker or MEMORY)
    with Screen(epochs=False) as screen:
        predicted = predict_threads(agreed, files, states, asked, screen.status, url, keys)
    return holders[0], predicted


def _state_of(file: "PartyFile", state: Path | None) -> Path:
    folder = file.state if state is None else state / file.party
    if folder is None:
        raise JobError(f"party {file.party!r} has no state folder: set `state` in its file, or give --state DIR")
    return folder

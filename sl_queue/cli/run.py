"""The commands that train on this machine: demo, local, compare and chaos."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sl_queue.cli.options import MEMORY, Broker, JobPath, PartyPaths, read_broker_url
from sl_queue.cli.watching import Watch, shown_if, told_to
from sl_queue.errors import JobError, RunStopped

if TYPE_CHECKING:  # torch takes seconds to import: only the commands that need it do
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.launch.scheduler import OnStatus
    from sl_queue.local.processes import Place

MOST_HANDS = 256  # of one party on one machine

Out = Annotated[
    Path | None, typer.Option(help="State under OUT/<party> and OUT/scheduler; default: the party files' state.")
]
Keys = Annotated[
    Path | None, typer.Option(help="For a job that seals, over amqp://: a folder as `sl-queue provision` writes it.")
]
From = Annotated[
    Path | None,
    typer.Option("--from", help="Begin with the final weights of an earlier run, under FROM/<party>; over memory://."),
]
Hands = Annotated[
    list[str] | None,
    typer.Option(metavar="PARTY=COUNT", help="Hands that compute a party's micro-batches; may be repeated."),
]


def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: a new temporary one.")] = None,
    watch: Watch = False,
) -> None:
    """Train on scikit-learn's digits, offline: the joint model beats each party alone."""
    from tempfile import mkdtemp

    from sl_queue.config.job import Job
    from sl_queue.local.demo import run_demo, write_demo

    folder = Path(mkdtemp(prefix="sl_queue-demo-")) if out is None else out
    write_demo(folder)
    with shown_if(watch, Job.load(folder / "job.toml")) as tell:
        run_demo(folder, tell)


def local(
    job: JobPath,
    parties: PartyPaths,
    broker: Broker = None,
    out: Out = None,
    keys: Keys = None,
    start: From = None,
    watch: Watch = False,
    hands: Hands = None,
) -> None:
    """Train with every role on this machine: threads over memory:// (the default), a process each over amqp://."""
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.observe.console import history_table, stdout

    agreed = Job.load(job)
    files = {path: PartyFile.load(path) for path in parties}
    from sl_queue.local.threads import (
        require_all,  # not before: torch takes seconds to import, and the files may be wrong
    )

    require_all(agreed, list(files.values()))
    places = places_of(agreed, files, out)
    counts = _hands(agreed, files, hands or [])
    url = read_broker_url(broker or MEMORY)
    if start is not None:
        if not url.startswith(MEMORY):
            raise JobError("--from is for memory://; over a broker write [start] from = DIR into each party's file")
        files = {path: file.replace(start={"from": start / file.party}) for path, file in files.items()}
    with shown_if(watch, agreed) as tell:
        if url.startswith(MEMORY):
            history = _run_threads(agreed, list(files.values()), places, tell, counts)
        else:
            places = {role: replace(place, hands=counts.get(role)) for role, place in places.items()}
            history = _run_processes(agreed, job, list(files.values()), places, url, keys, tell)
    console = stdout()
    console.print(history_table(history))
    for role, place in places.items():
        for weights in _final_weights(place.state):
            console.print(f"{role}: {weights}", soft_wrap=True)


def compare(job: JobPath, parties: PartyPaths) -> None:
    """Train with all parties, with each one alone, and joined in one process; print how well each model does."""
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.local import comparing

    agreed, files = Job.load(job), [PartyFile.load(path) for path in parties]
    found = []
    for outcome in comparing.compare(agreed, files):
        print(f"trained: {outcome.name}", file=sys.stderr, flush=True)
        found.append(outcome)
    print("\n".join(comparing.lines(found)))


def chaos(
    job: JobPath,
    parties: PartyPaths,
    kills: Annotated[int, typer.Option(min=0, help="Workers killed with SIGKILL.")] = 6,
    broker_restarts: Annotated[int, typer.Option(min=0, help="Each broker killed, and started on its data.")] = 1,
    cuts: Annotated[int, typer.Option(min=0, help="Connections cut, delayed or half-open.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of which faults come when.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for both runs, empty or new; default: a temporary one.")
    ] = None,
    keys: Keys = None,
    hands: Hands = None,
) -> None:
    """Train once in peace and once under faults, with a private broker: not one bit of the weights may differ.

    The run in peace has no hands.
    """
    from tempfile import TemporaryDirectory

    from sl_queue.config.job import Job, PartyFile
    from sl_queue.local.threads import require_all
    from sl_queue.observe.console import keep, stdout
    from sl_queue.testing.chaos import run_chaos
    from sl_queue.testing.faults import FaultPlan
    from sl_queue.testing.report import report

    agreed = Job.load(job)
    files = {path: PartyFile.load(path) for path in parties}
    require_all(agreed, list(files.values()))
    paths = {file.party: path for path, file in files.items()}
    plan = FaultPlan(kills, broker_restarts, cuts, seed)
    with TemporaryDirectory(prefix="sl_queue-chaos-") as temporary:
        folder, counts = out or Path(temporary), _hands(agreed, files, hands or [])
        comparison = run_chaos(agreed, job, paths, folder, plan, _say, hands=counts, keys=keys)
    shown = report(comparison)
    stdout().print(shown, soft_wrap=True)
    if out is not None:
        keep(out / "chaos.txt", shown)  # for `sl-queue report`
    raise typer.Exit(0 if comparison.passed else 1)


def _say(text: str) -> None:
    print(text, flush=True)


def places_of(job: "Job", files: "Mapping[Path, PartyFile]", out: Path | None) -> "dict[str, Place]":
    """Return each role's file and state folder; without --out the scheduler's is beside the label holder's."""
    from sl_queue.config.resolve import require_apart
    from sl_queue.local.processes import Place
    from sl_queue.protocol.messages import SCHEDULER

    if out is None:
        require_apart(list(files.values()))
    places = {}
    for path, file in files.items():
        state = file.state if out is None else out / file.party
        if state is None:
            raise JobError(f"{path}: party {file.party!r} has no `state` folder; set it, or give --out DIR")
        places[file.party] = Place(path, state)
    of_scheduler = (places[job.label_holder].state.parent if out is None else out) / SCHEDULER
    for party, place in places.items():
        if place.state.resolve() == of_scheduler.resolve():
            told = f"{place.party_file}: state = {place.state}"
            raise JobError(f"{told} is the scheduler's folder here; give party {party!r} another, or give --out DIR")
    return {**places, SCHEDULER: Place(None, of_scheduler)}


def _hands(job: "Job", files: "Mapping[Path, PartyFile]", asked: list[str]) -> dict[str, int]:
    """Return how many hands each party gets that has any, or may have: one whose file has [hands]. Raises JobError."""
    counts = {file.party: 0 for file in files.values() if file.hands is not None}
    for text in asked:
        party, _, count = text.rpartition("=")
        if party not in job.parties or not count.isdecimal() or int(count) > MOST_HANDS:
            raise JobError(f"--hands {text}: it must be PARTY=COUNT, with one of {', '.join(job.parties)}")
        counts[party] = int(count)
    return counts


def _run_threads(
    job: "Job", files: "list[PartyFile]", places: "dict[str, Place]", tell: "OnStatus", hands: Mapping[str, int]
) -> list[dict[str, Any]]:
    from sl_queue.local.threads import run_threads
    from sl_queue.observe.console import Screen

    states = {role: place.state for role, place in places.items()}
    with Screen() as screen:
        return run_threads(job, files, MEMORY, states, told_to(screen.status, tell), hands=hands).history


def _run_processes(
    job: "Job",
    job_file: Path,
    files: "list[PartyFile]",
    places: "dict[str, Place]",
    broker: str,
    keys: Path | None,
    tell: "OnStatus",
) -> list[dict[str, Any]]:
    from sl_queue.launch.connect import sealing
    from sl_queue.local.processes import read_history, run_processes
    from sl_queue.local.threads import compare_with_finished, have_finished, key_in
    from sl_queue.observe.console import Screen
    from sl_queue.protocol.messages import OPERATOR, SCHEDULER

    states = {role: place.state for role, place in places.items()}
    if have_finished(job, states):
        compare_with_finished(job, files, states)
        print("already finished: every party holds its final weights", file=sys.stderr)
        return read_history(places[SCHEDULER].state)
    places = {role: replace(place, key=key_in(keys, role)) for role, place in places.items()}
    seal = sealing(job, OPERATOR, key_in(keys, OPERATOR), broker)
    with Screen(epochs=False) as screen:
        failure = run_processes(job, job_file, places, broker, screen, seal, tell)
    if failure is not None:
        print(f"error: {failure.worker}: {failure.reason}", file=sys.stderr)
        raise typer.Exit(failure.exit_code)
    if not all(_final_weights(places[party].state) for party in job.parties):
        raise RunStopped("before the last epoch, as asked; the same command resumes")
    return read_history(places[SCHEDULER].state)


def _final_weights(state: Path) -> list[Path]:
    return sorted((state / "final").glob("*.safetensors"))

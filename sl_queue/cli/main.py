"""The command `sl-queue`."""

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sl_queue.config.environment import BROKER, DEBUG, KEY
from sl_queue.errors import JobError, PeerSilent, RunStopped
from sl_queue.launch.process import leaving

if TYPE_CHECKING:  # torch takes seconds to import: only the commands that need it do
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.local.processes import Place

MEMORY = "memory://"


class _Commands(TyperGroup):
    """Whatever a command raises leaves as one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with leaving(on_interrupt="interrupted; the same command goes on from the last checkpoint"):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # [pipeline] is a table of the job, not a colour
    help="Split learning over RabbitMQ: train one model with layers at several parties, without moving a column.",
)

JobPath = Annotated[Path, typer.Argument(metavar="JOB", help="The job file, the same at every party.")]
PartyPaths = Annotated[list[Path], typer.Argument(metavar="PARTY...", help="The party files.")]
Broker = Annotated[
    str | None,
    typer.Option(envvar=BROKER.name, show_envvar=True, help="URL of the broker, or file:PATH of a file with it."),
]
OperatorKey = Annotated[
    Path | None,
    typer.Option("--key", envvar=KEY.name, show_envvar=True, help="The operator's key, if the job seals."),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks, as {DEBUG.name}=1 does.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG.name] = "1"


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: a new temporary one.")] = None,
) -> None:
    """Train on scikit-learn's digits, offline: the joint model beats each party alone."""
    from sl_queue.local.demo import run_demo

    run_demo(out)


@app.command()
def check(
    job: JobPath,
    parties: Annotated[list[Path] | None, typer.Argument(metavar="[PARTY...]", help="The party files at hand.")] = None,
    broker: Broker = None,
) -> None:
    """Find everything that can be wrong before anything is started."""
    from sl_queue.checking.check import check_job
    from sl_queue.observe.console import show_finding, stdout

    console = stdout()
    raise typer.Exit(check_job(job, parties or [], broker, lambda finding: show_finding(console, finding)))


@app.command()
def plan(
    job: JobPath,
    parties: PartyPaths,
    rtt: Annotated[float, typer.Option(min=0, help="Milliseconds from a feature party to the broker and back.")] = 0.0,
    bandwidth: Annotated[float | None, typer.Option(min=0.001, help="Mbit/s of that link; default: no limit.")] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores that all parties share, if on one machine.")] = None,
) -> None:
    """Measure a few steps here, and rank the pipelines: which [pipeline] and [wire] are fastest over that link."""
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.planning.measuring import Link
    from sl_queue.planning.plan import lines, plan_job

    found = plan_job(Job.load(job), [PartyFile.load(path) for path in parties], Link(rtt, bandwidth, cores))
    print("\n".join(lines(found)))


@app.command()
def local(
    job: JobPath,
    parties: PartyPaths,
    broker: Broker = None,
    out: Annotated[
        Path | None, typer.Option(help="State under OUT/<party> and OUT/scheduler; default: the party files' state.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="For a job that seals, over amqp://: a folder as `sl-queue provision` writes it."),
    ] = None,
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
    places = _places(agreed, files, out)
    url = _read_url(broker or MEMORY)
    if url.startswith(MEMORY):
        history = _run_threads(agreed, list(files.values()), places)
    else:
        history = _run_processes(agreed, job, list(files.values()), places, url, keys)
    console = stdout()
    console.print(history_table(history))
    for role, place in places.items():
        for weights in _final_weights(place.state):
            console.print(f"{role}: {weights}", soft_wrap=True)


def _places(job: "Job", files: "Mapping[Path, PartyFile]", out: Path | None) -> "dict[str, Place]":
    """Each role's file and state folder; without --out the scheduler's is beside the label holder's."""
    from sl_queue.local.processes import Place
    from sl_queue.protocol.messages import SCHEDULER

    places = {}
    for path, file in files.items():
        state = file.state if out is None else out / file.party
        if state is None:
            raise JobError(f"{path}: party {file.party!r} has no `state` folder; set it, or give --out DIR")
        places[file.party] = Place(path, state)
    beside = places[job.label_holder].state.parent if out is None else out
    return {**places, SCHEDULER: Place(None, beside / SCHEDULER)}


def _run_threads(job: "Job", files: "list[PartyFile]", places: "dict[str, Place]") -> list[dict[str, Any]]:
    from sl_queue.local.threads import run_threads
    from sl_queue.observe.console import Screen

    states = {role: place.state for role, place in places.items()}
    with Screen() as screen:
        return run_threads(job, files, MEMORY, states, screen.status).history


def _run_processes(
    job: "Job", job_file: Path, files: "list[PartyFile]", places: "dict[str, Place]", broker: str, keys: Path | None
) -> list[dict[str, Any]]:
    from dataclasses import replace

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
        failure = run_processes(job, job_file, places, broker, screen, seal)
    if failure is not None:
        print(f"error: {failure.worker}: {failure.reason}", file=sys.stderr)
        raise typer.Exit(failure.exit_code)
    if not all(_final_weights(places[party].state) for party in job.parties):
        raise RunStopped("before the last epoch, as asked; the same command resumes")
    return read_history(places[SCHEDULER].state)


def _final_weights(state: Path) -> list[Path]:
    return sorted((state / "final").glob("*.safetensors"))


@app.command()
def status(
    job: JobPath,
    broker: Broker = None,
    key: OperatorKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Tell where the run is, who is late and why.

    Exits 0 if the scheduler tells it now or the run has ended, 6 if the run failed, 75 if the scheduler is silent.
    """
    from sl_queue.config.job import Job
    from sl_queue.observe.console import status_view, stdout

    agreed, url = Job.load(job), _network(broker)
    from sl_queue.launch.connect import sealing
    from sl_queue.launch.operator import watch_status
    from sl_queue.protocol.messages import OPERATOR

    telling = watch_status(agreed, url, sealing(agreed, OPERATOR, key, url))
    if telling is None:
        raise PeerSilent(f"{job}: no scheduler has told anything of this job at that broker; start workers.scheduler")
    if as_json:
        print(json.dumps(telling.as_json(time.time())))
    else:
        stdout().print(status_view(telling, time.time()), soft_wrap=True)
    raise typer.Exit(telling.exit_code)


@app.command()
def stop(job: JobPath, broker: Broker = None, key: OperatorKey = None) -> None:
    """Stop the run in an orderly way at the next commit; a later start resumes."""
    from sl_queue.config.job import Job

    agreed, url = Job.load(job), _network(broker)
    from sl_queue.launch.connect import sealing
    from sl_queue.launch.operator import request_stop
    from sl_queue.protocol.messages import OPERATOR

    print(request_stop(agreed, url, sealing(agreed, OPERATOR, key, url)))


Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; needed where nobody can be asked.")]


@app.command()
def dead(
    job: JobPath,
    parties: Annotated[list[str] | None, typer.Argument(metavar="[PARTY...]", help="Names; default: all.")] = None,
    broker: Broker = None,
    requeue: Annotated[bool, typer.Option("--requeue", help="Put them back into the queues they came from.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="Remove them.")] = False,
    yes: Yes = False,
) -> None:
    """Show the messages that workers refused, from whom and why; put them back, or remove them."""
    from sl_queue.config.job import Job

    if requeue and purge:
        raise JobError("--requeue and --purge: give one of them")
    agreed, url = Job.load(job), _network(broker)
    from sl_queue.cli.housekeeping import describe_dead, parties_of, purge_dead, put_back, read_dead

    chosen = parties_of(agreed, parties or [])
    found = read_dead(agreed, url, chosen)
    _print_lines(describe_dead(agreed, url, found, time.time()))
    filled = [party for party, letters in found.items() if isinstance(letters, list) and letters]
    if filled and requeue:
        _require_consent(f"put back the dead letters of {', '.join(filled)}", yes)
        _print_lines(put_back(agreed, url, filled))
    if filled and purge:
        _require_consent(f"remove the dead letters of {', '.join(filled)} for good", yes)
        _print_lines(purge_dead(agreed, url, filled))


@app.command()
def cleanup(
    job: JobPath,
    broker: Broker = None,
    force: Annotated[bool, typer.Option("--force", help="Also while workers are connected.")] = False,
    yes: Yes = False,
) -> None:
    """Remove what a finished or abandoned job left at the broker: its queues with all messages, and its exchanges."""
    from sl_queue.config.job import Job

    agreed, url = Job.load(job), _network(broker)
    from sl_queue.cli.housekeeping import describe_remains, find_remains, remove_remains

    remains = find_remains(agreed, url, force=force)
    _print_lines(describe_remains(agreed, url, remains))
    if remains.queues or remains.exchanges:
        _require_consent("remove all of it for good", yes)
        print(remove_remains(agreed, url, remains, force=force))


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _require_consent(what: str, yes: bool) -> None:
    """Ask whoever sits there. Raises JobError where nobody does."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise JobError(f"nobody can be asked whether to {what}: add --yes")
    if not typer.confirm(f"{what[0].upper()}{what[1:]}?"):
        raise typer.Exit(1)


@app.command()
def key(
    out: Annotated[Path, typer.Option(help="The file for the private key; it must not be there yet.")],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A party of the job, scheduler or operator.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a secret for a party's random draws instead; it has no NAME.")
    ] = False,
) -> None:
    """Make a key for sealing messages; prints the public part, for the job."""
    if private == (name is not None):
        told = "a secret has no NAME: leave it out" if private else "whose key? give the NAME of a party, or --private"
        raise JobError(told)
    if private:
        _make_secret(out)
    else:
        _make_key(str(name), out)


def _make_secret(out: Path) -> None:
    from sl_queue.storage.secret_file import write_secret

    write_secret(out)
    print(f"# {out} stays with its party, beside its file; a run that was begun with it goes on only with it")
    print(f"[privacy]\nsecret = {json.dumps(str(out))}")


def _make_key(name: str, out: Path) -> None:
    from sl_queue.protocol.messages import SCHEDULER
    from sl_queue.security.keys import PrivateKey, write_key

    made = PrivateKey.generate(signs=name == SCHEDULER)
    write_key(out, made)
    print(f"[security.keys.{name}]")
    for field, text in made.public.texts().items():
        print(f'{field} = "{text}"')


@app.command()
def provision(
    job: JobPath,
    broker_host: Annotated[
        list[str], typer.Option(help="Name or address of the broker; again for each further node, tried in turn.")
    ],
    out: Annotated[Path, typer.Option(help="A folder for all folders; what is there is kept.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the broker listens.")] = 5671,
    at: Annotated[str, typer.Option(help="Where a role's folder will lie; '.' if its worker is started in it.")] = ".",
    broker_at: Annotated[str, typer.Option(help="Where the broker's folder will lie.")] = "/etc/sl_queue",
    client_certificates: Annotated[
        bool, typer.Option("--client-certificates", help="Log in with certificates instead of passwords.")
    ] = False,
    rotate: Annotated[
        list[str] | None, typer.Option(help="logins, certificates, authority or keys: make these anew.")
    ] = None,
) -> None:
    """Write everything a deployment needs: one folder for each party, one for the broker."""
    from datetime import UTC, datetime

    from sl_queue.config.job import Job
    from sl_queue.deployment.provision import Place, Secret, provision

    kinds = [kind.value for kind in Secret]
    unknown = [name for name in rotate or [] if name not in kinds]
    if unknown:
        raise JobError(f"--rotate {unknown[0]}: it must be {', '.join(kinds)}")
    agreed = Job.load(job)
    place = Place(tuple(broker_host), port, at, broker_at, client_certificates)
    keys = provision(agreed, place, out, frozenset(Secret(name) for name in rotate or []), datetime.now(UTC))
    print(f"{out / 'broker'}: for {broker_at} on the machine of the broker")
    for role in keys:
        print(f"{out / role}: for {role}")
    print(f"{out / 'authority'}: keep ca.key away from all of them")
    listed = {name: public.model_dump(exclude_none=True) for name, public in agreed.security.keys.items()}
    if listed != {name: public.texts() for name, public in keys.items()}:
        print(f"{out / 'security.toml'}: put this into {job}, at every party, and messages are sealed")


@app.command()
def chaos(
    job: JobPath,
    parties: PartyPaths,
    kills: Annotated[int, typer.Option(min=0, help="Workers killed with SIGKILL.")] = 6,
    broker_restarts: Annotated[int, typer.Option(min=0, help="The broker killed, and started on its data.")] = 1,
    cuts: Annotated[int, typer.Option(min=0, help="Connections cut, delayed or half-open.")] = 2,
    seed: Annotated[int, typer.Option(help="Which faults come when.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for both runs, empty or new; default: a temporary one.")
    ] = None,
) -> None:
    """Train once in peace and once under faults, with a private broker: not one bit of the weights may differ."""
    from tempfile import TemporaryDirectory

    from sl_queue.config.job import Job, PartyFile
    from sl_queue.local.threads import require_all
    from sl_queue.observe.console import stdout
    from sl_queue.testing.chaos import Storm, run_chaos
    from sl_queue.testing.report import report

    agreed = Job.load(job)
    files = {path: PartyFile.load(path) for path in parties}
    require_all(agreed, list(files.values()))
    paths = {file.party: path for path, file in files.items()}
    storm = Storm(kills, broker_restarts, cuts, seed)
    with TemporaryDirectory(prefix="sl_queue-chaos-") as temporary:
        verdict = run_chaos(agreed, job, paths, out or Path(temporary), storm, lambda text: print(text, flush=True))
    stdout().print(report(verdict), soft_wrap=True)
    raise typer.Exit(0 if verdict.passed else 1)


def _read_url(broker: str) -> str:
    from sl_queue.config.party import read_url

    return read_url(broker)


def _network(broker: str | None) -> str:
    if broker is None:
        raise JobError("which broker? give --broker amqps://... or set SL_QUEUE_BROKER")
    url = _read_url(broker)
    if url.startswith(MEMORY):
        raise JobError("a run over memory:// lives in one process and shows itself there; Ctrl-C stops it")
    return url


def main() -> None:
    """The entry point of the command."""
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word != "--debug")  # wherever it stands, it is meant for all
    app()

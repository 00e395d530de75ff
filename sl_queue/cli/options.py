"""Arguments and options that the commands share, by type, and the reading of and asking for what they need."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sl_queue.config.environment import BROKER, KEY
from sl_queue.errors import JobError

MEMORY = "memory://"

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
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation; required where nobody can answer.")]


def read_broker_url(broker: str) -> str:
    """Return the URL that was given, or the one in the file that `file:PATH` names."""
    from sl_queue.config.broker_url import read_url

    return read_url(broker)


def network_url(broker: str | None) -> str:
    """Return the URL of a broker that other processes reach. Raises JobError if there is none."""
    if broker is None:
        raise JobError("which broker? give --broker amqps://... or set SL_QUEUE_BROKER")
    url = read_broker_url(broker)
    if url.startswith(MEMORY):
        raise JobError("a run over memory:// lives in one process and shows its progress there; Ctrl-C stops it")
    return url


def print_lines(lines: Iterable[str]) -> None:
    """Print each line as soon as it is known."""
    for line in lines:
        print(line, flush=True)


def require_consent(what: str, yes: bool) -> None:
    """Ask whoever sits there. Raises JobError where nobody does."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise JobError(f"this would {what}, and nobody is here to confirm it: add --yes")
    if not typer.confirm(f"{what[0].upper()}{what[1:]}?"):
        raise typer.Exit(1)

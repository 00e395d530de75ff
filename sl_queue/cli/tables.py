"""The commands about tables: `features` of one party, and `align` of all."""

from pathlib import Path
from typing import Annotated

import typer

from sl_queue.cli.options import MEMORY, Broker, JobPath, PartyPaths, read_broker_url
from sl_queue.errors import JobError


def features(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="The job file, the same at every party.")],
    party: Annotated[Path, typer.Argument(metavar="PARTY", help="The party file.")],
    write: Annotated[
        bool, typer.Option("--write", help="Propose a [features] from the table, and append it to the party file.")
    ] = False,
) -> None:
    """Tell what [features] makes of a party's table: columns, gaps, categories and their counts; never a row."""
    from sl_queue.checking.features import features_lines, proposal
    from sl_queue.config.job import Job, PartyFile

    agreed, file = Job.load(job), PartyFile.load(party)
    if write:
        proposed = proposal(agreed, file)
        proposed.write(party)
        print(proposed.text, end="")
        return
    for line in features_lines(agreed, file):
        print(line)


def align(
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
    """Find the rows that all parties hold, on this machine: prints sizes, trains nothing."""
    from sl_queue.cli.run import places_of
    from sl_queue.config.job import Job, PartyFile

    agreed = Job.load(job)
    if agreed.alignment.method != "psi":
        raise JobError(f'{job}: alignment.method is "equal", so all parties hold the same ids; set it to "psi"')
    files = {path: PartyFile.load(path) for path in parties}
    states = {role: place.state for role, place in places_of(agreed, files, out).items()}
    from sl_queue.local.aligning import align_threads
    from sl_queue.observe.console import Screen

    with Screen(epochs=False) as screen:
        found = align_threads(
            agreed, list(files.values()), states, screen.status, read_broker_url(broker or MEMORY), keys
        )
    for party, aligned in found.items():
        print(f"{party}: {len(aligned.positions)} of its {aligned.rows} rows are shared by all; {states[party]}")

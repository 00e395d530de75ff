"""The commands about a party's table: `features`."""

from pathlib import Path
from typing import Annotated

import typer


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
        proposed = proposal(file)
        proposed.write(party)
        print(proposed.text, end="")
        return
    for line in features_lines(agreed, file):
        print(line)

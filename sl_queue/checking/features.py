"""The command `sl-queue features`: what a party's [features] makes of its table, or a proposal for one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import agree, table_spec
from sl_queue.config.user_code import Importer
from sl_queue.data.feature_report import describe, propose
from sl_queue.data.feature_specs import Number
from sl_queue.data.features import Fitted
from sl_queue.data.rows import read_raw
from sl_queue.data.table import read_table
from sl_queue.errors import JobError
from sl_queue.launch.rows import aligned_before
from sl_queue.protocol.text import counted


@dataclass(frozen=True, slots=True)
class Proposal:
    """A [features] table for a party file that has none."""

    text: str

    def write(self, path: Path) -> None:
        """Append it to the party file. Raises JobError."""
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n{self.text}")
        except OSError as error:
            raise JobError(f"{path}: cannot be written ({error.strerror})") from None


def features_lines(job: Job, party_file: PartyFile) -> Iterator[str]:
    """Yield what [features] makes of the rows that the party would train on. Raises JobError."""
    agree(job, party_file)
    if party_file.features is None:
        yield (
            f"{party_file.party}: its file has no [features], so every column but id and label must be a number "
            "without gaps; `sl-queue features --write` proposes a [features] from the table"
        )
        return
    spec, aligned = table_spec(job, party_file, Importer()), None
    if job.alignment.method == "psi":
        aligned = None if party_file.state is None else aligned_before(spec, party_file.state)
        if aligned is None:
            yield f"{party_file.party}: its rows are not aligned yet, so all of them are taken here"
    table = read_table(spec, None if aligned is None else aligned.positions)
    if table.fitted is None:
        yield f"{party_file.party}: the job gives it no cut, so it trains on no features"
        return
    first, *others = describe(Fitted.of_json(table.fitted))
    yield f"{party_file.party}: {counted(table.n_rows, 'row', 'rows')}; {first}"
    yield from others


def proposal(job: Job, party_file: PartyFile) -> Proposal:
    """Propose a [features] table from the raw table. Raises JobError if the file has one already."""
    if party_file.features is not None:
        raise JobError(f"party {party_file.party!r}: its file has a [features] already; remove it to have one proposed")
    return Proposal(propose(read_raw(table_spec(job, party_file, Importer()), {"*": Number()})))

"""Everything that can be wrong with a job, found before anything is started.

It goes on after a finding as far as what was found allows, and starts no worker. Of rows it tells counts, never ids.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sl_queue.commands.broker_check import brokers, message_sizes
from sl_queue.commands.dry_run import Readable, compare_with_joined, dry_run
from sl_queue.commands.findings import Check, Finding
from sl_queue.data.table import read_table
from sl_queue.errors import AlignmentError
from sl_queue.job import Job, PartyFile
from sl_queue.launch.party import PREFETCH_MARGIN
from sl_queue.protocol.agreement import differing_id_types
from sl_queue.protocol.pipeline import Action, Commit, Update, notation
from sl_queue.protocol.row_order import Batches

SPELLED_OUT_STEPS = 3


def check_job(job_file: Path, party_files: Sequence[Path], broker: str | None, say: Callable[[Finding], None]) -> int:
    """Tell all findings to `say` as they are made; returns the exit code of the first error, or 0."""
    check = Check(say)
    job = check.attempt(lambda: Job.load(job_file))
    files = [file for path in party_files if (file := check.attempt(lambda path=path: PartyFile.load(path)))]  # type: ignore[misc]
    if job is not None:
        check.ok(f"{job_file}: job {job.name!r}, parties {', '.join(job.parties)}, digest {job.digest[:12]}")
        _check_with_job(check, job, files, broker)
    return check.exit_code


def _check_with_job(check: Check, job: Job, files: Sequence[PartyFile], broker: str | None) -> None:
    readable = [file for file in files if check.attempt(lambda file=file: _belongs(job, file))]  # type: ignore[misc]
    parties = {file.party: party for file in readable if (party := _read(check, job, file))}
    aligned = _compare_rows(check, parties)
    n_rows = next(iter(parties.values())).table.n_rows if parties else None
    batches = None if n_rows is None else check.attempt(lambda: job.batches(n_rows))
    if batches is not None:
        payloads = dry_run(check, job, parties, batches)
        if aligned and check.exit_code == 0 and set(parties) == set(job.parties):
            check.attempt(lambda: compare_with_joined(check, job, parties, batches))
        message_sizes(check, job, payloads, batches)
    missing = [party for party in job.parties if party not in parties]
    if missing:
        check.note(f"not looked at: {', '.join(missing)} (no readable party file was given)")
    _say_what_is_not_joined(check, job)
    _spell_out(check, job, batches)
    brokers(check, job, files, broker)


def _belongs(job: Job, file: PartyFile) -> bool:
    file.check(job)
    return True


def _read(check: Check, job: Job, file: PartyFile) -> Readable | None:
    table = check.attempt(lambda: read_table(job, file))
    if table is None:
        return None
    features = "no base model, so no features" if table.features is None else f"features {table.features.shape[1:]}"
    labels = "" if table.labels is None else f", labels {table.labels.dtype}"
    check.ok(f"{file.party}: {table.n_rows} rows, ids are {table.id_type}, {features}{labels}")
    for note in table.notes:
        check.note(f"{file.party}: {note}")
    return Readable(file, table)


def _compare_rows(check: Check, parties: Mapping[str, Readable]) -> bool:
    """Whether all parties at hand hold the same ids."""
    if len({(p.table.digest, p.table.id_type) for p in parties.values()}) <= 1:
        if len(parties) > 1:
            check.ok(f"rows: {', '.join(parties)} hold the same ids")
        return True
    held = ", ".join(f"{name} {p.table.n_rows} ({p.table.id_type} ids)" for name, p in parties.items())
    types = {name: party.table.id_type for name, party in parties.items()}
    remedy = differing_id_types(types) if len(set(types.values())) > 1 else "keep the rows that all hold"
    check.error(AlignmentError(f"the parties' ids differ; rows: {held}; {remedy}"))
    return False


def _say_what_is_not_joined(check: Check, job: Job) -> None:
    """What makes a run another training than the joined one; it is repeated and resumed exactly all the same."""
    if job.pipeline.staleness:
        check.note(
            f"staleness = {job.pipeline.staleness}: activations are computed with weights of up to so many steps "
            "before; the final weights are not those of joined training"
        )
    if job.wire.dtype != "float32":
        check.note(
            f"[wire] dtype = {job.wire.dtype!r}: activations and gradients are rounded on their way; the final "
            "weights are near those of joined training, not equal"
        )


def _spell_out(check: Check, job: Job, batches: Batches | None) -> None:
    """The order of work from the first step on."""
    if batches is None:
        return
    pipeline = job.pipeline_of(batches)
    check.note(
        f"steps: {batches.steps_per_epoch} an epoch, {batches.steps} in all; "
        f"{batches.training_rows} rows to train on, {batches.holdout_rows} held out"
    )
    check.note(f"order of work, a feature party: {notation(_first_steps(pipeline.feature_actions(0)))} ...")
    check.note(f"order of work, the label holder: {notation(_first_steps(pipeline.label_actions(0)))} ...")
    check.note(f"prefetch: at most {pipeline.prefetch + PREFETCH_MARGIN} unacknowledged messages of each sender")


def _first_steps(actions: Iterable[Action]) -> Iterator[Action]:
    """Up to the third update or the first commit."""
    for action in actions:
        yield action
        if isinstance(action, Commit) or action == Update(SPELLED_OUT_STEPS - 1):
            return

"""Everything that can be wrong with a job, found before anything is started.

It goes on after a finding as far as what was found allows, and starts no worker. Of rows it tells counts, never ids.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from sl_queue.checking.against_joined import compare_with_joined
from sl_queue.checking.broker import brokers, message_sizes
from sl_queue.checking.capacity import described, load_of, objections
from sl_queue.checking.data_report import report_data
from sl_queue.checking.dry_run import DryRun, Readable, dry_run
from sl_queue.checking.exposure import exposure
from sl_queue.checking.findings import Check, Finding
from sl_queue.checking.hands import check_hands
from sl_queue.compute.threads import settings_kept
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import PartySpec, require_apart, require_read_alike, resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.aligning import ids_of, shared_rows
from sl_queue.data.ids import Positions
from sl_queue.data.spec import TableSpec
from sl_queue.data.table import read_row_keys, read_table
from sl_queue.errors import AlignmentError, SlQueueError
from sl_queue.launch.alignment import require_few
from sl_queue.launch.party import bounds_of
from sl_queue.launch.privacy import choice_key, responded, token_key
from sl_queue.protocol.fingerprints import BY_POSITION, RULES
from sl_queue.protocol.schedule.actions import Action, Commit, Update, notation
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.scheduler.agreement import differing_id_types
from sl_queue.protocol.table import Table
from sl_queue.protocol.text import counted, size
from sl_queue.storage.secret_file import read_secret

SPELLED_OUT_STEPS = 3


def check_job(job_file: Path, party_files: Sequence[Path], broker: str | None, say: Callable[[Finding], None]) -> int:
    """Tell all findings to `say` as they are made; returns the exit code of the first error, or 0."""
    check = Check(say)
    job = check.attempt(lambda: Job.load(job_file))
    files = [file for path in party_files if (file := check.attempt(lambda path=path: PartyFile.load(path)))]  # type: ignore[misc]
    if job is not None:
        check.ok(f"{job_file}: job {job.name!r}, parties {', '.join(job.parties)}, digest {job.digest[:12]}")
        _check_with_job(check, job, files, broker, len(party_files) - len(files))
    return check.exit_code


def check(
    job: Job, parties: Sequence[PartyFile] | Mapping[str, PartyFile] = (), broker: str | None = None
) -> list[Finding]:
    """Find everything that can be wrong with a job before anything is started, as `sl-queue check` does.

    `parties` are those at hand; with all of them a few steps are done split and joined, and compared. Findings come in
    the order in which they were made; those of level "error" would end a run.
    """
    found: list[Finding] = []
    files = list(parties.values()) if isinstance(parties, Mapping) else list(parties)
    with settings_kept():
        _check_with_job(Check(found.append), job, files, broker, 0)
    return found


def _check_with_job(check: Check, job: Job, files: Sequence[PartyFile], broker: str | None, unread: int) -> None:
    """Check everything that takes a job; `unread` party files could not be read."""
    check.attempt(lambda: require_apart(files))
    for file in files:
        check.attempt(lambda file=file: require_read_alike(file))  # type: ignore[misc]
    importer = Importer()
    resolved = [(file, check.attempt(lambda file=file: resolve(job, file, importer))) for file in files]  # type: ignore[misc]
    readable = [(file, spec) for file, spec in resolved if spec is not None]
    shared, failure = _shared(check, job, [spec.table for _, spec in readable])
    parties = _read_all(check, job, readable, shared)
    if failure is not None and len(parties) == len(readable):
        check.error(failure)  # else it is among the errors of a table
    aligned = _compare_rows(check, job, parties, shared)
    tables = [held.table for held in parties.values()]
    table = min(tables, key=lambda each: each.n_rows, default=None)  # the others have its positions too
    batches = None if table is None else check.attempt(lambda: job.batches(table.n_rows, table.chosen_by(RULES)))
    if batches is not None:
        for name, held in parties.items():
            if held.table.n_rows == batches.n_rows:
                report_data(check, name, held.table, batches)
        tried = dry_run(check, job, parties, batches)
        for file, _ in readable:
            if file.party in parties:
                check_hands(check, job, file, parties[file.party], batches)
        if aligned and check.exit_code == 0 and set(parties) == set(job.parties):
            check.attempt(lambda: compare_with_joined(check, job, parties, batches, tried.seconds))
        defended = [spec.privacy.defends_labels for _, spec in readable if spec.role == "label"]
        if aligned and check.exit_code == 0 and job.label_holder in parties and not any(defended):
            for warning in check.attempt(lambda: exposure(job, parties, batches)) or ():
                check.warn(f"{job.label_holder}: {warning}")
        message_sizes(check, job, tried.payloads, batches)
        _say_what_the_broker_carries(check, job, tried, batches, complete=set(parties) == set(job.parties))
    _say_who_is_missing(check, job, parties, files, unread)
    _say_what_is_not_joined(check, job)
    _say_what_is_defended(check, [spec for _, spec in readable])
    _spell_out(check, job, batches)
    brokers(check, job, files, broker)


def _say_what_the_broker_carries(check: Check, job: Job, tried: DryRun, batches: Batches, *, complete: bool) -> None:
    """Compare the load of the job with what one broker node carries, at the pace of the models if all are at hand."""
    load, step_s = load_of(job, batches, {name: payload.dtype for name, payload in tried.payloads.items()}), None
    if complete and check.exit_code == 0:
        step_s = load.step_s(*(batches.parts(0) * s for s in (max(tried.base_s.values()), tried.fuse_s)))
    check.note(f"broker: {described(load, step_s)}")
    for objection in objections(load, step_s):
        check.warn(f"broker: {objection}")


def _say_who_is_missing(
    check: Check, job: Job, parties: Mapping[str, Readable], files: Sequence[PartyFile], unread: int
) -> None:
    """Tell parties whose file or table has errors from parties of whom no file was given."""
    given = {file.party for file in files}
    faulty = [party for party in job.parties if party in given and party not in parties]
    if faulty:
        check.note(f"models not looked at: {', '.join(faulty)} (see the errors above)")
    missing = [party for party in job.parties if party not in given]
    if missing:
        why = "no party file was given" if not unread else "no party file, or only one with the errors above"
        check.note(f"not looked at: {', '.join(missing)} ({why})")


def _shared(check: Check, job: Job, specs: Sequence[TableSpec]) -> tuple[Mapping[str, Positions], SlQueueError | None]:
    """Find the rows that all parties share if the job aligns them and all files are at hand; else nothing.

    Ids that cannot be read are no finding yet: it comes with all that is wrong with their table.
    """
    if job.alignment.method != "psi":
        return {}, None
    some_lack = len(specs) < len(job.parties)
    if some_lack:
        check.note("rows are not aligned yet, so every table is checked with all its rows")
        if job.alignment.at_most is None:
            return {}, None
    try:
        ids = ids_of(specs)
    except SlQueueError as error:
        return {}, error
    for party, own in ids.items():
        check.attempt(partial(require_few, job, len(own.texts), f"party {party!r}"))
    if some_lack:
        return {}, None
    shared = check.attempt(lambda: shared_rows(ids))
    if shared is None:
        return {}, None
    count = len(next(iter(shared.values())))
    if count < job.alignment.at_least:
        check.error(
            AlignmentError(
                f"{counted(count, 'row is', 'rows are')} shared by all, and alignment.at_least = "
                f"{job.alignment.at_least}"
            )
        )
    check.ok(f"rows: {count} are shared by {', '.join(shared)}; an alignment will find them")
    return shared, None


def _read_all(
    check: Check, job: Job, readable: Sequence[tuple[PartyFile, PartySpec]], shared: Mapping[str, Positions]
) -> dict[str, Readable]:
    """Read all tables, that of the label holder first if it chooses the rows that are held out."""
    found: dict[str, Readable] = {}
    holder: Table | None = None
    for file, spec in sorted(readable, key=lambda each: not (job.tells_holdout and each[1].role == "label")):
        party = _read(check, job, file, spec, shared, holder)
        if party is not None:
            found[file.party] = party
            holder = party.table if spec.role == "label" else holder
    return {file.party: found[file.party] for file, _ in readable if file.party in found}


def _read(
    check: Check,
    job: Job,
    file: PartyFile,
    spec: PartySpec,
    shared: Mapping[str, Positions],
    holder: Table | None,
) -> Readable | None:
    with_secret = check.attempt(lambda: _with_secret(job, file, spec))
    if with_secret is None:
        return None

    def read() -> Table:
        aligned, chosen = shared.get(file.party), None
        if job.tells_holdout and holder is not None and read_row_keys(spec.table, aligned)[1] == holder.digest:
            chosen = holder.chosen
        key, by = token_key(with_secret), choice_key(with_secret)
        return responded(with_secret, read_table(spec.table, aligned, token_key=key, chosen=chosen, choice_key=by))

    table = check.attempt(read)
    if table is None:
        return None
    features = "no base model, so no features" if table.features is None else f"features {table.features.shape[1:]}"
    labels = "" if table.labels is None else f", labels {table.labels.dtype}"
    check.ok(f"{file.party}: {counted(table.n_rows, 'row', 'rows')}, ids are {table.id_type}, {features}{labels}")
    for note in table.notes:
        check.note(f"{file.party}: {note}")
    return Readable(with_secret.compute, table)


def _with_secret(job: Job, file: PartyFile, spec: PartySpec) -> PartySpec:
    """Return the party with the secret that its file names, if it names one."""
    path = file.privacy.secret
    return spec.with_secret(read_secret(path)) if isinstance(path, Path) and job.rules != BY_POSITION else spec


def _compare_rows(check: Check, job: Job, parties: Mapping[str, Readable], shared: Mapping[str, Positions]) -> bool:
    """Return True if all parties at hand hold the same ids, or share some that an alignment will find."""
    if job.alignment.method == "psi":
        return bool(shared)
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
    """List what makes the run differ from joined training; it is repeated and resumed exactly all the same."""
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


def _say_what_is_defended(check: Check, specs: Iterable[PartySpec]) -> None:
    """Tell which defences change what is sent, and with it what is trained; they are no part of the comparison."""
    for spec in specs:
        changes = [key.removeprefix("privacy.") for key in spec.privacy.fingerprint if "labels" not in key]
        if changes:
            check.note(
                f"{spec.party}: [privacy] {', '.join(changes)} change what is sent; the final weights are not those of "
                "joined training, and a comparison above is without them"
            )


def _spell_out(check: Check, job: Job, batches: Batches | None) -> None:
    """List the actions of the first steps, in order."""
    if batches is None:
        return
    pipeline = job.pipeline_of(batches)
    check.note(
        f"steps: {batches.steps_per_epoch} an epoch, {batches.steps} in all; "
        f"{counted(batches.training_rows, 'row', 'rows')} to train on, {batches.holdout_rows} held out"
    )
    check.note(f"order of work, a feature party: {notation(_first_steps(pipeline.feature_actions(0)))} ...")
    check.note(f"order of work, the label holder: {notation(_first_steps(pipeline.label_actions(0)))} ...")
    bounds = {party: bounds_of(job, party, pipeline) for party in job.parties}
    prefetch = max(bound.prefetch for bound in bounds.values())
    check.note(f"prefetch: at most {prefetch} unacknowledged messages of each sender")
    memory = ", ".join(f"{party} {size(bound.memory_bytes)}" for party, bound in bounds.items())
    check.note(f"memory for what peers send, at most, if a peer sends as much as it can: {memory}")


def _first_steps(actions: Iterable[Action]) -> Iterator[Action]:
    """Return the actions up to the third update or the first commit."""
    for action in actions:
        yield action
        if isinstance(action, Commit) or action == Update(SPELLED_OUT_STEPS - 1):
            return

"""Everything that can be wrong with a job, found before anything is started.

It goes on after a finding as far as what was found allows, and starts no worker. Of rows it tells counts, never ids.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import unquote, urlsplit

from sl_queue.compute.base import base_stage
from sl_queue.compute.equality import first_step_difference
from sl_queue.compute.fuse import fuse_stage
from sl_queue.data.table import read_table
from sl_queue.errors import AlignmentError, BrokerUnreachable, ComputeError, SlQueueError
from sl_queue.job import Job, PartyFile, redacted
from sl_queue.launch.broker import MEMORY, topology
from sl_queue.launch.party import PREFETCH_MARGIN
from sl_queue.party_file import read_url
from sl_queue.ports import Table
from sl_queue.protocol.codec import ITEM_BYTES, OVERHEAD_BYTES
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, MicroBatch, Payload
from sl_queue.protocol.pipeline import Action, Commit, Update, notation
from sl_queue.protocol.row_order import Batches

T = TypeVar("T")

MESSAGE_LIMIT_BYTES = 16 * 1024 * 1024  # what RabbitMQ 4 accepts by default, header included
DELIVERY_TIMEOUT_S = 30 * 60  # after which RabbitMQ takes back what was not acknowledged, by default
MIB = 1024 * 1024
SPELLED_OUT_STEPS = 3
FORWARD_AND_BACKWARD = 3  # a backward pass costs about two forward passes
SAME_WITHIN = 1e-6  # float32 rounding, where a kernel adds in another order


class Level(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the check looked at, and what it saw."""

    level: Level
    text: str
    exit_code: int = 0


def check_job(job_file: Path, party_files: Sequence[Path], broker: str | None, say: Callable[[Finding], None]) -> int:
    """Tell all findings to `say` as they are made; returns the exit code of the first error, or 0."""
    check = _Check(say)
    job = check.attempt(lambda: Job.load(job_file))
    files = [file for path in party_files if (file := check.attempt(lambda path=path: PartyFile.load(path)))]  # type: ignore[misc]
    if job is not None:
        check.ok(f"{job_file}: job {job.name!r}, parties {', '.join(job.parties)}, digest {job.digest[:12]}")
        _check_with_job(check, job, files, broker)
    return check.exit_code


@dataclass(slots=True)
class _Check:  # mutable: it remembers the first error
    say: Callable[[Finding], None]
    exit_code: int = 0

    def ok(self, text: str) -> None:
        self.say(Finding(Level.OK, text))

    def note(self, text: str) -> None:
        self.say(Finding(Level.NOTE, text))

    def warn(self, text: str) -> None:
        self.say(Finding(Level.WARNING, text))

    def error(self, error: SlQueueError) -> None:
        self.say(Finding(Level.ERROR, str(error), error.exit_code))
        self.exit_code = self.exit_code or error.exit_code

    def attempt(self, action: Callable[[], T]) -> T | None:
        """What the action returns, or None after its error has become a finding."""
        try:
            return action()
        except SlQueueError as error:
            self.error(error)
            return None


@dataclass(frozen=True, slots=True)
class _Party:
    """A party whose file and table could be read."""

    file: PartyFile
    table: Table = field(repr=False)


def _check_with_job(check: _Check, job: Job, files: Sequence[PartyFile], broker: str | None) -> None:
    readable = [file for file in files if check.attempt(lambda file=file: _belongs(job, file))]  # type: ignore[misc]
    parties = {file.party: party for file in readable if (party := _read(check, job, file))}
    aligned = _compare_rows(check, parties)
    n_rows = next(iter(parties.values())).table.n_rows if parties else None
    batches = None if n_rows is None else check.attempt(lambda: job.batches(n_rows))
    if batches is not None:
        payloads = _dry_run(check, job, parties, batches)
        if aligned and check.exit_code == 0 and set(parties) == set(job.parties):
            check.attempt(lambda: _compare_with_joined(check, job, parties, batches))
        _message_sizes(check, job, payloads, batches)
    missing = [party for party in job.parties if party not in parties]
    if missing:
        check.note(f"not looked at: {', '.join(missing)} (no readable party file was given)")
    _spell_out(check, job, batches)
    _brokers(check, job, files, broker)


def _belongs(job: Job, file: PartyFile) -> bool:
    file.check(job)
    return True


def _read(check: _Check, job: Job, file: PartyFile) -> _Party | None:
    table = check.attempt(lambda: read_table(job, file))
    if table is None:
        return None
    features = "no base model, so no features" if table.features is None else f"features {table.features.shape[1:]}"
    labels = "" if table.labels is None else f", labels {table.labels.dtype}"
    check.ok(f"{file.party}: {table.n_rows} rows, ids are {table.id_type}, {features}{labels}")
    return _Party(file, table)


def _compare_rows(check: _Check, parties: Mapping[str, _Party]) -> bool:
    """Whether all parties at hand hold the same ids."""
    if len({(p.table.digest, p.table.id_type) for p in parties.values()}) <= 1:
        if len(parties) > 1:
            check.ok(f"rows: {', '.join(parties)} hold the same ids")
        return True
    held = ", ".join(f"{name} {p.table.n_rows} ({p.table.id_type} ids)" for name, p in parties.items())
    check.error(
        AlignmentError(f"the parties' ids differ; rows: {held}. Keep the rows that all hold, with ids of one type")
    )
    return False


# Models ---------------------------------------------------------------------------------------------------------


def _dry_run(check: _Check, job: Job, parties: Mapping[str, _Party], batches: Batches) -> Mapping[str, Payload]:
    """One training micro-batch, and the smallest one, through every model at hand; returns what the bases put out."""
    payloads: dict[str, Payload] = {}
    seconds = 0.0
    for name in job.fused:
        if name in parties and (run := check.attempt(lambda name=name: _dry_base(job, parties[name], batches))):  # type: ignore[misc]
            payloads[name] = run.outcome
            if name != job.label_holder:  # whose base model is a part of its dry run of the fuse model
                seconds += run.seconds * FORWARD_AND_BACKWARD
            check.ok(f"{name}: the base model's activation is {run.outcome}, as the cut layer")
            check.attempt(lambda name=name: _smallest_base(job, parties[name], batches))  # type: ignore[misc]
    label = parties.get(job.label_holder)
    if label is not None and (fused := check.attempt(lambda: _dry_fuse(job, label, batches, payloads))):
        seconds += fused.seconds
        check.ok(f"{job.label_holder}: fuse model and loss accept the cut layers {_cuts(job)}")
        check.attempt(lambda: _smallest_fuse(job, label, batches, payloads))
    if check.exit_code == 0 and parties:
        _delivery_timeout(check, job, batches, seconds)
    return payloads


@dataclass(frozen=True, slots=True)
class _Run(Generic[T]):
    """What a dry run came to, and how long it took once all was warm."""

    outcome: T
    seconds: float

    @classmethod
    def twice(cls, action: Callable[[], T]) -> "_Run[T]":
        action()
        began = time.monotonic()
        outcome = action()
        return cls(outcome, time.monotonic() - began)


def _dry_base(job: Job, party: _Party, batches: Batches) -> _Run[Payload]:
    stage = base_stage(job, party.file, party.table, batches)
    return _Run.twice(lambda: stage.forward(MicroBatch(0, 0)))


def _smallest_base(job: Job, party: _Party, batches: Batches) -> None:
    stage = base_stage(job, party.file, party.table, batches)
    _explained(batches, lambda: stage.forward(_smallest(batches)))


def _dry_fuse(
    job: Job, party: _Party, batches: Batches, payloads: Mapping[str, Payload]
) -> _Run[Mapping[str, Payload]]:
    stage = fuse_stage(job, party.file, party.table, batches)
    activations = _zeros(job, payloads, party.table, batches, MicroBatch(0, 0))
    return _Run.twice(lambda: stage.forward_backward(MicroBatch(0, 0), activations))


def _smallest_fuse(job: Job, party: _Party, batches: Batches, payloads: Mapping[str, Payload]) -> None:
    stage = fuse_stage(job, party.file, party.table, batches)
    smallest = _smallest(batches)
    activations = _zeros(job, payloads, party.table, batches, smallest)
    _explained(batches, lambda: stage.forward_backward(smallest, activations))


def _zeros(
    job: Job, seen: Mapping[str, Payload], table: Table, batches: Batches, micro_batch: MicroBatch
) -> dict[str, Payload]:
    """Activations as the feature parties will send them, but of zeros."""
    positions = batches.rows(micro_batch)
    rows = table.rows_digest(positions)
    dtypes = {name: seen[name].dtype if name in seen else "float32" for name in job.feature_parties}
    shapes = {name: (len(positions), *(job.cut(name) or ())) for name in job.feature_parties}
    return {n: Payload(dtypes[n], shapes[n], bytes(prod(shapes[n]) * ITEM_BYTES[dtypes[n]]), rows) for n in shapes}


def _cuts(job: Job) -> str:
    return ", ".join(f"{name} {list(job.cut(name) or ())}" for name in job.fused)


def _smallest(batches: Batches) -> MicroBatch:
    last = batches.last_step(0)
    return MicroBatch(last, batches.parts(last) - 1)


def _explained(batches: Batches, dry_run: Callable[[], object]) -> None:
    """The dry run; its error says which micro-batch it was and what to do."""
    try:
        dry_run()
    except SlQueueError as error:
        rows = batches.rows(_smallest(batches)).size
        raise type(error)(
            f"{error}; this is the smallest micro-batch of an epoch, with {rows} row(s) (BatchNorm in training needs "
            "two): set drop_last = true, or another batch_size or micro_batches"
        ) from error


def _delivery_timeout(check: _Check, job: Job, batches: Batches, seconds: float) -> None:
    """What is received is acknowledged at a commit; computing here tells how far apart commits are at least."""
    steps = min(job.pipeline.checkpoint_every, batches.steps_per_epoch)
    between_s = seconds * steps * batches.parts(0)
    said = f"every {steps} steps, about {between_s:.1f} s of computing here, one party after the other"
    if between_s < DELIVERY_TIMEOUT_S / 2:
        check.note(f"commits: {said}")
    else:
        check.warn(
            f"commits: {said}; RabbitMQ takes back what is not acknowledged within {DELIVERY_TIMEOUT_S // 60} minutes: "
            "lower checkpoint_every, or raise the broker's consumer_timeout"
        )


def _compare_with_joined(check: _Check, job: Job, parties: Mapping[str, _Party], batches: Batches) -> None:
    """The first optimizer step, split and joined."""
    files, tables = [p.file for p in parties.values()], {name: p.table for name, p in parties.items()}
    difference = first_step_difference(job, files, tables, batches)
    if difference == 0.0:
        check.ok("one step split and joined: all weights are equal bit for bit")
    elif difference <= SAME_WITHIN:
        check.ok(f"one step split and joined: the weights differ by at most {difference:.1e}, which is rounding")
    else:
        check.error(
            ComputeError(
                f"one step split and joined: weights differ by up to {difference:.1e}; a model or loss whose result "
                "depends on more than its inputs, its weights and keyed random numbers cannot be trained exactly"
            )
        )


# Messages, pipeline and broker ----------------------------------------------------------------------------------


def _message_sizes(check: _Check, job: Job, payloads: Mapping[str, Payload], batches: Batches) -> None:
    rows = min(-(-job.batch_size // job.pipeline.micro_batches), batches.n_rows)
    for name in job.feature_parties:
        dtype = payloads[name].dtype if name in payloads else "float32"
        row_bytes = prod(job.cut(name) or ()) * ITEM_BYTES[dtype]
        size = rows * row_bytes + OVERHEAD_BYTES
        text = f"{name}: largest message {size / MIB:.2f} MiB ({rows} rows of {row_bytes} bytes and a header)"
        if size <= MESSAGE_LIMIT_BYTES:
            check.ok(f"{text}; RabbitMQ 4 accepts 16 MiB by default")
            continue
        fitting = (MESSAGE_LIMIT_BYTES - OVERHEAD_BYTES) // row_bytes
        advice = f"micro_batches = {-(-job.batch_size // fitting)} fits" if fitting else "one row alone is too large"
        check.warn(f"{text}; RabbitMQ 4 refuses more than 16 MiB unless max_message_size is raised; {advice}")


def _spell_out(check: _Check, job: Job, batches: Batches | None) -> None:
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


def _names(check: _Check, job: Job, broker: str) -> None:
    """What each role writes to and reads from."""
    names = topology(job, broker)
    for role in (SCHEDULER, *job.parties):
        queues = ", ".join(names.queue(role, sender) for sender in names.senders_to(role))
        check.note(f"{role}: writes to exchange {names.exchange(role)}, reads queues {queues}")


def _brokers(check: _Check, job: Job, files: Sequence[PartyFile], broker: str | None) -> None:
    """Whether every broker that is named can be reached, and whether each login may do what it must and no more."""
    logins = [(read_url(broker), _role(job, broker, files))] if broker else _logins(check, files)
    network = [(url, role) for url, role in logins if not url.startswith(MEMORY)]
    for url, role in network:
        check.attempt(lambda url=url, role=role: _rights(check, job, url, role))  # type: ignore[misc]
    for url in sorted({url for url, _ in network}) or [MEMORY]:
        _names(check, job, url)


def _logins(check: _Check, files: Sequence[PartyFile]) -> list[tuple[str, str]]:
    """The broker of each party file that names one, and as whom it logs in there."""
    named = [file for file in files if file.broker]
    urls = [(check.attempt(file.broker_url), file.party) for file in named]
    return [(url, party) for url, party in urls if url is not None]


def _role(job: Job, broker: str, files: Sequence[PartyFile]) -> str:
    """Whose login it is: users are named after job and role, or it is that of the one party at hand."""
    user = unquote(urlsplit(read_url(broker)).username or "")
    role = user.removeprefix(f"{job.name}.")
    if role != user and role in (*job.parties, SCHEDULER):
        return role
    return files[0].party if len(files) == 1 else OPERATOR


def _rights(check: _Check, job: Job, url: str, role: str) -> None:
    from sl_queue.transport.rabbitmq.rights import try_rights  # a check without a broker loads no pika

    rights = try_rights(url, role, topology(job, url))
    check.ok(f"broker {redacted(url)}: reached, login accepted, tried as {role}")
    if rights.too_wide:
        check.warn(
            f"{role}'s login can do more than it needs: {', '.join(rights.too_wide)}; `sl-queue provision` writes "
            "logins with the least rights"
        )
    if rights.missing:
        raise BrokerUnreachable(
            f"{role}'s login lacks rights: {', '.join(rights.missing)}; import the definitions that `sl-queue "
            "provision` wrote"
        )

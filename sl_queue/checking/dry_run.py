"""Every model at hand, tried on a training micro-batch and on the smallest one before anything is started."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sl_queue.checking.findings import Check
from sl_queue.compute.advice import advice
from sl_queue.compute.base_stage import base_stage
from sl_queue.compute.fuse_stage import TorchFuseStage, fuse_stage
from sl_queue.compute.spec import ComputeSpec
from sl_queue.compute.stand_ins import stand_in
from sl_queue.compute.trained import require_output_kept, require_row_kept
from sl_queue.config.job import Job
from sl_queue.cut.rows import CutRows
from sl_queue.errors import ComputeError, JobError, NonFiniteError, SlQueueError
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table
from sl_queue.protocol.text import counted

T = TypeVar("T")

DELIVERY_TIMEOUT_S = 30 * 60  # after which RabbitMQ takes back what was not acknowledged, by default
FORWARD_AND_BACKWARD = 3  # a backward pass costs about two forward passes


@dataclass(frozen=True, slots=True)
class Readable:
    """A party whose file and table could be read."""

    compute: ComputeSpec
    table: Table = field(repr=False)


@dataclass(frozen=True, slots=True)
class DryRun:
    """Result of a step of the models at hand."""

    payloads: Mapping[str, Payload] = field(repr=False)  # of the bases, for the first micro-batch
    base_s: Mapping[str, float]  # of computing for one micro-batch, by feature party
    fuse_s: float

    @property
    def seconds(self) -> float:
        """Return the seconds of computing for one micro-batch, one party after the other."""
        return sum(self.base_s.values()) + self.fuse_s


def dry_run(check: Check, job: Job, parties: Mapping[str, Readable], batches: Batches) -> DryRun:
    """Run one training micro-batch, and the smallest one, through every model at hand."""
    first, smallest, base_s = {}, {}, {}
    for name in job.fused:
        if name in parties and (run := check.attempt(lambda name=name: _dry_base(check, parties[name], batches))):  # type: ignore[misc]
            first[name] = run.outcome
            if name != job.label_holder:  # whose base model is a part of its dry run of the fuse model
                base_s[name] = run.seconds * FORWARD_AND_BACKWARD
            check.ok(f"{name}: the base model's activation is {run.outcome}, as the cut layer")
            if last := check.attempt(lambda name=name: _smallest_base(parties[name], batches)):  # type: ignore[misc]
                smallest[name] = last
    label, fuse_s = parties.get(job.label_holder), 0.0
    if label is not None:
        fuse_s = _dry_label_holder(check, job, label, batches, first, smallest)
    tried = DryRun(first, base_s, fuse_s)
    if check.exit_code == 0 and parties:
        _delivery_timeout(check, job, batches, tried.seconds)
    return tried


def _dry_label_holder(
    check: Check,
    job: Job,
    party: Readable,
    batches: Batches,
    first: Mapping[str, Payload],
    smallest: Mapping[str, Payload],
) -> float:
    """Try fuse model and loss, and give advice on them; returns the seconds of one micro-batch."""
    stage = check.attempt(lambda: fuse_stage(party.compute, party.table, batches))
    if stage is None:
        return 0.0
    for found in advice(stage, job.stops_on):
        if found.decides:
            check.error(JobError(f"{job.label_holder}: {found.text}"))
        else:
            check.warn(f"{job.label_holder}: {found.text}")
    _try_single(check, lambda: require_output_kept(stage.model, stage.layers))
    seconds = 0.0
    sent = _activations(job, first, party.table, batches, MicroBatch(0, 0))
    if fused := check.attempt(lambda: _on(check, sent, lambda: _dry_fuse(stage, sent.payloads))):
        seconds = fused.seconds
        check.ok(f"{job.label_holder}: fuse model and loss accept the cut layers {_cuts(job)}")
        few = _activations(job, smallest, party.table, batches, _smallest(batches))
        check.attempt(lambda: _on(check, few, lambda: _smallest_fuse(party, batches, few.payloads)))
        if batches.holdout_parts:
            held = _held_out(job, first, party.table, batches)
            check.attempt(lambda: _on(check, held, lambda: _evaluate(stage, batches, held.payloads)))
    return seconds


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """Result of a dry run, and how long it took once all was warm."""

    outcome: T
    seconds: float

    @classmethod
    def twice(cls, action: Callable[[], T]) -> "Timed[T]":
        action()
        began = time.monotonic()
        outcome = action()
        return cls(outcome, time.monotonic() - began)


def _dry_base(check: Check, party: Readable, batches: Batches) -> Timed[Payload]:
    stage = base_stage(party.compute, party.table, batches)
    if stage.remark is not None:
        check.warn(stage.remark)
    _try_single(check, lambda: require_row_kept(stage))
    return Timed.twice(lambda: stage.forward(MicroBatch(0, 0)))


def _try_single(check: Check, trial: Callable[[], None]) -> None:
    try:
        trial()
    except ComputeError as error:
        check.warn(f"{error}; so it can be trained, but neither served nor asked to predict one row")


def _smallest_base(party: Readable, batches: Batches) -> Payload:
    stage = base_stage(party.compute, party.table, batches)
    return _explained(batches, lambda: stage.forward(_smallest(batches)))


def _dry_fuse(stage: TorchFuseStage, activations: Mapping[str, Payload]) -> Timed[Mapping[str, Payload]]:
    return Timed.twice(lambda: stage.forward_backward(MicroBatch(0, 0), activations))


def _smallest_fuse(party: Readable, batches: Batches, activations: Mapping[str, Payload]) -> Mapping[str, Payload]:
    stage = fuse_stage(party.compute, party.table, batches)
    return _explained(batches, lambda: stage.forward_backward(_smallest(batches), activations))


def _evaluate(stage: TorchFuseStage, batches: Batches, activations: Mapping[str, Payload]) -> None:
    """Score the last held-out rows, which may be few."""
    part = batches.holdout_parts - 1
    try:
        stage.evaluate(MicroBatch(0, part), activations)
    except SlQueueError as error:
        rows = batches.holdout_part(part).size
        raise type(error)(
            f"{error}; these are the last held-out rows that are evaluated together, {rows} row(s): let the model take "
            "any number of them (squeeze() without an axis takes away that of the rows), or hold out another share"
        ) from error


@dataclass(frozen=True, slots=True)
class _Activations:
    """Activations of the feature parties, or stand-ins for those of the parties in `made_up`."""

    payloads: Mapping[str, Payload] = field(repr=False)
    made_up: tuple[str, ...]


def _activations(
    job: Job, seen: Mapping[str, Payload], table: Table, batches: Batches, micro_batch: MicroBatch
) -> _Activations:
    """Return the activations that were seen, and stand-ins for those of other parties."""
    positions = batches.rows(micro_batch)
    rows = CutRows.of(table.row_keys, positions).digest
    payloads = {name: seen[name] for name in job.feature_parties if name in seen and seen[name].rows == rows}
    made_up = tuple(name for name in job.feature_parties if name not in payloads)
    for name in made_up:
        dtype = seen[name].dtype if name in seen else "float32"
        payloads[name] = stand_in(job.seed, name, (len(positions), *(job.cut(name) or ())), dtype, rows)
    return _Activations(payloads, made_up)


def _held_out(job: Job, seen: Mapping[str, Payload], table: Table, batches: Batches) -> _Activations:
    """Return stand-ins for the activations of the last held-out rows."""
    positions = batches.holdout_part(batches.holdout_parts - 1)
    rows = CutRows.of(table.row_keys, positions, held_out=True).digest
    payloads = {}
    for name in job.feature_parties:
        dtype = seen[name].dtype if name in seen else "float32"
        payloads[name] = stand_in(job.seed, name, (len(positions), *(job.cut(name) or ())), dtype, rows)
    return _Activations(payloads, tuple(payloads))


def _on(check: Check, activations: _Activations, action: Callable[[], T]) -> T | None:
    """Run on these activations; what is not finite may be due to those that were made up."""
    try:
        return action()
    except NonFiniteError as error:
        if not activations.made_up:
            raise
        check.warn(
            f"{error} (this was seen with random numbers as activations of {', '.join(activations.made_up)}; give "
            "their party files as well to see it with real ones)"
        )
        return None


def _cuts(job: Job) -> str:
    return ", ".join(f"{name} {list(job.cut(name) or ())}" for name in job.fused)


def _smallest(batches: Batches) -> MicroBatch:
    last = batches.last_step(0)
    return MicroBatch(last, batches.parts(last) - 1)


def _explained(batches: Batches, dry_run: Callable[[], T]) -> T:
    """Return the dry run; its error says which micro-batch it was and what to do."""
    try:
        return dry_run()
    except SlQueueError as error:
        rows = batches.rows(_smallest(batches)).size
        raise type(error)(
            f"{error}; this is the smallest micro-batch of an epoch, with {rows} row(s) (BatchNorm in training needs "
            "two): set drop_last = true, or another batch_size or micro_batches"
        ) from error


def _delivery_timeout(check: Check, job: Job, batches: Batches, seconds: float) -> None:
    """Compare the broker's delivery timeout with the time between commits: messages are acknowledged at a commit."""
    steps = min(job.pipeline.checkpoint_every, batches.steps_per_epoch)
    between_s = seconds * steps * batches.parts(0)
    said = (
        f"every {counted(steps, 'step', 'steps')}, about {between_s:.1f} s of computing here, one party after the other"
    )
    if between_s < DELIVERY_TIMEOUT_S / 2:
        check.note(f"commits: {said}")
    else:
        check.warn(
            f"commits: {said}; RabbitMQ takes back what is not acknowledged within {DELIVERY_TIMEOUT_S // 60} minutes: "
            "lower checkpoint_every, or raise the broker's consumer_timeout"
        )

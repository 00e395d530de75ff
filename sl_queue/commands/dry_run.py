"""Every model at hand, tried on a training micro-batch and on the smallest one before anything is started."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Generic, TypeVar

from sl_queue.commands.findings import Check
from sl_queue.compute.base import base_stage
from sl_queue.compute.equality import first_step_difference
from sl_queue.compute.fuse import fuse_stage
from sl_queue.errors import ComputeError, SlQueueError
from sl_queue.job import Job, PartyFile
from sl_queue.ports import Table
from sl_queue.protocol.codec import ITEM_BYTES
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.row_order import Batches

T = TypeVar("T")

DELIVERY_TIMEOUT_S = 30 * 60  # after which RabbitMQ takes back what was not acknowledged, by default
FORWARD_AND_BACKWARD = 3  # a backward pass costs about two forward passes
SAME_WITHIN = 1e-6  # float32 rounding, where a kernel adds in another order


@dataclass(frozen=True, slots=True)
class Readable:
    """A party whose file and table could be read."""

    file: PartyFile
    table: Table = field(repr=False)


def dry_run(check: Check, job: Job, parties: Mapping[str, Readable], batches: Batches) -> Mapping[str, Payload]:
    """One training micro-batch, and the smallest one, through every model at hand; returns what the bases put out."""
    payloads: dict[str, Payload] = {}
    seconds = 0.0
    for name in job.fused:
        if name in parties and (run := check.attempt(lambda name=name: _dry_base(check, job, parties[name], batches))):  # type: ignore[misc]
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
class Timed(Generic[T]):
    """What a dry run came to, and how long it took once all was warm."""

    outcome: T
    seconds: float

    @classmethod
    def twice(cls, action: Callable[[], T]) -> "Timed[T]":
        action()
        began = time.monotonic()
        outcome = action()
        return cls(outcome, time.monotonic() - began)


def _dry_base(check: Check, job: Job, party: Readable, batches: Batches) -> Timed[Payload]:
    stage = base_stage(job, party.file, party.table, batches)
    if stage.remark is not None:
        check.warn(stage.remark)
    return Timed.twice(lambda: stage.forward(MicroBatch(0, 0)))


def _smallest_base(job: Job, party: Readable, batches: Batches) -> None:
    stage = base_stage(job, party.file, party.table, batches)
    _explained(batches, lambda: stage.forward(_smallest(batches)))


def _dry_fuse(
    job: Job, party: Readable, batches: Batches, payloads: Mapping[str, Payload]
) -> Timed[Mapping[str, Payload]]:
    stage = fuse_stage(job, party.file, party.table, batches)
    activations = _zeros(job, payloads, party.table, batches, MicroBatch(0, 0))
    return Timed.twice(lambda: stage.forward_backward(MicroBatch(0, 0), activations))


def _smallest_fuse(job: Job, party: Readable, batches: Batches, payloads: Mapping[str, Payload]) -> None:
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


def _delivery_timeout(check: Check, job: Job, batches: Batches, seconds: float) -> None:
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


def compare_with_joined(check: Check, job: Job, parties: Mapping[str, Readable], batches: Batches) -> None:
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

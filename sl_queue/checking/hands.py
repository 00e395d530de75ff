"""Hands of a party, before anything is started: may there be any, how many help, and what they cost."""

from collections.abc import Callable

from sl_queue.checking.dry_run import Readable
from sl_queue.checking.findings import Check
from sl_queue.compute.base_stage import TorchBaseStage, base_stage
from sl_queue.compute.fuse_stage import fuse_stage
from sl_queue.compute.hand import Stage, models_of
from sl_queue.compute.separate import separate
from sl_queue.compute.two_hands import compare_two_hands
from sl_queue.config.job import Job, PartyFile
from sl_queue.launch.hands import require_hands_possible
from sl_queue.protocol.schedule.row_order import Batches

_MB = 1e6


def check_hands(check: Check, job: Job, file: PartyFile, party: Readable, batches: Batches) -> None:
    """Say what a person should know of the hands of a party that may have some."""
    if file.hands is None:
        return
    stage = check.attempt(lambda: _apart(job, file, party, batches))
    if stage is None:
        return
    most = job.pipeline.micro_batches
    check.ok(
        f"{file.party}: hands compute its micro-batches; up to {most} help, and {max(1, most // 2)} nearly in full"
    )
    there = sum(t.nbytes for model in models_of(stage) for t in model.shared().values())
    back = sum(p.nbytes for model in models_of(stage) for p in model.module.parameters() if p.requires_grad)
    check.note(
        f"{file.party}: each step {there / _MB:.2f} MB of weights go to each hand, and {most * back / _MB:.2f} MB of "
        "gradients come back from all of them together"
    )
    if file.hands.broker is None:
        check.warn(
            f"{file.party}: its hands meet it at the job's broker, whose operator can read its weights and gradients; "
            "[hands] broker names one of its own"
        )
    if isinstance(stage, TorchBaseStage) and check.attempt(
        lambda: compare_two_hands(party.compute, party.table, batches, stage)
    ):
        check.ok(f"{file.party}: a step of two hands in reversed order has the bits of a plain one")


def _apart(job: Job, file: PartyFile, party: Readable, batches: Batches) -> Stage:
    require_hands_possible(job, file.party)
    build: Callable[..., Stage] = fuse_stage if file.party == job.label_holder else base_stage
    stage = build(party.compute, party.table, batches)
    separate(stage)
    return stage

"""Hands of a party, before anything is started: may there be any, how many help, and what they cost."""

from collections.abc import Callable

import torch
from torch import Tensor

from sl_queue.checking.dry_run import Readable
from sl_queue.checking.findings import Check
from sl_queue.compute.base_stage import TorchBaseStage, base_stage
from sl_queue.compute.fuse_stage import fuse_stage
from sl_queue.compute.hand import Stage, TorchHand, models_of, payloads
from sl_queue.compute.separate import separate
from sl_queue.config.job import Job, PartyFile
from sl_queue.cut.crossing import place
from sl_queue.cut.tensors import from_payload
from sl_queue.errors import ComputeError
from sl_queue.protocol.hands import Call
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches

Named = dict[str, Tensor]
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
    if isinstance(stage, TorchBaseStage) and check.attempt(lambda: _compare(party, batches, stage)):
        check.ok(f"{file.party}: a step of two hands in reversed order has the bits of a plain one")


def _apart(job: Job, file: PartyFile, party: Readable, batches: Batches) -> Stage:
    build: Callable[..., Stage] = fuse_stage if file.party == job.label_holder else base_stage
    stage = build(party.compute, party.table, batches)
    separate(stage)
    return stage


def _compare(party: Readable, batches: Batches, apart: TorchBaseStage) -> bool:
    """Compare the gradients of one step. Raises ComputeError if any bit differs."""
    plain = base_stage(party.compute, party.table, batches)
    parts = [MicroBatch(0, index) for index in range(batches.parts(0))]
    for part in parts:
        with plain.model.drawing("forward", part):
            output = plain.model.run(plain.inputs(batches.rows(part)), place(plain.model.party, part))
        if output.requires_grad:
            torch.autograd.backward(output, _gradient(output))
    expected = {name: p.grad for name, p in plain.module.named_parameters() if p.grad is not None}
    found = _of_two_hands(party, batches, apart, parts)
    if expected.keys() != found.keys() or not all(torch.equal(expected[name], found[name]) for name in expected):
        raise ComputeError(
            f"party {plain.model.party!r}: a step computed by two hands differs from a plain one; look in its model for "
            "what depends on the order of its forward passes, and take [hands] out"
        )
    return True


def _of_two_hands(party: Readable, batches: Batches, apart: TorchBaseStage, parts: list[MicroBatch]) -> Named:
    """Compute the step's gradients at two hands, the last micro-batch first, and add them in order."""
    other = base_stage(party.compute, party.table, batches)
    separate(other)
    hands = (TorchHand(apart), TorchHand(other))
    shared = payloads({f"base/{name}": tensor for name, tensor in apart.model.shared().items()})
    for hand in hands:
        hand.equip(1, shared, 1, 0)
    learned: dict[int, Named] = {}
    for part in reversed(parts):
        hand = hands[part.index % 2]
        forward = hand.do(Call("", part.index, "forward", part, 1))
        assert forward is not None
        gradient = payloads({"": _gradient(from_payload(forward[1][""]))})
        backward = hand.do(Call("", part.index, "backward", part, 1, gradient))
        assert backward is not None
        learned[part.index] = {name: from_payload(payload) for name, payload in backward[1].items()}
    total: Named = {}
    for index in sorted(learned):
        for name, gradient_of_one in learned[index].items():
            total[name] = total[name] + gradient_of_one if name in total else gradient_of_one
    return total


def _gradient(output: Tensor) -> Tensor:
    """Return a gradient to try a backward pass with."""
    return torch.full_like(output.detach(), 1.0 / max(1, output.numel()))

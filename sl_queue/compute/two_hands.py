"""One step of a base model, computed by two hands in reversed order, compared with a plain one bit for bit."""

import torch
from torch import Tensor

from sl_queue.compute.base_stage import TorchBaseStage, base_stage
from sl_queue.compute.hand import TorchHand, payloads
from sl_queue.compute.separate import separate
from sl_queue.compute.spec import ComputeSpec
from sl_queue.cut.crossing import from_payload
from sl_queue.cut.guard import place
from sl_queue.errors import ComputeError
from sl_queue.protocol.hands import Call
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table

Named = dict[str, Tensor]


def compare_two_hands(spec: ComputeSpec, table: Table, batches: Batches, apart: TorchBaseStage) -> bool:
    """Compare the gradients of one step. Raises ComputeError if any bit differs."""
    plain = base_stage(spec, table, batches)
    parts = [MicroBatch(0, index) for index in range(batches.parts(0))]
    for part in parts:
        with plain.model.drawing("forward", part):
            output = plain.model.run(plain.inputs(batches.rows(part)), place(plain.model.party, part))
        if output.requires_grad:
            torch.autograd.backward(output, _gradient(output))
    expected = {name: p.grad for name, p in plain.module.named_parameters() if p.grad is not None}
    found = _of_two_hands(spec, table, batches, apart, parts)
    if expected.keys() != found.keys() or not all(torch.equal(expected[name], found[name]) for name in expected):
        raise ComputeError(
            f"party {plain.model.party!r}: a step computed by two hands differs from a plain one; look in its "
            "model for what depends on the order of its forward passes, and take [hands] out"
        )
    return True


def _of_two_hands(
    spec: ComputeSpec, table: Table, batches: Batches, apart: TorchBaseStage, parts: list[MicroBatch]
) -> Named:
    """Compute the step's gradients at two hands, the last micro-batch first, and add them in order."""
    other = base_stage(spec, table, batches)
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

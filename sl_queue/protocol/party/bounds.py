"""Bounds on what a party's peers may send it, and so on how much of it may lie here. Pure.

    Whatever is neither applied, refused nor dropped may not hold a place of a finite window.

The broker hands over at most `prefetch` unacknowledged messages of one sender. A place is held until the next commit
by a message whose key is within reach (protocol/pipeline), of which there are `Pipeline.prefetch` at most and among
them always the one that is awaited, and by at most `early` of a generation that this party has yet to enter. `MARGIN`
is for what is acknowledged as soon as it is read, or as soon as its dead letter is at the broker. All else is refused
or dropped at once. So the unacknowledged are fewer than the window, or the awaited message is here: no peer can stop
a run by what it sends, only by what it does not send.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Final

from sl_queue.protocol.codec import ITEM_BYTES, OVERHEAD_BYTES
from sl_queue.protocol.messages import SCHEDULER, WHO_MAY_SAY, Kind, MicroBatch, Payload, Role
from sl_queue.protocol.schedule.pipeline import Pipeline, Reach
from sl_queue.protocol.text import counted

CROSSING: Final = ("float64", "float32", "float16", "bfloat16")  # dtypes of activations and gradients
MARGIN: Final = 8  # signs of life, questions, commands, and refused messages whose dead letter is on its way
QUESTION_BYTES: Final = 64 * 1024  # the largest report of a peer to a party
COMMAND_BYTES: Final = 1024 * 1024  # the largest command of the scheduler

Shapes = tuple[tuple[int, ...], ...]


def control_bytes(sender: str) -> int:
    """Return the size of the largest message without a tensor that `sender` may send to a party."""
    return COMMAND_BYTES if sender == SCHEDULER else QUESTION_BYTES


def tensors_to(role: Role) -> frozenset[Kind]:
    """Return the kinds of tensors that a party of this role is sent in a run."""
    allowed = (
        (kind, pairs) for kind, pairs in WHO_MAY_SAY.items() if kind not in (Kind.MASKED, Kind.REPORT, Kind.COMMAND)
    )
    return frozenset(kind for kind, pairs in allowed if any(receiver is role for _, receiver in pairs))


@dataclass(frozen=True, slots=True)
class Bounds:
    """One party's terms: which kinds its peers send, in what order of work, and the shape of one row of each peer.

    Of a sender without an entry in `cuts` any shape is taken.
    """

    pipeline: Pipeline
    kinds: frozenset[Kind]
    cuts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    leftover_bytes: int = 0  # of the largest message that an alignment may have left in the queues
    # of each sender: the shapes of the parts of every step of an epoch but its last, and of that
    _shapes: Mapping[str, tuple[Shapes, Shapes]] = field(init=False, repr=False, compare=False)
    _steps: tuple[int, int] = field(init=False, repr=False, compare=False)  # of the run, and of an epoch

    def __post_init__(self) -> None:
        batches = self.pipeline.batches
        sizes = batches.sizes(0), batches.sizes(batches.steps_per_epoch - 1)
        sizes = sizes if batches.steps_per_epoch > 1 else (sizes[1], sizes[1])
        shapes = {sender: tuple(tuple((n, *cut) for n in each) for each in sizes) for sender, cut in self.cuts.items()}
        object.__setattr__(self, "_shapes", shapes)
        object.__setattr__(self, "_steps", (batches.steps, batches.steps_per_epoch))

    @property
    def early(self) -> int:
        """Number of messages of one sender that may wait for a generation that this party has yet to enter.

        As many as a peer sends before it is answered; none is answered before this party is there as well.
        """
        return self.pipeline.depth

    @property
    def prefetch(self) -> int:
        """Number of messages of one sender that may be unacknowledged."""
        return self.pipeline.prefetch + self.early + MARGIN

    def largest_bytes(self, sender: str) -> int:
        """Return the size of the largest body that `sender` may send, before it is sealed."""
        cut = self.cuts.get(sender)
        tensor = 0 if cut is None else self.pipeline.batches.most_rows * prod(cut) * ITEM_BYTES["float64"]
        return max(tensor + OVERHEAD_BYTES, control_bytes(sender), self.leftover_bytes)

    @property
    def memory_bytes(self) -> int:
        """The most that the messages of all peers together can take of this party's memory."""
        return sum(self.prefetch * self.largest_bytes(sender) for sender in self.cuts)

    def objection(self, sender: str, kind: Kind, micro_batch: MicroBatch, payload: Payload) -> str | None:
        """Say why a tensor cannot be of this run, at whatever step this party is; None if it can."""
        step, index, shapes = micro_batch.step, micro_batch.index, self._shapes.get(sender)
        steps, steps_per_epoch = self._steps
        if shapes is not None and step < steps and kind is not Kind.HOLDOUT and kind in self.kinds:
            here = shapes[(step + 1) % steps_per_epoch == 0]
            if index < len(here) and payload.shape == here[index] and payload.dtype in CROSSING:
                return None  # nearly always, and for every message
        return self._objection(sender, kind, micro_batch, payload)

    def _objection(self, sender: str, kind: Kind, micro_batch: MicroBatch, payload: Payload) -> str | None:
        if kind not in self.kinds:
            return f"a party of this role is sent {' and '.join(sorted(self.kinds))} only"
        batches, step, index = self.pipeline.batches, micro_batch.step, micro_batch.index
        if step >= batches.steps:
            return f"the run has {counted(batches.steps, 'step', 'steps')}"
        sizes = batches.holdout_sizes if kind is Kind.HOLDOUT else batches.sizes(step)
        if index >= len(sizes):
            return f"there are {len(sizes)} parts"
        cut = self.cuts.get(sender)
        if cut is not None and (payload.shape != (sizes[index], *cut) or payload.dtype not in CROSSING):
            shape = (sizes[index], *cut)
            return f"is {payload.dtype} {payload.shape!s:.100}, the cut layer is {shape} of a floating dtype"
        return None


def out_of_reach(reach: Reach, kind: Kind, micro_batch: MicroBatch) -> str | None:
    """Say why a tensor cannot have been sent yet while `reach.committed` is on disk; None if it can."""
    if kind is Kind.HOLDOUT:
        if reach.admits_holdout(micro_batch):
            return None
        return f"held-out rows come after step {reach.closes}" if reach.holdout_parts else "no held-out rows come now"
    if reach.admits(micro_batch):
        return None
    return f"the furthest that may come is {reach.opening} while step {reach.committed} is the last on this disk"

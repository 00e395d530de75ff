"""The order of work, from two integers: a sliding window at the feature party.

`depth` is how many activations may be sent whose gradient has not been applied, `staleness` how many optimizer updates
a forward may run ahead. One rule generates every known pipeline: do the next forward if the window allows it, else the
oldest backward; update after a step's last backward. The window is empty at a commit and at the end of an epoch.

    lock-step   depth 1, staleness 0   F0.0 B0.0 U0 F1.0 B1.0 U1
    gpipe       depth 4, staleness 0   F0.0 F0.1 F0.2 F0.3 B0.0 B0.1 B0.2 B0.3 U0
    1f1b        depth 2, staleness 0   F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 B0.3 U0
    run ahead   depth 2, staleness 1   F0.0 F1.0 B0.0 U0 F2.0 B1.0 U1 F3.0 B2.0 U2 B3.0 U3

Which weights a forward uses follows from these actions alone, never from timing.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.actions import (
    Backward,
    Begin,
    Commit,
    FeatureAction,
    Forward,
    Fuse,
    LabelAction,
    Predict,
    Prepare,
    Score,
    Update,
)
from sl_queue.protocol.schedule.row_order import Batches


@dataclass(frozen=True, slots=True)
class Reach:
    """The micro-batches that a peer may have sent while `committed` is the last step on its receiver's disk.

    Those of the stretch that follows it, and the first window of the one after: a peer sends no more before it is
    answered, and its receiver answers nothing of a stretch before the one before is committed.
    """

    committed: int
    closes: int  # the last step of the stretch; `committed` after the run's last
    opening: MicroBatch  # the last of the window that opens the next stretch; at the run's end that of this one
    holdout_parts: int  # micro-batches of held-out rows that follow step `closes`

    def admits(self, micro_batch: MicroBatch) -> bool:
        """Return True for the key of a training micro-batch within reach."""
        step, opening = micro_batch.step, self.opening
        return self.committed < step and (step, micro_batch.index) <= (opening.step, opening.index)

    def admits_holdout(self, micro_batch: MicroBatch) -> bool:
        """Return True for the key of a held-out micro-batch within reach."""
        return micro_batch.step == self.closes > self.committed and micro_batch.index < self.holdout_parts


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The actions of each role from any step on."""

    batches: Batches
    depth: int
    staleness: int
    checkpoint_every: int  # steps

    def commits(self, step: int) -> bool:
        """Tell whether a checkpoint follows the step: every `checkpoint_every` steps and at each epoch's end."""
        return (step + 1) % self.checkpoint_every == 0 or self.batches.ends_epoch(step)

    def feature_actions(self, first_step: int) -> Iterator[FeatureAction]:
        """Return what a feature party does from `first_step` (a step after a commit) to the end of the run."""
        for first, last in self._stretches(first_step):
            yield Begin(self.batches.epoch_of(first))
            yield from self._window(first, last)
            yield from map(Predict, self._held_out(last))
            yield Commit(last)

    def label_actions(self, first_step: int) -> Iterator[LabelAction]:
        """Return what the label holder does; it meets micro-batches in the order in which feature parties send them."""
        for first, last in self._stretches(first_step):
            yield Begin(self.batches.epoch_of(first))
            for step in range(first, last + 1):
                for index in range(self.batches.parts(step)):
                    yield Prepare(MicroBatch(step, index))
                    yield Fuse(MicroBatch(step, index))
                yield Update(step)
            yield from map(Score, self._held_out(last))
            yield Commit(last)

    def together(self, first_step: int) -> Iterator[tuple[MicroBatch, ...]]:
        """Group the forwards from `first_step` (a step after a commit) to the next commit by the update before them.

        Those of one group use the same weights, so it does not matter in which order or where they are computed.
        """
        stretch = next(self._stretches(first_step), None)
        group: list[MicroBatch] = []
        for action in () if stretch is None else self._window(*stretch):
            match action:
                case Forward(micro_batch):
                    group.append(micro_batch)
                case Update():
                    yield tuple(group)
                    group = []

    def _stretches(self, first_step: int) -> Iterator[tuple[int, int]]:
        """Cut the run from `first_step` on into (first, last) steps between two commits."""
        first = first_step
        for step in range(first_step, self.batches.steps):
            if self.commits(step):
                yield first, step
                first = step + 1

    def _window(self, first: int, last: int) -> Iterator[FeatureAction]:
        """Slide the window from an empty pipeline before `first` to an empty one after `last`."""
        forwards = deque(MicroBatch(s, i) for s in range(first, last + 1) for i in range(self.batches.parts(s)))
        in_flight: deque[MicroBatch] = deque()
        updates = first
        while forwards or in_flight:
            if forwards and len(in_flight) < self.depth and forwards[0].step - updates <= self.staleness:
                in_flight.append(forwards.popleft())
                yield Forward(in_flight[-1])
                if (following := self.batches.after(in_flight[-1])) is not None:
                    yield Prepare(following)
                continue
            oldest = in_flight.popleft()
            yield Backward(oldest)
            if oldest.index == self.batches.parts(oldest.step) - 1:
                yield Update(oldest.step)
                updates += 1

    def _held_out(self, last: int) -> Iterator[MicroBatch]:
        """Return the keys under which activations of held-out rows are filed, if an epoch ends with step `last`."""
        parts = self.batches.holdout_parts if self.batches.ends_epoch(last) else 0
        return (MicroBatch(last, index) for index in range(parts))

    def reach(self, committed: int) -> Reach:
        """Return what a peer may have sent while `committed`, a step with a commit after it, is the last on disk."""
        stretches = self._stretches(committed + 1)
        this, following = next(stretches, None), next(stretches, None)
        if this is None:
            return Reach(committed, committed, MicroBatch(committed, 0), 0)
        closes = this[1]
        last = MicroBatch(closes, self.batches.parts(closes) - 1)
        held_out = self.batches.holdout_parts if self.batches.ends_epoch(closes) else 0
        return Reach(committed, closes, last if following is None else self._opening(*following), held_out)

    def _opening(self, first: int, last: int) -> MicroBatch:
        """Return the last micro-batch that `_window` sends before it awaits an answer."""
        steps = range(first, min(last, first + self.staleness) + 1)
        *_, opening = islice((MicroBatch(s, i) for s in steps for i in range(self.batches.parts(s))), self.depth)
        return opening

    @property
    def prefetch(self) -> int:
        """Bound the unacknowledged messages of one sender: fewer would deadlock the run.

        Between two commits: every activation or gradient, the held-out activations, and the window's first messages
        of the next stretch, which may arrive before the commit. As many as the keys of any `reach`, or more.
        """
        stretch = min(self.checkpoint_every, self.batches.steps_per_epoch) * self.batches.micro_batches
        return stretch + self.depth + self.batches.holdout_parts

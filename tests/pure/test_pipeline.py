"""The order of work, for any two integers: nothing left out, nothing twice, nothing too early."""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.protocol.messages import Kind, MicroBatch
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
    notation,
)
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches


def shape(steps: int, micro_batches: int, depth: int, staleness: int) -> Pipeline:
    return Pipeline(Batches(4 * steps, 7, 1, 4, micro_batches), depth, staleness, checkpoint_every=100)


@pytest.mark.parametrize(
    ("pipeline", "written"),
    [
        pytest.param(shape(2, 1, 1, 0), "F0.0 B0.0 U0 F1.0 B1.0 U1", id="lock-step"),
        pytest.param(shape(1, 4, 4, 0), "F0.0 F0.1 F0.2 F0.3 B0.0 B0.1 B0.2 B0.3 U0", id="gpipe"),
        pytest.param(shape(1, 4, 2, 0), "F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 B0.3 U0", id="1f1b"),
        pytest.param(shape(4, 1, 2, 1), "F0.0 F1.0 B0.0 U0 F2.0 B1.0 U1 F3.0 B2.0 U2 B3.0 U3", id="run ahead"),
    ],
)
def test_the_known_pipelines_are_what_they_are_called(pipeline: Pipeline, written: str) -> None:
    last = pipeline.batches.steps - 1
    assert notation(pipeline.feature_actions(0)) == f"|0 {written} C{last}"


def test_the_label_holder_and_the_end_of_an_epoch_are_written_like_this() -> None:
    pipeline = Pipeline(Batches(10, 7, 2, 4, 2, holdout=0.2), 2, 0, checkpoint_every=1)
    assert notation(pipeline.feature_actions(1)) == (
        "|0 F1.0 F1.1 B1.0 B1.1 U1 P1.0 C1 |1 F2.0 F2.1 B2.0 B2.1 U2 C2 |1 F3.0 F3.1 B3.0 B3.1 U3 P3.0 C3"
    )
    assert notation(pipeline.label_actions(2)) == "|1 X2.0 X2.1 U2 C2 |1 X3.0 X3.1 U3 S3.0 C3"


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Any job that a validated job file can describe, small."""
    batch_size = draw(st.integers(1, 6))
    micro_batches = draw(st.integers(1, batch_size))
    holdout = draw(st.sampled_from([0.0, 0.3]))
    rows = draw(st.integers(2 * batch_size, 30))
    batches = Batches(
        rows, 7, draw(st.integers(1, 3)), batch_size, micro_batches, holdout, drop_last=draw(st.booleans())
    )
    return Pipeline(batches, draw(st.integers(1, 8)), draw(st.integers(0, 4)), draw(st.integers(1, 9)))


def feature_actions(pipeline: Pipeline) -> list[FeatureAction]:
    return list(pipeline.feature_actions(0))


def label_actions(pipeline: Pipeline) -> list[LabelAction]:
    return list(pipeline.label_actions(0))


def all_micro_batches(pipeline: Pipeline) -> list[MicroBatch]:
    batches = pipeline.batches
    return [MicroBatch(step, index) for step in range(batches.steps) for index in range(batches.parts(step))]


@given(pipelines())
def test_every_micro_batch_goes_forward_and_backward_once_and_in_order(pipeline: Pipeline) -> None:
    actions = list(pipeline.feature_actions(0))
    expected = all_micro_batches(pipeline)
    assert [a.micro_batch for a in actions if isinstance(a, Forward)] == expected
    assert [a.micro_batch for a in actions if isinstance(a, Backward)] == expected
    assert [a.step for a in actions if isinstance(a, Update)] == list(range(pipeline.batches.steps))


@given(pipelines())
def test_the_window_never_exceeds_depth_and_no_forward_runs_further_ahead_than_staleness(pipeline: Pipeline) -> None:
    in_flight: deque[MicroBatch] = deque()
    updates = 0
    for action in pipeline.feature_actions(0):
        match action:
            case Forward(micro_batch):
                assert len(in_flight) < pipeline.depth
                assert 0 <= micro_batch.step - updates <= pipeline.staleness
                in_flight.append(micro_batch)
            case Backward(micro_batch):
                assert in_flight.popleft() == micro_batch
            case Update(step):
                assert step == updates
                assert not any(micro_batch.step == step for micro_batch in in_flight)
                updates += 1
            case Begin() | Predict() | Commit():
                assert not in_flight, f"in flight at {action}"
            case Prepare():
                pass


@given(pipelines())
def test_the_next_forward_comes_as_soon_as_the_window_allows_it(pipeline: Pipeline) -> None:
    """So that depth and staleness buy what they promise: a backward is done only if no forward may be."""
    actions = list(pipeline.feature_actions(0))
    forwards = deque(all_micro_batches(pipeline))
    flying = updates = 0
    commit = [a.step for a in actions if isinstance(a, Commit)]
    for action in actions:
        match action:
            case Forward():
                forwards.popleft()
                flying += 1
            case Backward():
                if forwards and flying < pipeline.depth and forwards[0].step - updates <= pipeline.staleness:
                    assert forwards[0].step > min(c for c in commit if c >= updates), "the window is emptied to commit"
                flying -= 1
            case Update():
                updates += 1
            case _:
                pass


@given(pipelines())
def test_commits_come_every_few_steps_and_at_the_end_of_each_epoch_after_its_evaluation(pipeline: Pipeline) -> None:
    batches = pipeline.batches
    for kind, actions in ((Predict, feature_actions(pipeline)), (Score, label_actions(pipeline))):
        commits = [a.step for a in actions if isinstance(a, Commit)]
        assert commits == [s for s in range(batches.steps) if pipeline.commits(s)]
        assert all(b - a <= pipeline.checkpoint_every for a, b in zip([-1, *commits], commits, strict=False))
        for place, action in enumerate(actions):
            if isinstance(action, Commit):
                first = place - (batches.holdout_parts if batches.ends_epoch(action.step) else 0)
                held_out = [kind(MicroBatch(action.step, index)) for index in range(place - first)]
                assert actions[first:place] == held_out
                assert actions[first - 1] == Update(action.step)
        assert sum(isinstance(a, Predict | Score) for a in actions) == batches.holdout_parts * batches.epochs
        for before, begin in zip([None, *actions], actions, strict=False):
            if isinstance(begin, Begin):
                assert before is None or isinstance(before, Commit)
        assert {a.epoch for a in actions if isinstance(a, Begin)} == set(range(batches.epochs))


@given(pipelines())
def test_resumed_after_any_commit_the_actions_are_the_tail_of_all_actions(pipeline: Pipeline) -> None:
    for role in (pipeline.feature_actions, pipeline.label_actions):
        actions = list(role(0))
        for place, action in enumerate(actions):
            if isinstance(action, Commit):
                assert list(role(action.step + 1)) == actions[place + 1 :]


@given(pipelines())
def test_the_label_holder_meets_micro_batches_in_the_order_of_the_forwards(pipeline: Pipeline) -> None:
    fused = [a.micro_batch for a in pipeline.label_actions(0) if isinstance(a, Fuse)]
    assert fused == [a.micro_batch for a in pipeline.feature_actions(0) if isinstance(a, Forward)]
    others = [a for a in pipeline.label_actions(0) if not isinstance(a, Prepare | Fuse)]
    assert [Predict(a.micro_batch) if isinstance(a, Score) else a for a in others] == [
        a for a in pipeline.feature_actions(0) if not isinstance(a, Prepare | Forward | Backward)
    ]


@given(pipelines())
def test_a_micro_batch_is_prepared_before_its_messages_are_awaited(pipeline: Pipeline) -> None:
    feature, label = feature_actions(pipeline), label_actions(pipeline)
    for before, action in itertools.pairwise(feature):
        if isinstance(before, Forward):
            following = pipeline.batches.after(before.micro_batch)
            assert isinstance(action, Prepare) == (following is not None)
            assert following is None or action == Prepare(following)
    assert sum(isinstance(a, Prepare) for a in feature) == sum(isinstance(a, Forward) for a in feature) - 1
    for before, action in itertools.pairwise(label):
        assert isinstance(before, Prepare) == isinstance(action, Fuse)
        assert not isinstance(action, Fuse) or before == Prepare(action.micro_batch)


# Deadlock -----------------------------------------------------------------------------------------------------

Key = tuple[Kind, MicroBatch]


@dataclass(slots=True)
class Queue:
    """A broker's queue whose consumer gets at most `prefetch` unacknowledged messages, in order."""

    prefetch: int
    waiting: deque[Key] = field(default_factory=deque)
    unacknowledged: list[Key] = field(default_factory=list)

    def publish(self, kind: Kind, micro_batch: MicroBatch) -> None:
        self.waiting.append((kind, micro_batch))
        self._deliver()

    def acknowledge(self, step: int) -> None:
        self.unacknowledged = [key for key in self.unacknowledged if key[1].step > step]
        self._deliver()

    def has(self, kind: Kind, micro_batch: MicroBatch) -> bool:
        return (kind, micro_batch) in self.unacknowledged

    def _deliver(self) -> None:
        while self.waiting and len(self.unacknowledged) < self.prefetch:
            self.unacknowledged.append(self.waiting.popleft())


def feature(actions: Iterator[FeatureAction], inbox: Queue, outbox: Queue) -> Iterator[bool]:
    """Play a feature party; yields True when it has done something, False while it waits."""
    for action in actions:
        match action:
            case Forward(micro_batch):
                outbox.publish(Kind.ACTIVATION, micro_batch)
            case Backward(micro_batch):
                while not inbox.has(Kind.GRADIENT, micro_batch):
                    yield False
            case Predict(micro_batch):
                outbox.publish(Kind.HOLDOUT, micro_batch)
            case Commit(step):
                inbox.acknowledge(step)
            case _:
                pass
        yield True


def label(actions: Iterator[LabelAction], inboxes: list[Queue], outboxes: list[Queue]) -> Iterator[bool]:
    """Play the label holder, likewise."""
    for action in actions:
        match action:
            case Fuse(micro_batch):
                while not all(inbox.has(Kind.ACTIVATION, micro_batch) for inbox in inboxes):
                    yield False
                for outbox in outboxes:
                    outbox.publish(Kind.GRADIENT, micro_batch)
            case Score(micro_batch):
                while not all(inbox.has(Kind.HOLDOUT, micro_batch) for inbox in inboxes):
                    yield False
            case Commit(step):
                for inbox in inboxes:
                    inbox.acknowledge(step)
            case _:
                pass
        yield True


def deadlocks(pipeline: Pipeline, prefetch: int, turns: list[int]) -> bool:
    """Return True if a label holder and two feature parties all wait for ever; each does one of `turns` at a time."""
    ins, outs = [Queue(prefetch), Queue(prefetch)], [Queue(prefetch), Queue(prefetch)]
    running = [feature(pipeline.feature_actions(0), outs[i], ins[i]) for i in range(2)]
    running.append(label(pipeline.label_actions(0), ins, outs))
    lengths = itertools.cycle(turns)
    while running:
        moved = False
        for worker in list(running):
            for _ in range(next(lengths)):
                acted = next(worker, None)
                moved |= acted is not False
                if acted is None:
                    running.remove(worker)
                if not acted:
                    break
        if not moved:
            return True
    return False


@given(pipelines(), st.lists(st.integers(1, 40), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_the_derived_prefetch_is_enough_however_unevenly_the_workers_run(pipeline: Pipeline, turns: list[int]) -> None:
    assert not deadlocks(pipeline, pipeline.prefetch, turns)


def test_less_than_a_stretch_of_prefetch_deadlocks() -> None:
    pipeline = Pipeline(Batches(24, 7, 1, 4, 2), depth=2, staleness=0, checkpoint_every=3)
    assert deadlocks(pipeline, 3 * 2 - 1, [1])
    assert not deadlocks(pipeline, pipeline.prefetch, [1])

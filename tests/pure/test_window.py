"""Whatever is neither applied, refused nor dropped holds no place of the window: for any job, and any peer."""

import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.protocol.messages import Activation, Gradient, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.party.bounds import Bounds, out_of_reach
from sl_queue.protocol.party.mailbox import Acknowledge, Mailbox, Reject
from sl_queue.protocol.schedule.actions import Backward, Commit, Forward, Predict
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches
from tests.pure.test_pipeline import pipelines

CUT = (3,)
FEATURE_KINDS = frozenset({Kind.ACTIVATION, Kind.HOLDOUT})
Key = tuple[Kind, MicroBatch]


def sent(pipeline: Pipeline, committed: int) -> list[Key]:
    """Return what a feature party may have sent while its receiver has step `committed` on disk.

    The receiver answers all of one stretch, but nothing of the next one before it has committed.
    """
    actions = iter(pipeline.feature_actions(committed + 1))
    keys: list[Key] = []
    for action in takewhile(lambda action: not isinstance(action, Commit), actions):
        if isinstance(action, Forward):
            keys.append((Kind.ACTIVATION, action.micro_batch))
        if isinstance(action, Predict):
            keys.append((Kind.HOLDOUT, action.micro_batch))
    ahead = takewhile(lambda action: not isinstance(action, Backward | Commit), actions)
    return keys + [(Kind.ACTIVATION, action.micro_batch) for action in ahead if isinstance(action, Forward)]


def commits(pipeline: Pipeline) -> list[int]:
    return [-1, *(step for step in range(pipeline.batches.steps) if pipeline.commits(step))]


def every_key(pipeline: Pipeline) -> Iterator[Key]:
    for step in range(pipeline.batches.steps):
        yield from ((Kind.ACTIVATION, MicroBatch(step, index)) for index in range(pipeline.batches.parts(step)))
        yield from ((Kind.HOLDOUT, MicroBatch(step, index)) for index in range(pipeline.batches.holdout_parts))


@given(pipelines())
@settings(max_examples=100, deadline=None)
def test_what_may_come_is_exactly_what_a_peer_can_have_sent_and_never_more_than_the_prefetch(
    pipeline: Pipeline,
) -> None:
    for committed in commits(pipeline):
        reach = pipeline.reach(committed)
        later = [key for key in every_key(pipeline) if key[1].step > committed]
        admitted = [key for key in later if out_of_reach(reach, *key) is None]
        assert admitted == sorted(sent(pipeline, committed), key=later.index)
        assert len(admitted) <= pipeline.prefetch


@given(pipelines())
@settings(max_examples=50, deadline=None)
def test_a_micro_batch_is_counted_as_it_is_cut(pipeline: Pipeline) -> None:
    batches = pipeline.batches
    for step in range(batches.steps):
        rows = [len(batches.rows(MicroBatch(step, index))) for index in range(batches.parts(step))]
        assert list(batches.sizes(step)) == rows and max(rows) <= batches.most_rows
    held_out = [len(batches.holdout_part(index)) for index in range(batches.holdout_parts)]
    assert list(batches.holdout_sizes) == held_out and max(held_out, default=0) <= batches.most_rows


# Any peer ---------------------------------------------------------------------------------------------------------


def payload(rows: int, dtype: str = "float32") -> Payload:
    return Payload(dtype, (rows, *CUT), bytes(rows * 3 * 4), b"x" * 8)


@dataclass(frozen=True)
class Sent:
    """A message as a peer publishes it."""

    header: Header
    payload: Payload


@st.composite
def anything(draw: st.DrawFn, pipeline: Pipeline) -> Sent:
    """Draw a message of a peer that may send to this party, and nothing else about it is right; or everything."""
    run = draw(st.sampled_from(["r", "r", "r", "other"]))
    generation = draw(st.sampled_from([1, 1, 1, 0, 2, 3, 10**9]))
    kind = draw(st.sampled_from([Kind.ACTIVATION, Kind.ACTIVATION, Kind.HOLDOUT, Kind.GRADIENT]))
    step = draw(st.integers(0, pipeline.batches.steps) | st.integers(0, 10**12))
    index = draw(st.integers(0, 3) | st.integers(0, 10**9))
    rows = draw(st.integers(1, 4))
    header = Header(run, generation, kind, "a", "label", MicroBatch(step, index), draw(st.integers(-1, 10**6)))
    return Sent(header, payload(rows, draw(st.sampled_from(["float32", "float32", "int8"]))))


@dataclass(slots=True)
class Window:  # mutable
    """A queue at a broker that hands over `prefetch` unacknowledged messages, and the mailbox that reads it."""

    mailbox: Mailbox[int]
    prefetch: int
    ready: deque[Sent] = field(default_factory=deque)
    unacknowledged: dict[int, Sent] = field(default_factory=dict)
    tags: int = 0

    def publish(self, message: Sent) -> None:
        self.ready.append(message)
        self.deliver()

    def deliver(self) -> None:
        while self.ready and len(self.unacknowledged) < self.prefetch:
            self.tags += 1
            message = self.unacknowledged[self.tags] = self.ready.popleft()
            header = message.header
            what = Gradient if header.kind is Kind.GRADIENT else Activation
            self.obey([self.mailbox.file(header, what(header.micro_batch, message.payload), self.tags)])

    def obey(self, verdicts: list[object]) -> None:
        for verdict in verdicts:
            match verdict:
                case Acknowledge(tags):
                    self.acknowledge(tags)
                case Reject(tag):
                    self.acknowledge((tag,))

    def acknowledge(self, tags: tuple[int, ...]) -> None:
        for tag in tags:
            del self.unacknowledged[tag]

    def reconnect(self) -> None:
        self.ready.extendleft(reversed(list(self.unacknowledged.values())))
        self.unacknowledged.clear()
        self.mailbox.disconnect()
        self.deliver()


@given(st.data(), pipelines(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_a_peer_sends_the_window_has_room_or_holds_the_message_that_is_awaited(
    data: st.DataObject, pipeline: Pipeline, adopted: bool
) -> None:
    bounds = Bounds(pipeline, FEATURE_KINDS)
    window = Window(Mailbox("label", bounds), bounds.prefetch)
    if adopted:
        window.obey(window.mailbox.enter("r", 1, -1))
    for message in data.draw(st.lists(anything(pipeline), max_size=40)):
        for copy in range(data.draw(st.sampled_from([1, 1, 2, bounds.prefetch]))):
            where = replace(message.header.micro_batch, step=message.header.micro_batch.step + copy)
            window.publish(replace(message, header=replace(message.header, micro_batch=where)))
        if data.draw(st.integers(0, 9)) == 0:
            window.reconnect()
    if not adopted:
        window.obey(window.mailbox.enter("r", 1, -1))
        window.deliver()
    assert_goes_on(window, pipeline)


def assert_goes_on(window: Window, pipeline: Pipeline) -> None:
    """Assert that an honest peer of the same name, started now, is heard to the end of the run."""
    committed = -1
    for stop in commits(pipeline)[1:]:
        for kind, micro_batch in sent(pipeline, committed):
            header = Header("r", 1, kind, "a", "label", micro_batch)
            window.publish(Sent(header, payload(1)))
        for kind, micro_batch in sent(pipeline, committed):
            if micro_batch.step <= stop:
                assert window.mailbox.take("a", kind, micro_batch) is not None, f"{kind} {micro_batch} never came in"
        window.acknowledge(window.mailbox.commit(stop))
        window.deliver()
        committed = stop
        assert len(window.unacknowledged) < window.prefetch
    assert not window.ready


BATCHES = Batches(24, 7, 2, 4, 2, holdout=0.25)
PIPELINE = Pipeline(BATCHES, depth=2, staleness=0, checkpoint_every=2)


def box(kinds: frozenset[Kind] = FEATURE_KINDS, committed: int = -1) -> Mailbox[int]:
    mailbox: Mailbox[int] = Mailbox("label", Bounds(PIPELINE, kinds, {"a": CUT}))
    mailbox.enter("r", 1, committed)
    return mailbox


def file(mailbox: Mailbox[int], sent: Payload, tag: int = 1, **changes: object) -> object:
    header = replace(Header("r", 1, Kind.ACTIVATION, "a", "label", MicroBatch(0, 0)), **changes)  # type: ignore[arg-type]
    what = Gradient if header.kind is Kind.GRADIENT else Activation
    return mailbox.file(header, what(header.micro_batch, sent), tag)


@pytest.mark.parametrize(
    ("wrong", "rows", "dtype", "reason"),
    [
        pytest.param({"micro_batch": MicroBatch(10**7, 0)}, 2, "float32", "the run has 10 steps", id="no step"),
        pytest.param({"micro_batch": MicroBatch(3, 0)}, 2, "float32", "furthest that may come is 2.1", id="too early"),
        pytest.param({"micro_batch": MicroBatch(0, 2)}, 2, "float32", "there are 2 parts", id="no part"),
        pytest.param({"kind": Kind.GRADIENT}, 2, "float32", "is sent activation and holdout only", id="kind"),
        pytest.param({"kind": Kind.HOLDOUT}, 2, "float32", "no held-out rows come now", id="held-out rows too early"),
        pytest.param({}, 3, "float32", r"float32 \(3, 3\), the cut layer is \(2, 3\)", id="rows"),
        pytest.param({}, 10**9, "float32", r"float32 \(1000000000, 3\)", id="a bomb"),
        pytest.param({}, 2, "int8", "int8", id="dtype"),
    ],
)
def test_what_cannot_have_been_sent_is_refused_when_it_comes_and_its_sender_is_named(
    wrong: dict[str, object], rows: int, dtype: str, reason: str
) -> None:
    mailbox = box()
    sent = Payload(dtype, (rows, *CUT), b"", b"x" * 8, "float32/zstd")
    verdict = file(mailbox, sent, **wrong)
    assert isinstance(verdict, Reject)
    assert verdict.sender == "a" and "of 'a': " in verdict.reason
    assert re.search(reason, verdict.reason)
    assert mailbox.counts == {"rejected": 1}


def test_after_a_commit_the_next_stretch_is_within_reach() -> None:
    mailbox = box()
    assert isinstance(file(mailbox, payload(2), micro_batch=MicroBatch(3, 1)), Reject)
    mailbox.commit(1)
    assert file(mailbox, payload(2), micro_batch=MicroBatch(3, 1)) is None
    assert file(mailbox, payload(2), kind=Kind.HOLDOUT, micro_batch=MicroBatch(4, 0)) is not None
    mailbox.commit(3)
    assert file(mailbox, payload(2), kind=Kind.HOLDOUT, micro_batch=MicroBatch(4, 0)) is None


def test_of_a_newer_generation_as_many_are_kept_as_a_peer_sends_unanswered_and_the_others_are_dropped() -> None:
    mailbox = box()
    verdicts = [file(mailbox, payload(2), tag, generation=2, micro_batch=MicroBatch(tag, 0)) for tag in range(4)]
    assert verdicts == [None, None, Acknowledge((2,)), Acknowledge((3,))]
    assert file(mailbox, payload(2), 9, generation=2, micro_batch=MicroBatch(0, 0)) == Acknowledge((9,)), "a copy"
    assert file(mailbox, payload(2), 5, generation=3) == Acknowledge((0, 1)), "its sender has left generation 2"
    assert file(mailbox, payload(2), 6, generation=2) == Acknowledge((6,))
    assert mailbox.enter("r", 3, -1) == [None]
    assert mailbox.take("a", Kind.ACTIVATION, MicroBatch(0, 0)) == payload(2)
    assert mailbox.counts == Counter(stale=6, applied=1)

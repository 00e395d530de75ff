"""A peer that sends what it should not: a channel goes on, its log stays short, and what cannot be used is named."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from sl_queue.errors import RemoteProtocolError, SlQueueError
from sl_queue.observe.log import to_log
from sl_queue.protocol.codec import encode
from sl_queue.protocol.control import Alive, Failed, Message, Start, Waiting, kind_of
from sl_queue.protocol.messages import SCHEDULER, Activation, Gradient, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.party.bounds import QUESTION_BYTES, Bounds
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.topology import Topology
from sl_queue.transport.memory import MemoryBroker
from sl_queue.transport.party_channel import PartyChannel
from sl_queue.transport.refusals import COPIES, Refusals
from sl_queue.transport.scheduler_channel import INBOX_BYTES, PREFETCH, LinkSchedulerChannel
from tests.support.toy_run import CrashAt, ToyRun
from tests.support.waiting import await_that

TOPOLOGY = Topology("label", ("a", "b"))
PIPELINE = Pipeline(Batches(200, 7, 10, 4, 2, holdout=0.2), depth=2, staleness=0, checkpoint_every=3)
CUT = (3,)
BOUNDS = Bounds(PIPELINE, frozenset({Kind.ACTIVATION, Kind.HOLDOUT}), {"a": CUT, "b": CUT})
PATIENCE_S = 60.0
FIRST = MicroBatch(0, 0)


def body(message: Message, sender: str = "a", receiver: str = "label", **changes: object) -> bytes:
    """Encode the message as its sender would publish it in run r, generation 1, unless something is changed."""
    where = message.micro_batch if isinstance(message, Activation | Gradient) else FIRST
    header = Header("r", 1, kind_of(message), sender, receiver, where)
    return encode(replace(header, **changes), message)  # type: ignore[arg-type]


def activation(step: int, index: int = 0, rows: int = 2, holdout: bool = False) -> Activation:
    return Activation(MicroBatch(step, index), Payload("float32", (rows, *CUT), bytes(rows * 12), b"x" * 8), holdout)


class Label:
    """The label holder's channel at a broker in memory, and what others publish to it. Mutable."""

    def __init__(self, patience_s: float = PATIENCE_S, adopt: bool = True) -> None:
        self.broker = MemoryBroker()
        link = self.broker.link("label", TOPOLOGY, BOUNDS.prefetch)
        about = {"patience_s": patience_s, "persistent": False, "depth": 2, "bounds": BOUNDS, "observe": to_log}
        self.channel = PartyChannel(link, "label", TOPOLOGY, "label1", **about)  # type: ignore[arg-type]
        self.channel.open()
        if adopt:
            self.enter()

    def enter(self) -> None:
        self.channel.enter(Start("label1", "r", (-1,)), -1)

    def publish(self, *bodies: bytes, sender: str = "a") -> None:
        for each in bodies:
            self.broker.publish("label", sender, each, persistent=False, expires=False)

    def left(self, sender: str = "a") -> int:
        queue = self.broker.queue("label", sender)
        return len(queue.ready) + len(queue.unacknowledged)

    def receives(self) -> bool:
        """Return True if the first message of an honest peer comes through."""
        self.publish(body(activation(0)))
        return self.channel.receive("a", Kind.ACTIVATION, FIRST) is not None


@pytest.fixture
def label() -> Iterator[Label]:
    label = Label()
    yield label
    label.channel.close()


MANY = 10 * BOUNDS.prefetch

FLOODS: dict[str, Callable[[int], bytes]] = {
    "of steps that are far off": lambda n: body(activation(10_000_000 + n)),
    "of steps of this run that cannot have been sent": lambda n: body(activation(40 + n % 100)),
    "of a next generation": lambda n: body(activation(n % 300), generation=2),
    "of one generation after another": lambda n: body(activation(n % 300), generation=2 + n),
    "of another run": lambda n: body(activation(n % 300), run=f"r{n}"),
    "of held-out rows": lambda n: body(activation(n % 300, n % 10, holdout=True)),
    "of parts that do not exist": lambda n: body(activation(0, 2 + n)),
    "of other rows": lambda n: body(activation(0, n % 2, rows=3)),
    "of gradients": lambda n: body(Gradient(MicroBatch(n, 0), activation(0).payload)),
    "of garbage": lambda n: secrets.token_bytes(20),
    "of one message": lambda n: body(activation(1, 1)),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_stops_no_run(label: Label, flood: str) -> None:
    label.publish(*map(FLOODS[flood], range(MANY)))
    assert label.left() <= 2 * PIPELINE.depth, "the broker has it no longer"
    assert label.receives()


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_before_the_start_stops_no_run_after_it(flood: str) -> None:
    label = Label(adopt=False)
    label.publish(*map(FLOODS[flood], range(MANY)))
    label.enter()
    try:
        assert label.left() <= 2 * PIPELINE.depth
        assert label.receives()
    finally:
        label.channel.close()


def test_a_message_that_is_larger_than_any_honest_one_is_refused_before_it_is_looked_at(label: Label) -> None:
    label.publish(bytes(BOUNDS.largest_bytes("a") + 1000))
    label.publish(body(Failed("a1", "JobError", "x" * QUESTION_BYTES)))
    reasons = [reason for _, reason, _ in label.broker.dead_letters]
    assert "the largest that 'a' sends has" in reasons[0] and len(reasons) == 2
    assert label.receives()


def test_the_memory_that_peers_can_take_is_what_the_window_says(label: Label) -> None:
    largest = BOUNDS.largest_bytes("a")
    assert largest == QUESTION_BYTES, "of small cuts"
    assert BOUNDS.memory_bytes == 2 * BOUNDS.prefetch * largest
    wide = replace(BOUNDS, cuts={"a": (1000, 100)})
    assert wide.largest_bytes("a") == 2 * 1000 * 100 * 8 + 4096


# What refusals cost -------------------------------------------------------------------------------------------


def test_thousands_of_refused_messages_are_a_few_lines_and_a_few_dead_letters(
    label: Label, caplog: pytest.LogCaptureFixture
) -> None:
    label.publish(*(b"g" * 20 for _ in range(5000)))
    assert label.channel.counts["rejected"] == 5000
    assert len(label.broker.dead_letters) == COPIES
    label.channel.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("label: rejected a message of 'a': not a message of sl_queue")
    assert lines[1].startswith("label: rejected 4,999 further messages of 'a' in ")
    assert len(lines) == 2


def test_refusals_are_told_in_full_at_first_then_counted_with_longer_and_longer_pauses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusals = Refusals("label", 60.0, to_log)
    kept = 0
    for second in range(10_000):
        kept += refusals.note("bank", f"reason {second}", float(second))
        refusals.tell(float(second))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "label: rejected a message of 'bank': reason 0"
    assert lines[1] == "label: rejected 60 further messages of 'bank' in 60 s, the last: reason 60"
    assert lines[2] == "label: rejected 120 further messages of 'bank' in 120 s, the last: reason 180"
    assert len(lines) < 10 and kept < 10 * COPIES
    refusals.tell(30_000.0)
    refusals.tell(60_000.0)
    assert refusals.note("bank", "again", 60_001.0), "who was quiet is told in full again"
    assert caplog.records[-1].getMessage() == "label: rejected a message of 'bank': again"


def test_each_sender_has_a_first_line_of_its_own(label: Label, caplog: pytest.LogCaptureFixture) -> None:
    label.publish(*(b"g" for _ in range(50)))
    label.publish(b"h", sender="b")
    assert [record.event.sender for record in caplog.records] == ["a", "b"]  # type: ignore[attr-defined]


def test_questions_without_end_are_answered_now_and_then(label: Label) -> None:
    label.channel.send("a", Gradient(FIRST, activation(0).payload))
    asked = Waiting("a1", 1, "label", Kind.GRADIENT, 0, 0, 1.5, 0.1)
    label.publish(*(body(asked) for _ in range(500)))
    assert len(label.broker.queue("a", "label").ready) == 2, "the message, and once more"


@pytest.fixture
def scheduler() -> Iterator[tuple[LinkSchedulerChannel, MemoryBroker]]:
    broker = MemoryBroker()
    link = broker.link(SCHEDULER, TOPOLOGY, PREFETCH)
    channel = LinkSchedulerChannel(link, TOPOLOGY, "s1", patience_s=PATIENCE_S, observe=to_log)
    channel.open()
    yield channel, broker
    channel.close()


def test_a_scheduler_that_is_flooded_logs_a_line_and_hears_the_others(
    scheduler: tuple[LinkSchedulerChannel, MemoryBroker], caplog: pytest.LogCaptureFixture
) -> None:
    channel, broker = scheduler
    for _ in range(5000):
        broker.publish(SCHEDULER, "a", b"garbage", persistent=False, expires=False)
    broker.publish(SCHEDULER, "b", body(Alive("b1"), "b", SCHEDULER), persistent=False, expires=False)
    assert channel.reports(0.0) == [("b", Alive("b1"), False)]
    assert len(caplog.records) == 1
    assert len(broker.dead_letters) == COPIES


def test_reports_that_a_scheduler_has_not_taken_are_bounded_and_all_come_in_the_end(
    scheduler: tuple[LinkSchedulerChannel, MemoryBroker],
) -> None:
    channel, broker = scheduler
    for _ in range(4 * PREFETCH):
        broker.publish(SCHEDULER, "a", body(Alive("a1"), "a", SCHEDULER), persistent=False, expires=False)
    taken = []
    while reports := channel.reports(0.0):
        assert len(reports) <= PREFETCH
        taken += reports
        channel.acknowledge()
    assert len(taken) == 4 * PREFETCH


def test_large_reports_that_a_scheduler_has_not_taken_are_bounded_by_bytes(
    scheduler: tuple[LinkSchedulerChannel, MemoryBroker],
) -> None:
    channel, broker = scheduler
    large = body(Failed("a1", "JobError", "x" * (1024 * 1024)), "a", SCHEDULER)
    for _ in range(50):
        broker.publish(SCHEDULER, "a", large, persistent=False, expires=False)
    assert len(channel.reports(0.0)) == INBOX_BYTES // len(large)
    channel.acknowledge()
    broker.publish(SCHEDULER, "a", large, persistent=False, expires=False)
    assert len(channel.reports(0.0)) == 1


# What was left behind -----------------------------------------------------------------------------------------


def test_a_job_that_begins_anew_on_its_old_queues_refuses_nothing() -> None:
    quiet = ToyRun().run()
    broker = MemoryBroker()

    def kept_for_label(sender: str) -> int:
        queue = broker._queues["label", sender]
        return len(queue.ready) + len(queue.unacknowledged)

    def never_again() -> None:
        """Be killed by a supervisor that does not start it again, once each has left something behind."""
        await_that(lambda: kept_for_label("a") and kept_for_label("b"))
        raise SlQueueError("killed")

    with pytest.raises(SlQueueError, match="killed"):
        ToyRun(broker=broker, crashes={"label": CrashAt(30, act=never_again)}).run()
    assert kept_for_label("a") and kept_for_label("b")
    again = ToyRun(broker=broker).run()
    assert again.weights() == quiet.weights()
    assert broker.dead_letters == []
    assert sum(counts["rejected"] for counts in again.counts.values() if "rejected" in counts) == 0
    assert again.counts["label"]["stale"] > 0


# What is awaited ----------------------------------------------------------------------------------------------


def test_a_message_that_is_awaited_and_can_never_be_used_ends_the_wait_by_name() -> None:
    label = Label(patience_s=0.2)
    wrong, truncated = body(activation(0, rows=3)), body(activation(0))[:-1]

    def answer(receiver: str, sender: str, asked: bytes, **_: object) -> None:
        MemoryBroker.publish(label.broker, receiver, sender, asked, persistent=False, expires=False)
        if receiver == "a":
            label.publish(wrong, truncated)

    label.broker.publish = answer  # type: ignore[method-assign]  # as party a answers
    try:
        with pytest.raises(
            RemoteProtocolError, match=r"waits for activation 0\.0 of 'a'; what is computed from it is refused"
        ):
            label.channel.receive("a", Kind.ACTIVATION, FIRST)
    finally:
        del label.broker.publish  # type: ignore[attr-defined]
        label.channel.close()


def test_a_message_that_came_spoiled_and_then_whole_is_received() -> None:
    label = Label(patience_s=0.2)
    label.publish(*(body(activation(0, rows=3)) for _ in range(20)))
    try:
        assert label.receives()
    finally:
        label.channel.close()

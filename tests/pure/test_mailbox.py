"""The recovery law: given out once, acknowledged when it is on disk, never lost, sent again while it may be needed."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sl_queue.protocol.messages import Activation, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.party.mailbox import Acknowledge, Mailbox, Outbox, Reject, Verdict

SENDERS = ("a", "b")
KINDS = (Kind.ACTIVATION, Kind.HOLDOUT)
STEPS, PARTS = 4, 2
Key = tuple[str, Kind, MicroBatch]
KEYS = [(s, k, MicroBatch(step, i)) for step in range(STEPS) for i in range(PARTS) for s in SENDERS for k in KINDS]

keys = st.sampled_from(KEYS)


def payload(key: Key, generation: int) -> Payload:
    return Payload("int8", (1,), repr((key, generation)).encode())


def header(key: Key, generation: int, run: str = "r") -> Header:
    sender, kind, micro_batch = key
    return Header(run, generation, kind, sender, "label", micro_batch)


@dataclass(slots=True, eq=False)
class Copy:
    """One message at the broker; a key may have several."""

    key: Key
    generation: int
    tag: int | None = None  # while it is delivered and not acknowledged


class MailboxMachine(RuleBasedStateMachine):
    """A party that may be killed at any time, and a broker that delivers in any order, twice, and again."""

    def __init__(self) -> None:
        super().__init__()
        self.broker: list[Copy] = []
        self.tags = 0
        self.sent: set[tuple[Key, int]] = set()
        self.generation, self.committed = 0, -1
        self.start()

    def start(self) -> None:
        """Start a new process: it remembers nothing but what is on disk."""
        self.mailbox: Mailbox[int] = Mailbox("label")
        self.adopted = False
        self.given: set[Key] = set()
        self.here: set[Key] = set()  # delivered to this process and generation
        self.given_before = Counter[str]()
        self.requeue()

    def requeue(self) -> None:
        for copy in self.broker:
            copy.tag = None

    def carry_out(self, verdicts: list[Verdict[int]]) -> None:
        for verdict in verdicts:
            match verdict:
                case Acknowledge(tags):
                    self.acknowledge(tags)
                case Reject(_, reason):
                    raise AssertionError(f"an honest message was refused: {reason}")
                case None:
                    pass

    def acknowledge(self, tags: tuple[int, ...]) -> None:
        for tag in tags:
            (copy,) = (c for c in self.broker if c.tag == tag)
            self.broker.remove(copy)

    # What may happen ------------------------------------------------------------------------------------------

    @rule(key=keys, ahead=st.sampled_from([0, 0, 0, 1]))
    def publish(self, key: Key, ahead: int) -> None:
        """For the first time, again after a broken connection, or by a sender that is in the next generation."""
        self.broker.append(Copy(key, self.generation + ahead))
        self.sent.add((key, self.generation + ahead))

    @precondition(lambda self: any(c.tag is None for c in self.broker))
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        ready = [c for c in self.broker if c.tag is None]
        self.deliver_one(ready[data.draw(st.integers(0, len(ready) - 1))])

    def deliver_one(self, copy: Copy) -> None:
        self.tags += 1
        copy.tag = self.tags
        if self.adopted and copy.generation == self.generation and copy.key[2].step > self.committed:
            self.here.add(copy.key)
        message = Activation(copy.key[2], payload(copy.key, copy.generation))
        self.carry_out([self.mailbox.file(header(copy.key, copy.generation), message, copy.tag)])

    @precondition(lambda self: self.adopted)
    @rule(key=keys)
    def take(self, key: Key) -> None:
        taken = self.mailbox.take(*key)
        expected = key in self.here and key not in self.given
        assert taken == (payload(key, self.generation) if expected else None)
        if expected:
            self.given.add(key)

    @precondition(lambda self: self.adopted and self.committed < STEPS - 1)
    @rule()
    def commit(self) -> None:
        """Commit a step once everything that was sent for it is applied."""
        step = self.committed + 1
        if not all(key in self.given for key, g in self.sent if g == self.generation and key[2].step == step):
            return
        self.committed = step
        self.acknowledge(self.mailbox.commit(step))

    @rule()
    def lose_the_connection(self) -> None:
        self.requeue()
        self.mailbox.disconnect()

    @rule()
    def be_killed(self) -> None:
        self.start()

    @rule(new=st.booleans(), back=st.integers(0, 2))
    def adopt(self, new: bool, back: int) -> None:
        """Enter the run after a start, or the next generation after a checkpoint that all hold."""
        if self.adopted and not new:
            return
        if new:
            self.generation += 1
            self.committed = max(-1, self.committed - back)
        self.adopted, self.given = True, set()
        delivered = [c for c in self.broker if c.tag is not None and c.generation == self.generation]
        self.here = {c.key for c in delivered if c.key[2].step > self.committed}
        self.carry_out(self.mailbox.enter("r", self.generation, self.committed))

    # What must hold -------------------------------------------------------------------------------------------

    @invariant()
    def nothing_uncommitted_is_gone_from_the_broker(self) -> None:
        kept = {(c.key, c.generation) for c in self.broker}
        needed = {
            (k, g) for k, g in self.sent if g > self.generation or (g == self.generation and k[2].step > self.committed)
        }
        assert needed <= kept

    @invariant()
    def no_tag_is_kept_for_what_is_not_needed(self) -> None:
        """At most one delivery of a key stays unacknowledged: prefetch is bounded by keys, not by copies."""
        if self.adopted:
            held = Counter(c.key for c in self.broker if c.tag is not None and c.generation == self.generation)
            assert all(count == 1 for count in held.values())

    @invariant()
    def what_is_counted_is_what_happened(self) -> None:
        assert self.mailbox.counts["applied"] >= len(self.given)

    def teardown(self) -> None:
        """Left alone, the party ends with everything applied once, and nothing is left at the broker."""
        if not self.adopted:
            self.adopt(new=False, back=0)
        for copy in [c for c in self.broker if c.tag is None]:
            if copy in self.broker:
                self.deliver_one(copy)
        for key in KEYS:
            self.take(key)
        for _ in range(self.committed, STEPS - 1):
            self.commit()
        assert self.committed == STEPS - 1
        assert not [c for c in self.broker if c.generation <= self.generation]


MailboxMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
TestMailboxUnderAnyFate = MailboxMachine.TestCase


KEY: Key = ("a", Kind.ACTIVATION, MicroBatch(3, 0))


def box(committed: int = -1) -> Mailbox[str]:
    mailbox: Mailbox[str] = Mailbox("label")
    mailbox.enter("r", 1, committed)
    return mailbox


def file(mailbox: Mailbox[str], header: Header, tag: str) -> Verdict[str]:
    return mailbox.file(header, Activation(header.micro_batch, payload(KEY, 1)), tag)


@pytest.mark.parametrize("left", [{"run": "other"}, {"generation": 0}])
def test_what_an_earlier_run_or_generation_left_behind_is_dropped_as_stale_and_nobody_is_blamed(
    left: dict[str, str],
) -> None:
    mailbox = box()
    assert file(mailbox, replace(header(KEY, 1), **left), "t") == Acknowledge(("t",))
    assert mailbox.counts == {"stale": 1}
    assert mailbox.take(*KEY) is None


def test_a_copy_of_what_is_held_or_applied_is_acknowledged_and_the_first_delivery_is_not() -> None:
    mailbox = box()
    assert file(mailbox, header(KEY, 1), "first") is None
    assert file(mailbox, header(KEY, 1), "second") == Acknowledge(("second",))
    assert mailbox.take(*KEY) == payload(KEY, 1)
    assert file(mailbox, header(KEY, 1), "third") == Acknowledge(("third",))
    assert mailbox.take(*KEY) is None
    assert mailbox.commit(2) == ()
    assert mailbox.commit(3) == ("first",)
    assert file(mailbox, header(KEY, 1), "late") == Acknowledge(("late",))
    assert mailbox.counts == {"duplicates": 3, "applied": 1}


def test_after_a_reconnect_the_copy_takes_the_place_of_the_first_delivery() -> None:
    mailbox = box()
    file(mailbox, header(KEY, 1), "first")
    mailbox.disconnect()
    assert file(mailbox, header(KEY, 1), "again") is None
    assert file(mailbox, header(KEY, 1), "twice") == Acknowledge(("twice",))
    assert mailbox.commit(3) == ("again",)


def test_what_came_before_the_run_was_adopted_is_decided_then() -> None:
    mailbox: Mailbox[str] = Mailbox("label")
    assert file(mailbox, header(KEY, 1), "ours") is None
    assert file(mailbox, header(KEY, 1, run="other"), "theirs") is None
    assert file(mailbox, header(("a", Kind.ACTIVATION, MicroBatch(2, 0)), 1), "done") is None
    verdicts = mailbox.enter("r", 1, 2)
    assert verdicts == [None, Acknowledge(("theirs",)), Acknowledge(("done",))]
    assert mailbox.take(*KEY) == payload(KEY, 1)


def test_what_came_for_the_next_generation_waits_for_it_and_what_is_held_of_this_one_is_dropped() -> None:
    mailbox = box()
    file(mailbox, header(KEY, 1), "old")
    assert file(mailbox, header(KEY, 2), "new") is None
    assert mailbox.enter("r", 2, -1) == [Acknowledge(("old",)), None]
    assert mailbox.take(*KEY) == payload(KEY, 1)


# The outbox ---------------------------------------------------------------------------------------------------

MAX_BYTES = 60


class OutboxMachine(RuleBasedStateMachine):
    """The same decisions from a plain list of everything that was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox(MAX_BYTES)
        self.kept: list[tuple[Key, bytes]] = []
        self.sent: set[Key] = set()
        self.resumed_at = -1

    @rule(key=keys, size=st.integers(1, 25))
    def keep(self, key: Key, size: int) -> None:
        body = bytes([size]) * size
        self.kept = [entry for entry in self.kept if entry[0] != key] + [(key, body)]
        while sum(len(b) for _, b in self.kept) > MAX_BYTES:
            del self.kept[0]
        self.sent = {k for k in self.sent if k[:2] != key[:2]} | {key}
        self.outbox.keep(*key, body)

    @rule(receiver=st.sampled_from(SENDERS), step=st.integers(-1, STEPS))
    def committed(self, receiver: str, step: int) -> None:
        self.kept = [(k, b) for k, b in self.kept if k[0] != receiver or k[2].step > step]
        self.outbox.committed(receiver, step)

    @rule(step=st.integers(-1, STEPS))
    def adopt(self, step: int) -> None:
        self.kept, self.sent, self.resumed_at = [], set(), step
        self.outbox.enter(step)

    @rule(key=keys)
    def ask(self, key: Key) -> None:
        places = [place for place, (k, _) in enumerate(self.kept) if k == key]
        later = self.kept[places[0] :] if places else []
        assert self.outbox.since(*key) == [(k, b) for k, b in later if k[0] == key[0]]

    @rule(key=keys)
    def ask_whether_it_will_come(self, key: Key) -> None:
        last = [k[2] for k in self.sent if k[:2] == key[:2]]
        assert self.outbox.is_past(*key) == (key[2].step <= self.resumed_at or bool(last and key[2] <= last[0]))

    @rule(count=st.integers(0, 5))
    def newest(self, count: int) -> None:
        expected = []
        for receiver in SENDERS:
            expected += [(k, b) for k, b in self.kept if k[0] == receiver][-count:] if count else []
        told = list(self.outbox.newest(count))
        assert sorted(told, key=self.kept.index) == told
        assert sorted(told, key=repr) == sorted(expected, key=repr)


OutboxMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestOutboxUnderAnyFate = OutboxMachine.TestCase


def test_one_message_is_kept_however_large_it_is() -> None:
    outbox = Outbox(MAX_BYTES)
    outbox.keep(*KEY, bytes(1000))
    assert [body for _, body in outbox.since(*KEY)] == [bytes(1000)]

"""Lead and hands: what they say survives nothing but itself, and every call is answered whoever is lost."""

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol import hands as say
from sl_queue.protocol.hands import APART_S, MOST_DEATHS, OWN, TICKET_BYTES, Call, Result, decode, encode
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.roster import Roster

LEAD = "lead 1"
FIRST = MicroBatch(0, 0)
TENSORS = {"": Payload("float32", (2,), b"12345678"), "0.weight": Payload("bfloat16", (0, 3), b"")}
NOTES = [
    say.Hello("hand.1", {"torch": "2.4", "threads": 1, "data.columns": ["a"], "secret": None}),
    say.Welcome(LEAD, "hand.1", "00ff"),
    say.Farewell("JobError", "it was wrong"),
    say.Beat(LEAD),
    say.Weights(LEAD, 3, 2, 17, TENSORS),
    say.Ticket(LEAD, 4, "forward", FIRST, 3, TENSORS),
    say.Ticket(LEAD, 4, "", FIRST, 3),
    say.Claim(LEAD, "hand.1", 4),
    say.Drop(LEAD, 4),
    say.Back(LEAD, "hand.1", 4),
    Call(LEAD, 4, "forward", MicroBatch(7, 2), 3, TENSORS),
    Result(LEAD, "hand.1", 4, "fuse", {"loss": 0.1 + 0.2, "seconds": 1e-9}, TENSORS),
    say.Failure(LEAD, "hand.1", 4, "ShapeError", "it was \u00e4"),
]


@pytest.mark.parametrize("note", NOTES, ids=lambda note: type(note).__name__)
def test_what_is_said_is_what_is_read(note: say.Note) -> None:
    assert decode(encode(note)) == note


def test_ten_thousand_altered_messages_are_none() -> None:
    chance = random.Random(7)
    whole = [encode(note) for note in NOTES]
    read = 0
    for _ in range(10_000):
        body = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 4)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        cut = bytes(body[: chance.randrange(len(body) + 1)]) if chance.random() < 0.3 else bytes(body)
        if cut in whole:
            continue
        try:
            decode(cut)
            read += 1
        except RemoteProtocolError:
            pass
    assert read == 0


@pytest.mark.parametrize("body", [b"", b"x", b"\0" * 8, bytes(100), b"\xff" * 100])
def test_noise_is_no_message(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(body)


@dataclass(slots=True)
class Worker:
    """A hand that begins with what a ticket brings, before it knows whether the task is its own. Mutable."""

    calls: list[Call] = field(default_factory=list)
    claims: list[int] = field(default_factory=list)  # that the lead has not heard yet
    mine: set[int] = field(default_factory=set)
    tickets: list[int] = field(default_factory=list)  # that the broker would deal again
    graphs: set[int] = field(default_factory=set)


class Crew:
    """Hands that do what they are given; mutable: it deals as a broker does."""

    def __init__(self, large: bool) -> None:
        self.roster, self.large = Roster(LEAD), large
        self.tickets: list[int] = []
        self.hands: dict[str, Worker] = {}

    def begin(self, index: int) -> int:
        tensors = {"": Payload("int8", (TICKET_BYTES + 1,), bytes(TICKET_BYTES + 1))} if self.large else {}
        task = self.roster.begin("forward", MicroBatch(0, index), 1, tensors)
        self.tickets.append(task)
        return task

    def leave(self, name: str) -> None:
        hand = self.hands.pop(name)
        self.tickets += [*hand.tickets, *self.roster.leave(name, 0.0, dead=False)]

    def work(self, name: str) -> None:
        hand = self.hands[name]
        if not hand.calls:
            self.deal(hand)
            return
        call = hand.calls.pop(0)
        if call.what == "backward":
            assert call.task in hand.graphs, "a backward pass where the graph is"
        hand.graphs.add(call.task)
        self.roster.take(Result(LEAD, name, call.task, call.what))
        if call.task in hand.tickets:
            hand.tickets.remove(call.task)

    def deal(self, hand: Worker) -> None:
        if not self.tickets or (task := self.tickets.pop(0)) in hand.mine:
            return
        hand.mine.add(task)
        hand.claims.append(task)
        hand.tickets.append(task)
        if self.roster.is_open(task) and (call := self.roster.ticket(task).call) is not None:
            hand.calls.append(call)

    def claim(self, name: str) -> None:
        """Have the lead hear a claim."""
        hand = self.hands[name]
        if not hand.claims:
            return
        task = hand.claims.pop(0)
        calls = self.roster.claim(name, task)
        if calls is None:
            hand.calls = [call for call in hand.calls if call.task != task]
            hand.mine.discard(task)
            hand.tickets = [ticket for ticket in hand.tickets if ticket != task]
        else:
            hand.calls += calls

    def go_on(self, task: int) -> None:
        call, due = self.roster.go_on(task, "backward", {})
        if due:
            self.tickets.append(task)
        elif (holder := self.roster.holder(task)) in self.hands:
            self.hands[holder].calls.append(call)


DEEDS = ["join", "leave", "work", "claim", "backward"]


@given(st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(0, 5)), max_size=80), st.booleans())
def test_every_call_is_answered_whoever_is_lost(events: list[tuple[str, int]], large: bool) -> None:
    crew = Crew(large)
    roster = crew.roster
    tasks = [crew.begin(index) for index in range(6)]
    came, asked = 0, set[int]()
    for what, which in events:
        here = sorted(crew.hands)
        if what == "join":
            came += 1
            crew.hands[f"hand {came}"] = Worker()
        elif what == "backward" and which not in asked and roster.result(tasks[which], "forward"):
            asked.add(which)
            crew.go_on(tasks[which])
        elif here and what in ("leave", "work", "claim"):
            getattr(crew, what)(here[which % len(here)])
    crew.hands["last"] = Worker()
    for _ in range(100):
        for name in list(crew.hands):
            crew.work(name)
            crew.claim(name)
        for index in set(range(6)) - asked:
            if roster.result(tasks[index], "forward"):
                asked.add(index)
                crew.go_on(tasks[index])
    assert all(roster.result(task, what) for task in tasks for what in ("forward", "backward"))
    assert not roster.waiting()


def test_a_task_that_another_has_is_not_given_twice_and_its_result_counts_whoever_gave_it() -> None:
    roster = Roster(LEAD)
    task = roster.begin("forward", FIRST, 1, {})
    assert roster.ticket(task).call == Call(LEAD, task, "forward", FIRST, 1)
    assert roster.claim("one", task) == () and roster.claim("one", task) == ()
    assert roster.claim("two", task) is None and roster.claim("two", 99) is None
    result = Result(LEAD, "two", task, "forward")
    assert not roster.take(replace(result, lead="an earlier one")) and not roster.take(replace(result, what="backward"))
    assert roster.take(result) and not roster.take(replace(result, hand="one"))


def test_what_was_cleared_is_no_news_and_numbers_are_not_used_again() -> None:
    roster = Roster(LEAD)
    task = roster.begin("forward", FIRST, 1, {})
    roster.claim("one", task)
    roster.clear()
    assert not roster.take(Result(LEAD, "one", task, "forward")) and not roster.is_open(task)
    assert roster.begin("forward", FIRST, 2, {}) > task


def test_weights_are_kept_while_an_open_task_names_them() -> None:
    roster = Roster(LEAD)
    first, second = (roster.begin("forward", MicroBatch(0, i), version, {}) for i, version in ((0, 1), (1, 3)))
    assert roster.oldest(5) == (1, first)
    roster.end(first)
    assert roster.oldest(5) == (3, second)
    roster.end(second)
    assert roster.oldest(5) == (5, second + 1)


def test_the_leads_own_hand_begins_only_while_it_is_alone_and_ends_what_it_began() -> None:
    roster = Roster(LEAD)
    first = roster.begin("forward", FIRST, 1, {})
    assert roster.next_own(alone=False) is None
    call = roster.next_own(alone=True)
    assert call is not None and call.task == first and roster.holder(first) == OWN
    roster.begin("forward", MicroBatch(0, 1), 1, {})
    roster.go_on(first, "backward", {})
    later = roster.next_own(alone=False)
    assert later is not None and (later.task, later.what) == (first, "backward")
    assert roster.next_own(alone=False) is None


def test_a_micro_batch_that_ends_every_hand_is_named_and_only_the_one_that_was_computed() -> None:
    roster = Roster(LEAD)
    deadly, other = (roster.begin("forward", MicroBatch(0, index), 1, {}) for index in (0, 1))
    for number in range(MOST_DEATHS):
        assert roster.deadly() is None
        hand = f"hand {number}"
        assert roster.claim(hand, deadly) is not None and roster.claim(hand, other) is not None
        assert list(roster.leave(hand, number * APART_S)) == [deadly, other]
    assert roster.deadly() == FIRST


def test_hands_that_go_together_are_no_sign_of_a_deadly_micro_batch() -> None:
    """A party that is scaled from many to none loses hand after hand over the same task."""
    roster = Roster(LEAD)
    task = roster.begin("forward", FIRST, 1, {})
    for number in range(2 * MOST_DEATHS):
        hand = f"hand {number}"
        roster.claim(hand, task)
        assert list(roster.leave(hand, number * APART_S / (2 * MOST_DEATHS))) == [task]
    assert roster.deadly() is None

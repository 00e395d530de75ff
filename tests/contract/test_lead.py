"""A lead without a model: what it says while it waits, whom it sends away, and what noise does to it."""

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sl_queue.errors import AlignmentError, ComputeError
from sl_queue.hand_ports import Lane
from sl_queue.loops.hand import Hand
from sl_queue.loops.lead import Lead
from sl_queue.protocol.events import Event, HandCame, HandLeft, HandRefused, WaitBegan, Waited
from sl_queue.protocol.hands import HANDS, LEAD, TASKS, Call, Result, encode
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.transport.memory_lane import MemoryLane, MemoryLanes
from sl_queue.transport.rabbitmq.lane import RabbitLane

ABOUT = {"job": "j", "cpu": "AVX2"}
FIRST = MicroBatch(0, 0)


class Echo:
    """A workshop that gives back what it gets."""

    def __init__(self, done: list[Call] | None = None) -> None:
        self.versions, self.done = set[int](), [] if done is None else done

    def equip(self, version: int, *_: Any) -> None:
        self.versions.add(version)

    def has(self, version: int) -> bool:
        return version in self.versions

    def forget(self) -> None:
        self.versions.clear()

    def key_draws(self, secret: bytes) -> None:
        pass

    def do(self, call: Call) -> Any:
        self.done.append(call)
        if call.what == "fail":
            raise ComputeError("as it was asked")
        return {"version": call.version}, dict(call.tensors)


class Place:
    """A lead with its lanes, and hands in threads; mutable."""

    def __init__(self, own: Any = None, make: Callable[[bool], Lane] | None = None) -> None:
        self.lanes, self.events, self.done = MemoryLanes(), list[Event](), list[Call]()
        self.make = make or (lambda lead: MemoryLane(self.lanes, lead))
        self.lead = Lead("bank", self.make(True), ABOUT, "lead 1", own=own, observe=self.events.append)
        self.lead.open()
        self.lead.equip({})

    @property
    def names(self) -> list[str]:
        """The hands that came."""
        return [event.hand for event in self.events if isinstance(event, HandCame)]

    def hand(self, about: Any = ABOUT) -> tuple[threading.Thread, list[BaseException]]:
        ended: list[BaseException] = []

        def serve() -> None:
            try:
                Hand("bank", self.make(False), about, Echo(self.done)).serve()
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        return thread, ended


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.lead.close()


def test_a_lead_that_lacks_a_hand_says_so_and_goes_on_when_one_comes(place: Place) -> None:
    task = place.lead.begin("echo", FIRST, {"": Payload("int8", (1,), b"x")})
    timer = threading.Timer(0.5, place.hand)
    timer.start()
    result = place.lead.result(task, "echo")
    assert bytes(result.tensors[""].data) == b"x" and result.values["version"] == 1
    waits = [event for event in place.events if isinstance(event, WaitBegan | Waited)]
    assert [(event.source, event.cause) for event in waits] == [("hands", "a hand to come")] * 2
    counts = place.lead.counts()
    assert (counts.hands, counts.calls, counts.waiting, counts.lacks) == (1, 1, 0, False)


def test_without_a_connection_the_lead_computes_by_itself() -> None:
    place = Place(own=Echo)
    place.hand()
    while not any(isinstance(event, HandCame) for event in place.events):
        threading.Event().wait(0.01)
    place.lanes.ends.clear()  # nobody is reached, and nobody is known to be gone
    place.lead.on_lost()
    task = place.lead.begin("echo", FIRST, {"": Payload("int8", (1,), b"x")})
    assert bytes(place.lead.result(task, "echo").tensors[""].data) == b"x"
    assert [event.hands for event in place.events if isinstance(event, HandLeft)] == [0]
    place.lead.close()


def test_a_ticket_that_is_dealt_twice_is_done_once(place: Place) -> None:
    place.hand()
    task = place.lead.begin("echo", FIRST)
    place.lead.result(task, "echo")
    with place.lanes.lock:  # as when it waited long while a hand was idle
        ticket = place.lead._dispatch.roster.ticket(task)
    place.lead._lane.send(TASKS, encode(ticket))
    place.lead.go_on(task, "again")
    place.lead.result(task, "again")
    later = place.lead.begin("echo", FIRST)
    place.lead.result(later, "echo")
    assert [call.what for call in place.done] == ["echo", "again", "echo"]


def test_a_hand_that_would_compute_other_bits_is_sent_away_by_what_differs(place: Place) -> None:
    thread, ended = place.hand({**ABOUT, "cpu": "AVX512"})
    thread.join(10)
    (error,) = ended
    assert isinstance(error, AlignmentError) and "cpu was 'AVX2', now 'AVX512'" in str(error)
    assert [event for event in place.events if isinstance(event, HandRefused)]


def test_what_the_model_does_at_a_hand_is_raised_at_the_lead_and_hands_go_home(place: Place) -> None:
    thread, ended = place.hand()
    task = place.lead.begin("fail", FIRST)
    with pytest.raises(ComputeError, match="as it was asked"):
        place.lead.result(task, "fail")
    place.lead.close(ComputeError("as it was asked"))
    thread.join(10)
    assert "as it was asked" in str(ended[0])


class Deaf:
    """A side that takes no notice; it knows its name."""

    name = ""

    def on_session(self, me: str) -> None:
        self.name = me

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.fixture(params=["memory", "rabbitmq"])
def crossed(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Return a lead over memory, and over RabbitMQ."""
    if request.param == "memory":
        place = Place()
    else:
        url, prefix = request.getfixturevalue("broker_url"), request.getfixturevalue("unique") + "."
        place = Place(make=lambda lead: RabbitLane(url, prefix, lead=lead))
    yield place
    place.lead.close()


def test_ten_thousand_messages_of_noise_change_nothing(crossed: Place) -> None:
    place = crossed
    place.hand()
    while not any(isinstance(event, HandCame) for event in place.events):
        threading.Event().wait(0.01)
    noisy, chance = place.make(False), random.Random(5)
    noisy.open(Deaf())
    whole = [encode(Result("lead 1", "hand.1", n, "echo", {}, {})) for n in range(3)] + [
        encode(Call("lead 1", 0, "x", FIRST, 1))
    ]
    tasks = []
    for number in range(10_000):
        body = bytearray(chance.choice(whole))
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        noisy.send(chance.choice([LEAD, TASKS, HANDS, *place.names]), bytes(body))
        if number % 1000 == 0:
            tasks.append(place.lead.begin("echo", FIRST, {"": Payload("int8", (1,), bytes([number // 1000]))}))
    found = [bytes(place.lead.result(task, "echo").tensors[""].data) for task in tasks]
    assert found == [bytes([number]) for number in range(10)]
    noisy.close()

"""The lane between a lead and its hands, in memory and over RabbitMQ."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from sl_queue.errors import PartyBusy, SlQueueError
from sl_queue.hand_ports import Lane
from sl_queue.protocol.hands import HANDS, LEAD, TASKS
from sl_queue.testing.proxy import Proxy
from sl_queue.transport.memory_lane import MemoryLane, MemoryLanes
from sl_queue.transport.rabbitmq.lane import RabbitLane
from sl_queue.transport.retry import Limits

LIMITS = Limits(first_s=60, lost_s=60, busy_s=0.5)


@dataclass
class Side:
    """Keeps what comes."""

    came: "queue.Queue[Any]" = field(default_factory=queue.Queue)
    names: list[str] = field(default_factory=list)

    def on_session(self, me: str) -> None:
        self.names.append(me)

    def on_body(self, body: bytes, ticket: int | None) -> None:
        self.came.put((body, ticket))

    def on_lost(self) -> None:
        self.came.put("lost")

    def on_gone(self, to: str) -> None:
        self.came.put(to)

    def on_failure(self, error: SlQueueError) -> None:
        self.came.put(error)

    def next(self) -> Any:
        return self.came.get(timeout=20)


Make = Callable[[bool], Lane]


@pytest.fixture(params=["memory", "rabbitmq"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[Lane] = []
    if request.param == "memory":
        lanes = MemoryLanes()
        ends: Make = lambda lead: MemoryLane(lanes, lead)  # noqa: E731
    else:
        url = request.getfixturevalue("broker_url")
        prefix = request.getfixturevalue("unique") + "."
        ends = lambda lead: RabbitLane(url, prefix, lead=lead, limits=LIMITS)  # noqa: E731

    def keep(lead: bool) -> Lane:
        made.append(ends(lead))
        return made[-1]

    yield keep
    for lane in made:
        lane.close()


def opened(make: Make, *, lead: bool = False) -> tuple[Lane, Side]:
    lane, side = make(lead), Side()
    lane.open(side)
    return lane, side


def test_messages_of_any_size_come_in_order_to_whom_they_are_for(make: Make) -> None:
    lead, lead_side = opened(make, lead=True)
    one, one_side = opened(make)
    _, two_side = opened(make)
    large = bytes(range(256)) * 40_000  # ten megabytes: more than a piece
    lead.send(HANDS, b"weights")
    lead.send(one_side.names[0], large)
    lead.send(one_side.names[0], b"after")
    assert [one_side.next() for _ in range(3)] == [(b"weights", None), (large, None), (b"after", None)]
    assert two_side.next() == (b"weights", None)
    assert two_side.came.empty()
    one.send(LEAD, large)
    assert lead_side.next() == (large, None)


def test_who_is_gone_is_noticed_and_its_tickets_go_to_others(make: Make) -> None:
    lead, lead_side = opened(make, lead=True)
    one, one_side = opened(make)
    one.take_tickets()
    for ticket in range(3):
        lead.send(TASKS, b"%d" % ticket)
    assert [one_side.next()[0] for _ in range(2)] == [b"0", b"1"]
    two, two_side = opened(make)
    two.take_tickets()
    assert two_side.next()[0] == b"2"
    one.close()
    assert sorted(two_side.next()[0] for _ in range(1)) in ([b"0"], [b"1"])  # two at once: the other one waits
    lead.send(one_side.names[0], b"are you there?")
    assert lead_side.next() == one_side.names[0]
    two.done(1)


def test_a_ticket_that_is_done_makes_room_for_the_next(make: Make) -> None:
    lead, _ = opened(make, lead=True)
    hand, side = opened(make)
    hand.take_tickets()
    for ticket in range(5):
        lead.send(TASKS, b"%d" % ticket)
    for number in range(5):
        body, ticket = side.next()
        assert body == b"%d" % number
        hand.done(ticket)


def test_a_second_lead_is_refused_and_a_new_one_finds_no_old_tickets(make: Make) -> None:
    lead, _ = opened(make, lead=True)
    lead.send(TASKS, b"old")
    with pytest.raises(PartyBusy):
        opened(make, lead=True)
    lead.close()
    again, side = opened(make, lead=True)
    hand, hand_side = opened(make)
    hand.take_tickets()
    again.send(TASKS, b"new")
    assert hand_side.next()[0] == b"new"
    hand.send(LEAD, b"here")
    assert side.next() == (b"here", None)


def test_a_lost_connection_is_told_at_once_and_the_next_session_begins_with_nothing(broker_url: str) -> None:
    with Proxy(urlsplit(broker_url).port or 0) as proxy:
        lane, side = RabbitLane(proxy.url(broker_url), "job.bank.", lead=True, limits=LIMITS), Side()
        lane.open(side)
        proxy.cut()
        assert side.next() == "lost"
        while len(side.names) < 2:
            time.sleep(0.01)
        lane.send("hand.1", b"are you there?")
        assert side.next() == "hand.1"
        lane.close()


def test_closing_ends_every_thread(make: Make) -> None:
    before = set(threading.enumerate())
    lead, _ = opened(make, lead=True)
    hand, _ = opened(make)
    hand.close()
    lead.close()
    assert set(threading.enumerate()) - before == set()

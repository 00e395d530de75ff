"""The lane between a lead and its hands in memory, between threads of one process; as rabbitmq/lane.py has it.

Each end has a thread of its own that takes what comes, so that whoever sends never runs the receiver's code.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sl_queue.errors import PartyBusy
from sl_queue.hand_ports import LaneSide
from sl_queue.protocol.hands import HANDS, LEAD, TASKS

PREFETCH = 2  # tickets that a hand has and has not done: the next is there when it has done one


class MemoryLanes:
    """All ends of one party's lanes. Mutable, thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ends: dict[str, MemoryLane] = {}
        self.tickets: deque[bytes] = deque()
        self.turn = 0

    def deal(self) -> None:
        """Give tickets to hands in turn, as far as each takes any; called with the lock held."""
        while self.tickets:
            takers = [end for end in self.ends.values() if end.takes]
            if not takers:
                return
            self.turn += 1
            takers[self.turn % len(takers)].give(self.tickets.popleft())


@dataclass(eq=False)
class MemoryLane:
    """ports.Lane in memory."""

    lanes: MemoryLanes
    lead: bool = False
    _name: str = ""
    _willing: bool = False
    _held: dict[int, bytes] = field(default_factory=dict, repr=False)
    _queue: deque[Callable[[], None]] = field(default_factory=deque, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)
    _closed: bool = False
    _numbers = itertools.count(1)

    def open(self, side: LaneSide) -> None:
        self._side, self._filled = side, threading.Condition()
        self._name = LEAD if self.lead else f"hand.{next(self._numbers)}"
        with self.lanes.lock:
            if self._name in self.lanes.ends:
                raise PartyBusy("another lead already serves this party; stop one of the two")
            if self.lead:
                self.lanes.tickets.clear()
            self.lanes.ends[self._name] = self
        self._thread = threading.Thread(target=self._run, name=f"lane-{self._name}", daemon=True)
        side.on_session(self._name)
        self._thread.start()

    def send(self, to: str, body: bytes) -> None:
        with self.lanes.lock:
            if self._closed:
                return
            if to == TASKS:
                self.lanes.tickets.append(body)
                self.lanes.deal()
                return
            ends = self.lanes.ends
            there = [end for name, end in ends.items() if (name != LEAD if to == HANDS else name == to)]
            for end in there:
                end.take(body)
            if not there and to != HANDS:
                self._put(lambda: self._side.on_gone(to))

    def take_tickets(self) -> None:
        with self.lanes.lock:
            self._willing = True
            self.lanes.deal()

    def done(self, ticket: int) -> None:
        with self.lanes.lock:
            if self._held.pop(ticket, None) is not None:
                self.lanes.deal()

    def close(self) -> None:
        """Leave; tickets that are not done go to others. Also what a killed process does."""
        with self.lanes.lock:
            if self._closed or self._thread is None:
                return
            self._closed = True
            self.lanes.ends.pop(self._name, None)
            self.lanes.tickets.extendleft(self._held.values())
            self._held.clear()
            self.lanes.deal()
        with self._filled:
            self._filled.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # What other ends call, with the lock held -------------------------------------------------------------------

    @property
    def takes(self) -> bool:
        return self._willing and len(self._held) < PREFETCH

    def give(self, body: bytes) -> None:
        number = next(self._numbers)
        self._held[number] = body
        self._put(lambda: self._side.on_body(body, number))

    def take(self, body: bytes) -> None:
        self._put(lambda: self._side.on_body(body, None))

    def _put(self, what: Callable[[], None]) -> None:
        with self._filled:
            self._queue.append(what)
            self._filled.notify()

    def _run(self) -> None:
        while True:
            with self._filled:
                while not self._queue and not self._closed:
                    self._filled.wait()
                if self._closed:
                    return
                what = self._queue.popleft()
            what()

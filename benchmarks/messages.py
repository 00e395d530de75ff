"""CPU time that messages cost at each side, by what it is spent on, beside what the models compute.

A worker's own events, and a tap at its cut, say when its thread begins to pack a tensor, when it has handed it over,
and when it waits for one; a thread's CPU clock says what that took. The rest of the worker's thread computes. What the
link's thread spends is all for messages.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from torch import Tensor

from benchmarks import goals
from benchmarks.measure import WARM_UP
from benchmarks.report import table
from benchmarks.split import Plan, serve_watched, watched
from benchmarks.training import FLOAT16, GPIPE, LOCK_STEP, RUN_AHEAD_2, Order
from benchmarks.workloads import LABEL, WORKLOADS, Workload
from sl_queue.cut.guard import Crossing, Guard
from sl_queue.launch.connect import topology
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol.events import Event, StepDone, WaitBegan, Waited
from sl_queue.protocol.messages import Kind
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.transport.link import Link
from sl_queue.transport.rabbitmq.link import RabbitLink

STEPS, QUICK = 400, 30
MOST_MS = 0.35  # of a core, for a message of 32 rows at one side
TENSORS = (Kind.ACTIVATION, Kind.GRADIENT)
_numbers = count()


@dataclass(slots=True)
class Spent:
    """CPU seconds of one worker since the warm-up, by what they went into; mutable while it trains."""

    party: str
    first: int  # step that counts
    sending: float = 0.0  # pack, encode, hand over
    waiting: float = 0.0  # begin to wait, and be woken
    worker: float = 0.0  # all of the worker's thread
    link: float = 0.0  # of the link's thread
    wall: float = 0.0
    messages: int = 0
    steps: int = 0
    _began: float | None = None  # when the oldest tensor that is not yet handed over was shown to the tap
    _leaving: int = 0  # tensors shown and not yet handed over
    _start: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def see(self, _: Tensor, __: Crossing) -> None:
        """Begin to count what sending takes: the tap's part."""
        self._began = time.thread_time() if self._began is None else self._began
        self._leaving += 1

    def handed_over(self) -> None:
        """End it when no tensor is left: the link's part."""
        self._leaving, self.messages = self._leaving - 1, self.messages + 1
        if self._leaving == 0 and self._began is not None:
            self.sending += time.thread_time() - self._began
            self._began = None

    def __call__(self, event: Event, /) -> None:
        """Take in an event of the worker's own thread."""
        match event:
            case WaitBegan(cause=cause) if cause in TENSORS:
                self.waiting -= time.thread_time()
            case Waited(cause=cause) if cause in TENSORS:
                self.waiting += time.thread_time()
                self.messages += 1
            case StepDone(step=step) if step == self.first:
                self.sending = self.waiting = 0.0
                self.messages, self._start = 0, self._clocks()
            case StepDone(step=step) if step > self.first:
                self.wall, self.worker, self.link = (
                    now - before for now, before in zip(self._clocks(), self._start, strict=True)
                )
                self.steps = step - self.first

    def _clocks(self) -> tuple[float, float, float]:
        link = next(thread for thread in threading.enumerate() if thread.name == f"{self.party}-io")
        assert link.ident is not None
        return time.monotonic(), time.thread_time(), time.clock_gettime(time.pthread_getcpuclockid(link.ident))


class CountingLink:
    """A link that says when a tensor has been handed over."""

    def __init__(self, link: Link, spent: Spent) -> None:
        self._link, self._spent = link, spent

    def __getattr__(self, name: str) -> object:
        return getattr(self._link, name)

    def publish(self, receiver: str, kind: Kind, *arguments: object, **named: object) -> None:
        self._link.publish(receiver, kind, *arguments, **named)  # type: ignore[arg-type]
        if kind in TENSORS:
            self._spent.handed_over()


@dataclass(frozen=True, slots=True)
class Variant:
    """A workload in an order of work, in a format of the wire."""

    workload: Workload
    order: Order
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.workload.name}, {self.order.name}{', float16' if self.tables else ''}"


def compare(private: PrivateBroker, quick: bool) -> list[str]:
    """Measure the small job whole and in micro-batches of 32 rows, and W1 as it is and with half the bytes."""
    small, w1 = WORKLOADS["small"], WORKLOADS["W1"]
    variants = [Variant(small, LOCK_STEP), Variant(small, GPIPE), Variant(small, RUN_AHEAD_2)]
    variants += [Variant(w1, RUN_AHEAD_2), Variant(w1, RUN_AHEAD_2, FLOAT16)]
    found = [(variant, _measured(variant, private, QUICK if quick else STEPS)) for variant in variants]
    rows = [_row(str(variant), spent) for variant, each in found for spent in each]
    head = (
        "",
        "whose",
        "ms a step",
        "messages a step",
        "pack, encode, hand over",
        "wait",
        "link's thread",
        "a message",
    )
    said = (
        "CPU time in ms a step; a message: what its three parts take at this side; computing: the rest of the thread."
    )
    lines = [
        goals.line(f"a message of 32 rows at {spent.party}", _a_message_ms(spent), MOST_MS, unit=" ms of CPU time")
        for spent in found[1][1]
    ]
    return [f"{said}\n", table((*head, "computing"), rows), goals.listed(iter(lines))]


def _measured(variant: Variant, private: PrivateBroker, steps: int) -> Sequence[Spent]:
    workload = replace(variant.workload, rows=variant.workload.batch * steps)
    plan = Plan(workload, 1, {"pipeline": variant.order.table, **variant.tables})
    found = watched(private, plan, f"cpu{next(_numbers)}", _worker)
    return [found[role] for role in (*workload.feature_parties, LABEL)]


def _worker(plan: Plan, role: str, url: str, state: Path) -> Spent | None:
    spent = Spent(role, int(plan.job.batches(plan.workload.rows).steps * WARM_UP))

    def connect(party: str, prefetch: int, **_: bool) -> Link:
        return CountingLink(RabbitLink(url, party, topology(plan.job, url), prefetch), spent)  # type: ignore[return-value]

    place = Workplace(connect, state, observe=spent)
    is_party = serve_watched(plan, role, place, lambda peers: {peer: Guard(leaving=spent) for peer in peers})
    return spent if is_party else None


def _for_messages(spent: Spent) -> float:
    return spent.sending + spent.waiting + spent.link


def _a_message_ms(spent: Spent) -> float:
    return 1e3 * _for_messages(spent) / spent.messages


def _row(name: str, spent: Spent) -> Sequence[str]:
    steps = spent.steps
    parts = (spent.wall, spent.sending, spent.waiting, spent.link)
    wall, sending, waiting, link = (f"{1e3 * part / steps:.2f}" for part in parts)
    computing = f"{1e3 * (spent.worker - spent.sending - spent.waiting) / steps:.2f}"
    messages = f"{spent.messages / steps:.1f}"
    return name, spent.party, wall, messages, sending, waiting, link, f"{_a_message_ms(spent):.3f}", computing

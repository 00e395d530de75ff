"""Leads and hands without a loop or a broker: stages over hands in threads of one process, which may be lost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from threading import Lock, Thread
from typing import Any

from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.hand import Stage, TorchHand
from sl_queue.compute.separate import separate
from sl_queue.compute.spread import SpreadBaseStage, SpreadFuseStage
from sl_queue.errors import SlQueueError
from sl_queue.loops.hand import Hand
from sl_queue.loops.lead import Lead
from sl_queue.protocol.hands import MOST_DEATHS, Call
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.transport.memory_lane import MemoryLane, MemoryLanes

ABOUT = {"job": "j"}
BEAT_S = 0.05  # no lead that comes waits long for its hands
STEPS_APART = 4  # twice the staleness with which the tests train: tasks further apart are never open together


class Killed(BaseException):
    """The end of a hand without a word."""


def workshop(build: Callable[[], Stage]) -> TorchHand:
    stage = build()
    separate(stage)
    return TorchHand(stage)


@dataclass(slots=True)
class Mortal:
    """A workshop that is lost before or after some calls."""

    inner: TorchHand
    crew: "Crew"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def do(self, call: Call) -> Any:
        self.crew.may_lose(self, call)
        found = self.inner.do(call)
        self.crew.may_lose(self, call)
        return found


@dataclass(slots=True)
class Crew:
    """Hands of one party in threads; each may be lost at any call, and another comes in its place."""

    build: Callable[[], Stage]
    loss: float = 0.0
    lanes: MemoryLanes = field(default_factory=MemoryLanes)
    lost: int = 0
    lost_at: list[int] = field(default_factory=list)  # the steps of those that were lost by chance
    ends: dict[int, MemoryLane] = field(default_factory=dict)
    hands: list[Hand] = field(default_factory=list)
    threads: list[Thread] = field(default_factory=list)
    errors: list[SlQueueError] = field(default_factory=list)
    random: Random = field(default_factory=lambda: Random(0))
    choosing: Lock = field(default_factory=Lock)

    def lead(self, own: bool = False, **more: Any) -> Lead:
        """Open a lead of this party."""
        lead = Lead(
            "left",
            MemoryLane(self.lanes, lead=True),
            ABOUT,
            f"lead {self.random.random()}",
            own=(lambda: workshop(self.build)) if own else None,
            **more,
        )
        lead.open()
        return lead

    def join(self, about: Any = ABOUT) -> None:
        """Start one more hand."""
        lane = MemoryLane(self.lanes)
        mortal = Mortal(workshop(self.build), self)
        self.ends[id(mortal)] = lane
        self.hands.append(Hand("left", lane, about, mortal, BEAT_S))

        def serve(hand: Hand = self.hands[-1]) -> None:
            try:
                hand.serve()
            except SlQueueError as error:
                self.errors.append(error)
            except Killed:
                pass

        self.threads.append(Thread(target=serve, daemon=True))
        self.threads[-1].start()

    def await_end(self) -> None:
        """Wait until all are sent home; who came when the lead was gone is stopped."""
        for hand, thread in zip(self.hands, self.threads, strict=True):
            thread.join(0.5)
            if thread.is_alive():
                hand.on_failure(SlQueueError("the lead went before this hand came"))
            thread.join(10)

    def resize(self, count: int) -> None:
        """Have that many hands: start some, or lose some."""
        for _ in range(count - len(self.ends)):
            self.join()
        for mortal in list(self.ends)[count:]:
            self.lost += 1
            self.ends.pop(mortal).close()

    def may_lose(self, mortal: Mortal, call: Call) -> None:
        """Lose this hand, as SIGKILL does, by chance; but fewer over one task than make it deadly.

        The lead puts a death down to the oldest task that the hand had, of a step that is not far from the call's.
        """
        step = call.micro_batch.step
        with self.choosing:
            near = sum(abs(step - other) <= STEPS_APART for other in self.lost_at)
            chosen = self.random.random() < self.loss and near < MOST_DEATHS - 1
            lane = self.ends.pop(id(mortal), None) if chosen else None
            if lane is not None:
                self.lost += 1
                self.lost_at.append(step)
        if lane is not None:
            lane.close()
            self.join()
            raise Killed


def spread(stage: Stage, lead: Lead, pipeline: Pipeline, answer: Any = None) -> Any:
    """Put a stage over hands; it begins with the weights that it has."""
    separate(stage)
    made: Any = (
        SpreadFuseStage(stage, lead, answer)
        if isinstance(stage, TorchFuseStage)
        else SpreadBaseStage(stage, lead, pipeline)
    )
    made.load(stage.state())
    return made

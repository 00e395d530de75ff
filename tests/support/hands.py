"""Leads and hands without a loop or a broker: stages over hands in threads of one process, which may be lost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from threading import Thread
from typing import Any

from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.hand import Stage, TorchHand
from sl_queue.compute.separate import separate
from sl_queue.compute.spread import SpreadBaseStage, SpreadFuseStage
from sl_queue.errors import SlQueueError
from sl_queue.loops.hand import Hand
from sl_queue.loops.lead import Lead
from sl_queue.protocol.hands import Call
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.transport.memory_lane import MemoryLane, MemoryLanes

ABOUT = {"job": "j"}


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
        self.crew.may_lose(self)
        found = self.inner.do(call)
        self.crew.may_lose(self)
        return found


@dataclass(slots=True)
class Crew:
    """Hands of one party in threads; each may be lost at any call, and another comes in its place."""

    build: Callable[[], Stage]
    loss: float = 0.0
    lanes: MemoryLanes = field(default_factory=MemoryLanes)
    lost: int = 0
    ends: dict[int, MemoryLane] = field(default_factory=dict)
    threads: list[Thread] = field(default_factory=list)
    errors: list[SlQueueError] = field(default_factory=list)
    random: Random = field(default_factory=lambda: Random(0))

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

        def serve() -> None:
            try:
                Hand("left", lane, about, mortal).serve()
            except SlQueueError as error:
                self.errors.append(error)
            except Killed:
                pass

        self.threads.append(Thread(target=serve, daemon=True))
        self.threads[-1].start()

    def resize(self, count: int) -> None:
        """Have that many hands: start some, or lose some."""
        for _ in range(count - len(self.ends)):
            self.join()
        for mortal in list(self.ends)[count:]:
            self.lost += 1
            self.ends.pop(mortal).close()

    def may_lose(self, mortal: Mortal) -> None:
        """Lose this hand, as SIGKILL does, by chance."""
        if self.random.random() < self.loss and id(mortal) in self.ends:
            self.lost += 1
            self.ends.pop(id(mortal)).close()
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

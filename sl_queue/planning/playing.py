"""Deeds of a worker in a simulation: it computes, awaits, sends, saves, and gives calls to its hands. Pure."""

from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

from sl_queue.protocol.messages import Kind, MicroBatch
from sl_queue.protocol.schedule.actions import Action, Backward, Forward, Fuse, Predict, Score, Update, Work
from sl_queue.protocol.schedule.pipeline import Pipeline

Message = tuple[str, Kind | None, MicroBatch]  # feature party, kind (None: a checkpoint on its way to disk), which
Call = tuple[str, Work, MicroBatch]  # of a worker's hands


@dataclass(frozen=True, slots=True)
class Compute:
    """Work of its own."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Await:
    """A wait for a message, or for what a hand does."""

    message: Message | Call


@dataclass(frozen=True, slots=True)
class Send:
    """A message that leaves."""

    message: Message
    size: float  # bytes


@dataclass(frozen=True, slots=True)
class Give:
    """A call given to a hand, which the worker does not wait for."""

    call: Call
    seconds: float
    sends: tuple[Send, ...] = ()  # when it is done


@dataclass(frozen=True, slots=True)
class Save:
    """A checkpoint on its way to disk."""

    done: Message  # awaited as a message is


Script = Generator["Compute | Await | Send | Give | Save", None, None]


_WORK: Mapping[type[Action], Work] = {Backward: "backward", Fuse: "fuse", Predict: "predict", Score: "score"}


@dataclass(slots=True)
class OverHands:
    """A worker whose hands compute for it, as compute/spread has it. Mutable: it knows what they have been given."""

    worker: str
    pipeline: Pipeline
    seconds_of: Callable[[Call], float]
    update_s: float
    ahead: deque[tuple[MicroBatch, ...]] = field(default_factory=deque)  # forwards to begin after each update
    begun: set[MicroBatch] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)  # awaited by the next update

    def play(self, action: Action, sends: tuple[Send, ...]) -> Script:
        """Play an action of a worker over hands: forwards are begun together, an update waits for what is under way."""
        match action:
            case Forward(micro_batch):
                if micro_batch not in self.begun:
                    self.ahead = deque(self.pipeline.together(micro_batch.step))
                    yield from self._begin()
                self.begun.discard(micro_batch)
                yield Await((self.worker, "forward", micro_batch))
            case Backward(micro_batch) | Fuse(micro_batch):
                call = (self.worker, _WORK[type(action)], micro_batch)
                self.calls.append(call)
                yield Give(call, self.seconds_of(call), sends)
            case Update():
                yield from map(Await, self.calls)
                self.calls.clear()
                yield Compute(self.update_s)
                yield from self._begin()
            case Predict(micro_batch) | Score(micro_batch):
                call = (self.worker, _WORK[type(action)], micro_batch)
                yield Give(call, self.seconds_of(call))
                yield Await(call)

    def _begin(self) -> Script:
        for micro_batch in self.ahead.popleft() if self.ahead else ():
            self.begun.add(micro_batch)
            yield Give((self.worker, "forward", micro_batch), self.seconds_of((self.worker, "forward", micro_batch)))

"""The vocabulary of events: what a role does, said once, for everything that watches it.

Loops, channels and the scheduler pass events to an `Observer`; the log, Prometheus, chaos and benchmarks are observers.
An event holds names and numbers, never a tensor, an id or a value of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from sl_queue.errors import RunStopped, SlQueueError
from sl_queue.protocol.hand_events import HandCame as HandCame
from sl_queue.protocol.hand_events import HandLeft as HandLeft
from sl_queue.protocol.hand_events import HandRefused as HandRefused
from sl_queue.protocol.hand_events import OfHands

Numbers = Mapping[str, float | None]


# A process and its place in the run -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker process has its libraries."""

    party: str


@dataclass(frozen=True, slots=True)
class StandsBy:
    """A standby waits for the state folder, which the process `holder` has."""

    party: str
    holder: str


@dataclass(frozen=True, slots=True)
class TookOver:
    """A standby has the state folder, and goes on from the checkpoint in it."""

    party: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """Something that a worker needs before it connects is there: its checkpoint, table or model; a standby has all."""

    party: str
    what: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker is connected and has joined, or the scheduler listens."""

    party: str


@dataclass(frozen=True, slots=True)
class Began:
    """A party trains from the checkpoint of `step` on; -1: from the initial weights."""

    party: str
    run: str
    generation: int
    step: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """An optimizer step is done; `messages` counts the data messages of this process so far, by their fate."""

    party: str
    generation: int
    step: int
    samples: int  # rows trained on by this process so far
    loss: float | None = None  # at the label holder
    messages: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """The checkpoint of `step` is on disk, and what it depends on is acknowledged."""

    party: str
    generation: int
    step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EpochDone:
    """An epoch is on disk; of the scheduler: in the history."""

    party: str
    epoch: int
    step: int
    loss: float
    holdout: Numbers | None = None
    seconds: float | None = None
    epochs: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A party has written its final weights, those after `step`."""

    party: str
    step: int
    folder: str
    already: bool = False  # by an earlier process


@dataclass(frozen=True, slots=True)
class Stopped:
    """A worker ends on purpose, to resume later."""

    party: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker ends with an error; `error` is the name of its class."""

    party: str
    error: str
    message: str
    exit_code: int


# Messages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sent:
    """A message was handed to the broker."""

    party: str
    receiver: str
    kind: str
    bytes: int
    numbers: int = 0  # in its tensor


@dataclass(frozen=True, slots=True)
class Received:
    """A message came from the broker, readable or not."""

    party: str
    sender: str
    bytes: int
    redelivered: bool


@dataclass(frozen=True, slots=True)
class Resent:
    """Messages were sent again because a peer asked; `seconds`: the time over which they were counted."""

    party: str
    receiver: str
    messages: int
    first: str = ""
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """Messages were refused; `reason` is that of the last, `seconds` the time over which they were counted."""

    party: str
    sender: str
    reason: str
    messages: int = 1
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Foreign:
    """Messages of another version of the protocol are refused; `reason` says what to do."""

    party: str
    sender: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The connection to the broker was lost and made again."""

    party: str


# Waiting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WaitBegan:
    """A worker begins to wait; waits may nest, and each ends with its `Waited`."""

    party: str
    source: str  # a party, "scheduler", "broker", "disk", "hands" or "a hand to come"
    cause: str


@dataclass(frozen=True, slots=True)
class Waited:
    """The innermost wait is over."""

    party: str
    source: str
    cause: str
    seconds: float
    step: int | None = None
    index: int | None = None  # of the micro-batch


@dataclass(frozen=True, slots=True)
class StillWaiting:
    """A wait takes longer than `patience`, again and again."""

    party: str
    what: str
    seconds: float
    silent_s: float | None = None  # since anything was heard of whom it waits for
    outage_s: float | None = None  # for which its own link to the broker has been unusable
    reason: str = ""  # of that


# The scheduler --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PhaseChanged:
    """The run has entered another phase."""

    party: str
    job: str
    run: str | None
    phase: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """The run waits for these parties before it begins."""

    party: str
    parties: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A worker does not fit the run, which waits for one of its party that does."""

    party: str
    refused: str
    reason: str


@dataclass(frozen=True, slots=True)
class GenerationBegan:
    """Messages were lost for good, and all parties go back to the checkpoint of `step`."""

    party: str
    generation: int
    step: int


PerMessage = Sent | Received | WaitBegan | Waited  # several a step: counted rather than written down
_OfStarting = Loaded | StandsBy | TookOver | Prepared | Ready
_OfARun = Began | StepDone | Committed | EpochDone | Finished | Stopped | Failed
_OfMessages = Resent | Rejected | Foreign | Reconnected | StillWaiting
_OfTheScheduler = PhaseChanged | Missing | Refused | GenerationBegan
Rare = _OfStarting | _OfARun | _OfMessages | OfHands | _OfTheScheduler
Event = PerMessage | Rare


class Observer(Protocol):
    """A subscriber. It may be called from any thread, with no lock held; it does not block and does not raise."""

    def __call__(self, event: Event, /) -> None: ...


def ignore(event: Event, /) -> None:
    """Observe nothing."""


def ending(party: str, error: SlQueueError) -> Stopped | Failed:
    """Return the event with which a worker ends."""
    if isinstance(error, RunStopped):
        return Stopped(party, str(error))
    return Failed(party, type(error).__name__, str(error), error.exit_code)

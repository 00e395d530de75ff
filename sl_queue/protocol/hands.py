"""A party's lead and its hands: what they say to each other, and the lead's memory of who does what. Pure.

A *task* is one micro-batch at one hand: its first call, and later ones that need what the first has left there. All
calls are remembered until the task ends, so a hand may be lost at any moment: whoever claims the task next is given the
same calls, computes the same bits, and what is known already is dropped.

    lead -> tasks   Ticket: a task waits; RabbitMQ deals tickets to hands, a few to each
    hand -> lead    Hello (what it computes with, again and again), Claim (of a ticket), Result, Failure, Back
    lead -> hand    Welcome, Beat, Call, Drop (of a ticket that is of no use any more), Farewell
    lead -> hands   Weights: a version after each update

Bytes of a message: CRC-32 of what follows, size of the header, header in JSON, then the tensors as they are. Nothing of
this passes a broker that a party does not trust with its weights.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import count
from typing import Any, Final, get_args, get_type_hints

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.messages import MicroBatch, Payload

LEAD: Final = "lead"  # addresses, besides the names of hands
OWN: Final = "lead's own"  # the hand in the lead's process
TASKS: Final = "tasks"
HANDS: Final = "hands"  # all of them

BEAT_S = 1.0  # between two signs of life, of either side
MOST_DEATHS = 3  # hands lost over one task, and it ends the run by its name

Tensors = Mapping[str, Payload]
_HEAD = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Hello:
    """A hand is here. All of `about` must be as at the lead, for the same bits to follow."""

    hand: str
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Welcome:
    """The lead takes a hand on; `secret` keys the draws of the party's models."""

    lead: str
    hand: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Farewell:
    """The lead needs a hand no more; with an error it never did."""

    error: str = ""  # class name
    message: str = ""


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life of the lead, which also finds out whether the hand is still there."""

    lead: str


@dataclass(frozen=True, slots=True)
class Weights:
    """A version of what changes from step to step. Older ones than `oldest`, and older tasks, may be forgotten."""

    lead: str
    version: int
    oldest: int
    oldest_task: int
    tensors: Tensors = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A task waits for a hand."""

    lead: str
    task: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A hand would do that task."""

    lead: str
    hand: str
    task: int


@dataclass(frozen=True, slots=True)
class Drop:
    """A task that was claimed is another's, or is done."""

    lead: str
    task: int


@dataclass(frozen=True, slots=True)
class Back:
    """A hand no longer has what a call of the task needs: it must be dealt again."""

    lead: str
    hand: str
    task: int


@dataclass(frozen=True, slots=True)
class Call:
    """Do `what` with a micro-batch, on that version of the weights."""

    lead: str
    task: int
    what: str
    micro_batch: MicroBatch
    version: int
    tensors: Tensors = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a call."""

    lead: str
    hand: str
    task: int
    what: str
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """The model failed: another hand would fail alike."""

    lead: str
    hand: str
    task: int
    error: str  # class name
    message: str


ToLead = Hello | Claim | Result | Failure | Back
ToHand = Welcome | Farewell | Beat | Weights | Ticket | Drop | Call
Note = ToLead | ToHand

_KINDS: Final[Mapping[str, Any]] = {kind.__name__: kind for kind in get_args(ToLead) + get_args(ToHand)}
_PLAIN: Final = {int: int, str: str, MicroBatch: list, Mapping[str, Any]: dict}
_FIELDS: Final = {
    name: {key: _PLAIN[hint] for key, hint in get_type_hints(kind).items() if key != "tensors"}
    for name, kind in _KINDS.items()
}


def encode(note: Note) -> bytes:
    """Return a message as it travels."""
    tensors: Tensors = getattr(note, "tensors", {})
    parts = [memoryview(payload.data).cast("B") for payload in tensors.values()]
    plain = {each.name: getattr(note, each.name) for each in fields(note) if each.name != "tensors"}
    plain = {key: [v.step, v.index] if isinstance(v, MicroBatch) else v for key, v in plain.items()}
    listed = [
        [name, payload.dtype, list(payload.shape), part.nbytes]
        for (name, payload), part in zip(tensors.items(), parts, strict=True)
    ]
    header = json.dumps([type(note).__name__, plain, listed]).encode()
    checked = zlib.crc32(header)
    for part in parts:
        checked = zlib.crc32(part, checked)
    return b"".join([_HEAD.pack(checked, len(header)), header, *parts])


def decode(body: bytes) -> Note:
    """Read a message; its tensors are views of `body`. Raises RemoteProtocolError for anything else."""
    try:
        whole = memoryview(body)
        checked, size = _HEAD.unpack_from(whole)
        if checked != zlib.crc32(whole[_HEAD.size :]):
            raise ValueError("a damaged message")
        start = _HEAD.size + size
        name, plain, listed = json.loads(bytes(whole[_HEAD.size : start]))
        kind, tensors = _KINDS[name], dict[str, Payload]()
        for key, dtype, shape, length in listed:
            tensors[str(key)] = Payload(str(dtype), tuple(map(int, shape)), whole[start : start + int(length)])
            start += int(length)
        if start != len(whole) or {key: type(value) for key, value in plain.items()} != _FIELDS[name]:
            raise ValueError("other fields")
        plain = {key: MicroBatch(*map(int, v)) if type(v) is list else v for key, v in plain.items()}
        note: Note = kind(**plain, **({"tensors": tensors} if tensors else {}))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise RemoteProtocolError(f"an unreadable message between lead and hands ({type(error).__name__})") from None
    return note


# The lead's memory ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Task:
    calls: list[Call]
    holder: str | None = None
    results: dict[str, Result] = field(default_factory=dict)
    deaths: int = 0  # of hands that had it
    given: int = 0  # calls that the lead's own hand was given

    @property
    def waits(self) -> bool:
        """True if nobody has it and something of it is unanswered."""
        return self.holder is None and len(self.results) < len(self.calls)


class Roster:
    """The tasks of a party and who has them. Mutable, and used under a lock of its owner.

    `lead`: a name of this process, so that what was meant for an earlier one means nothing.
    """

    def __init__(self, lead: str) -> None:
        self.lead = lead
        self.repeated = 0  # tasks that were dealt again
        self._tasks: dict[int, _Task] = {}  # open ones, in the order in which they were begun
        self._numbers = count()
        self._newest = -1

    def __len__(self) -> int:
        return len(self._tasks)

    def oldest(self, newest_version: int) -> tuple[int, int]:
        """Return the oldest version that an open task names, and the oldest open task, or what comes next."""
        versions = (task.calls[0].version for task in self._tasks.values())
        return min(versions, default=newest_version), next(iter(self._tasks), self._newest + 1)

    def begin(self, what: str, micro_batch: MicroBatch, version: int, tensors: Tensors) -> int:
        """Open a task with its first call, and return its number: a ticket is due."""
        self._newest = number = next(self._numbers)
        self._tasks[number] = _Task([Call(self.lead, number, what, micro_batch, version, tensors)])
        return number

    def go_on(self, number: int, what: str, tensors: Tensors) -> tuple[Call, str | None]:
        """Add a call to a task, on its weights; returns it with who has the task: None, and a ticket is due."""
        task = self._tasks[number]
        first = task.calls[0]
        task.calls.append(Call(self.lead, number, what, first.micro_batch, first.version, tensors))
        return task.calls[-1], task.holder

    def claim(self, hand: str, number: int) -> tuple[Call, ...]:
        """Give a task to a hand: all its calls. Nothing if it is another's, is done or was never begun."""
        task = self._tasks.get(number)
        if task is None or not (task.waits or task.holder == hand):
            return ()
        task.holder = hand
        return tuple(task.calls)

    def next_own(self, *, alone: bool) -> Call | None:
        """Return what the lead's own hand has to do next; new tasks only while it is `alone`."""
        for task in self._tasks.values():
            if (task.holder == OWN and len(task.calls) > task.given) or (alone and task.waits):
                task.given = task.given if task.holder == OWN else 0
                task.holder = OWN
                task.given += 1
                return task.calls[task.given - 1]
        return None

    def take(self, result: Result) -> bool:
        """Keep the answer to a call, whoever gave it; False if it is known, or was not asked for."""
        task = self._tasks.get(result.task)
        if result.lead != self.lead or task is None or result.what in task.results:
            return False
        if all(call.what != result.what for call in task.calls):
            return False
        task.results[result.what] = result
        return True

    def leave(self, hand: str, *, dead: bool = True) -> Iterator[int]:
        """Take what a lost hand had from it; yields the tasks for which tickets are due.

        A `dead` hand was at the oldest of its tasks.
        """
        for number, task in self._tasks.items():
            if task.holder != hand:
                continue
            task.holder = None
            if task.waits:
                task.deaths += dead
                dead = False
                self.repeated += 1
                yield number

    def put_back(self, hand: str, number: int) -> bool:
        """Take a task from a hand that cannot go on with it; True if a ticket is due."""
        task = self._tasks.get(number)
        if task is None or task.holder != hand:
            return False
        task.holder = None
        self.repeated += task.waits
        return task.waits

    def deadly(self) -> MicroBatch | None:
        """Return the micro-batch of a task over which too many hands were lost."""
        found = (task.calls[0].micro_batch for task in self._tasks.values() if task.deaths >= MOST_DEATHS)
        return next(found, None)

    def result(self, number: int, what: str) -> Result | None:
        """Return the answer to a call, if it is here."""
        return self._tasks[number].results.get(what)

    def holder(self, number: int) -> str:
        """Return who has a task; empty if nobody has, or if there is no such task."""
        task = self._tasks.get(number)
        return (task.holder if task is not None else None) or ""

    def is_open(self, number: int) -> bool:
        """Return True while a task has not ended."""
        return number in self._tasks

    def waiting(self) -> tuple[int, ...]:
        """Return the tasks that nobody has."""
        return tuple(number for number, task in self._tasks.items() if task.waits)

    def busy(self) -> frozenset[str]:
        """Return who has a task with something unanswered."""
        tasks = self._tasks.values()
        return frozenset(t.holder for t in tasks if t.holder is not None and len(t.results) < len(t.calls))

    def end(self, number: int) -> None:
        """Close a task: nobody will need its calls again."""
        del self._tasks[number]

    def clear(self) -> None:
        """Forget every task; what hands still answer is dropped."""
        self._tasks.clear()

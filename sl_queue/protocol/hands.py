"""A party's lead and its hands: what they say to each other. Pure.

A *task* is one micro-batch at one hand: its first call, and later ones that need what the first has left there. All
calls are remembered until the task ends, so a hand may be lost at any moment: whoever claims the task next is given the
same calls, computes the same bits, and what is known already is dropped. A ticket brings the first call along, so a
hand begins at once; only a large call is given when it is claimed.

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
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, get_args, get_type_hints

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.messages import MicroBatch, Payload

LEAD: Final = "lead"  # addresses, besides the names of hands
OWN: Final = "lead's own"  # the hand in the lead's process
TASKS: Final = "tasks"
HANDS: Final = "hands"  # all of them

BEAT_S = 1.0  # between two signs of life of a hand
PROBE_S = 0.25  # between two looks of the lead at who is still here
LOOKS = 4  # after so many, a task that waits while a hand is idle is dealt again
SILENT_S = 10.0  # without a sign of a hand, and what it has is given to others
TICKET_BYTES = 256 * 1024  # of tensors that a ticket brings along
MOST_DEATHS = 3  # hands lost over one task, and it ends the run by its name
APART_S = 10.0  # between two of them: hands that go together, as those of a party that is scaled down, count as one

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
    """A task waits for a hand; it brings the first call along, unless `what` is empty."""

    lead: str
    task: int
    what: str
    micro_batch: MicroBatch
    version: int
    tensors: Tensors = field(default_factory=dict, repr=False)

    @property
    def call(self) -> "Call | None":
        """The first call of the task, if it is here."""
        if not self.what:
            return None
        return Call(self.lead, self.task, self.what, self.micro_batch, self.version, self.tensors)


@dataclass(frozen=True, slots=True)
class Claim:
    """A hand has a ticket for that task, and would do all of it."""

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

    @property
    def fits_ticket(self) -> bool:
        """True if a ticket brings this call along."""
        return sum(len(payload.data) for payload in self.tensors.values()) <= TICKET_BYTES


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

"""The ground of every message: who speaks to whom, of what kind, and under which name; activations and gradients.

A message is known by its header (run, generation, kind, sender, receiver, micro-batch). Two data messages with equal
headers are the same message, whatever brought the second one here. Reports and commands are idempotent statements
about the present, so they need no key.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Final

SCHEDULER = "scheduler"
OPERATOR = "operator"  # the person at the command line: `sl-queue status` and `sl-queue stop`

BEFORE_FIRST_STEP = -1  # the step of the checkpoint that everybody holds: the initial weights


class Role(StrEnum):
    """The part that somebody has in a job."""

    SCHEDULER = SCHEDULER
    OPERATOR = OPERATOR
    LABEL_HOLDER = "label holder"
    FEATURE_PARTY = "feature party"


class Kind(StrEnum):
    """The kind of a message; a part of its routing key."""

    ACTIVATION = "activation"
    HOLDOUT = "holdout"  # an activation of held-out rows: evaluated, never answered
    GRADIENT = "gradient"
    MASKED = "masked"  # before a run: ids of a party as masked points, or keys of the rows that are held out
    REPORT = "report"
    COMMAND = "command"


PARTIES: Final = (Role.LABEL_HOLDER, Role.FEATURE_PARTY)
ALL_KINDS: Final = frozenset(Kind)

WHO_MAY_SAY: Final[Mapping[Kind, frozenset[tuple[Role, Role]]]] = {  # (from, to); control.py is narrower for reports
    Kind.ACTIVATION: frozenset({(Role.FEATURE_PARTY, Role.LABEL_HOLDER)}),
    Kind.HOLDOUT: frozenset({(Role.FEATURE_PARTY, Role.LABEL_HOLDER)}),
    Kind.GRADIENT: frozenset({(Role.LABEL_HOLDER, Role.FEATURE_PARTY)}),
    Kind.MASKED: frozenset(
        {
            (Role.FEATURE_PARTY, Role.LABEL_HOLDER),
            (Role.LABEL_HOLDER, Role.FEATURE_PARTY),
            *((party, Role.SCHEDULER) for party in PARTIES),
            *((Role.SCHEDULER, party) for party in PARTIES),
        }
    ),
    Kind.REPORT: frozenset(
        {
            (Role.FEATURE_PARTY, Role.LABEL_HOLDER),
            (Role.LABEL_HOLDER, Role.FEATURE_PARTY),
            (Role.OPERATOR, Role.SCHEDULER),
            *((party, Role.SCHEDULER) for party in PARTIES),
            *((Role.SCHEDULER, party) for party in PARTIES),
        }
    ),
    Kind.COMMAND: frozenset((Role.SCHEDULER, receiver) for receiver in (*PARTIES, Role.OPERATOR)),
}


def kinds_between(sender: Role, receiver: Role) -> frozenset[Kind]:
    """Return what the one may send the other."""
    return frozenset(kind for kind, allowed in WHO_MAY_SAY.items() if (sender, receiver) in allowed)


@dataclass(frozen=True, slots=True, order=True)
class MicroBatch:
    """The slice `index` of optimizer step `step`; both count from 0, steps over the whole run."""

    step: int
    index: int

    def __str__(self) -> str:
        return f"{self.step}.{self.index}"


@dataclass(frozen=True, slots=True)
class Payload:
    """A tensor at rest: little-endian, C order, with a digest of the row ids it belongs to (may be empty)."""

    dtype: str  # torch's name without the prefix: "float32"
    shape: tuple[int, ...]
    data: bytes | memoryview = field(repr=False)  # of this payload alone, where it can be written to
    rows: bytes = field(default=b"", repr=False)
    packing: str = ""  # how protocol/wire made it shorter for its way; empty: not at all

    @property
    def numbers(self) -> int:
        """Number of its elements."""
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Payload)
            and (self.dtype, self.shape, self.rows, self.packing)
            == (other.dtype, other.shape, other.rows, other.packing)
            and bytes(self.data) == bytes(other.data)
        )

    def __hash__(self) -> int:
        return hash((self.dtype, self.shape, bytes(self.data)))


@dataclass(frozen=True, slots=True)
class Activation:
    """The output of a base model on one micro-batch, shape (rows, *cut)."""

    micro_batch: MicroBatch
    payload: Payload
    holdout: bool = False

    @property
    def kind(self) -> Kind:
        return Kind.HOLDOUT if self.holdout else Kind.ACTIVATION


@dataclass(frozen=True, slots=True)
class Gradient:
    """d loss / d activation of one micro-batch for one party, shape (rows, *cut)."""

    micro_batch: MicroBatch
    payload: Payload

    @property
    def kind(self) -> Kind:
        return Kind.GRADIENT


@dataclass(frozen=True, slots=True)
class Masked:
    """A chunk of a party's masked ids, shape (ids, bytes of a point, of a finished mask or of a row's key).

    `micro_batch.step` says whose they are and how far on their way, `micro_batch.index` counts the chunks.
    """

    micro_batch: MicroBatch
    payload: Payload

    @property
    def kind(self) -> Kind:
        return Kind.MASKED


@dataclass(frozen=True, slots=True)
class Header:
    """The head of every message, and for data messages the name it is known by."""

    run: str
    generation: int
    kind: Kind
    sender: str
    receiver: str
    micro_batch: MicroBatch
    committed: int = BEFORE_FIRST_STEP  # what the sender has on disk: it will never ask for anything up to this step

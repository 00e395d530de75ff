"""Private set intersection of all parties: who masks whose ids in which order, and what the scheduler compares.

    owner: ids -> points x blind -> sorted -> every other party: x its mask, order kept -> back at the owner: x finish
    owner: finished masks, shortened, sorted -> scheduler -> the masks that all sets hold -> every party

Feature parties have no queues to each other, so the label holder passes on what is between two of them.

Who learns what: the scheduler, which holds no ids, how many rows any of the parties share; a party, which of its rows
all others hold, and how many ids each brings, rounded up; of an id that is not shared by all, nobody anything. The
scheduler together with one party learns, of each of this party's ids, who else holds it.

Everything here is a function of what was said, and everything that was said can be said again.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.messages import SCHEDULER, MicroBatch, Payload

ALIGNING = "aligning"  # the phase of a run before its rows are known
CHUNK = 20_000  # ids in a message
POINT_BYTES = 32
MASK_BYTES = 16  # of a finished point: two of 2**32 ids collide with a chance of 2**-65
MESSAGE_BYTES = CHUNK * POINT_BYTES + 4096
WINDOW = 2  # chunks of one set on their way: one is masked while the next one travels
ASKED = 8  # chunks of finished masks that the scheduler asks a party for at a time

Masks = npt.NDArray[np.void]  # (ids,) of MASK_BYTES each


def padded(n_ids: int, pad: int) -> int:
    """Round a number of ids up, so that it tells less; never to none, which would tell that there are none."""
    return max(1, -(-n_ids // pad)) * pad


@dataclass(frozen=True, slots=True)
class Cut:
    """Cutting of so many ids into messages."""

    n_ids: int
    size: int = CHUNK

    @property
    def chunks(self) -> int:
        """Number of messages that they need."""
        return -(-self.n_ids // self.size)

    def size_of(self, chunk: int) -> int:
        """Count the ids in one of them; 0 for one that there is not."""
        return max(0, min(self.size, self.n_ids - chunk * self.size))

    def piece(self, body: memoryview, chunk: int) -> memoryview:
        """Return one of the pieces of all ids, joined."""
        item = len(body) // max(self.n_ids, 1)
        return body[chunk * self.size * item : (chunk + 1) * self.size * item]


def as_masks(body: bytes | memoryview) -> Masks:
    """View bytes as masks."""
    return np.frombuffer(body, np.dtype((np.void, MASK_BYTES)))


@dataclass(frozen=True, slots=True)
class Hop:
    """One stretch of the way of a chunk: to whom, and whether that party masks it or passes it on."""

    receiver: str
    masks: bool


@dataclass(frozen=True)
class Ring:
    """The ways of all sets."""

    label_holder: str
    feature_parties: tuple[str, ...]

    @property
    def parties(self) -> tuple[str, ...]:
        return (self.label_holder, *self.feature_parties)

    @cached_property
    def routes(self) -> Mapping[str, tuple[Hop, ...]]:
        """The hops of each party's set, the last of them back to it."""
        return {owner: self._route(owner) for owner in self.parties}

    def _route(self, owner: str) -> tuple[Hop, ...]:
        places = {party: place for place, party in enumerate(self.feature_parties)}
        first = places.get(owner, -1) + 1
        others = [*self.feature_parties[first:], *self.feature_parties[: max(first - 1, 0)]]
        masking = others if owner == self.label_holder else [self.label_holder, *others]
        hops, last = list[Hop](), owner
        for party in (*masking, owner):
            if self.label_holder not in (last, party):
                hops.append(Hop(self.label_holder, masks=False))
            hops.append(Hop(party, masks=party != owner))
            last = party
        return tuple(hops)

    def key(self, owner: str, hop: int, chunk: int) -> MicroBatch:
        """Name a chunk on its way."""
        return MicroBatch(self.parties.index(owner) * self._width + hop, chunk)

    def place(self, key: MicroBatch, sender: str, receiver: str) -> tuple[str, int]:
        """Say whose chunk it is and at which hop. Raises RemoteProtocolError if it does not belong on that stretch."""
        place, hop = divmod(key.step, self._width)
        if place < len(self.parties):
            owner = self.parties[place]
            route = self.routes[owner]
            came_from = owner if hop == 0 else route[hop - 1].receiver if hop < len(route) else ""
            if hop < len(route) and (route[hop].receiver, came_from) == (receiver, sender):
                return owner, hop
        raise RemoteProtocolError(f"masked ids {key} of {sender!r} are on no way that leads to {receiver!r}")

    @property
    def _width(self) -> int:
        return 2 * len(self.parties) + 1


@dataclass(slots=True)
class Travel:
    """The own chunks on their way around. Mutable: it is the memory of one process, and nothing depends on it."""

    total: int
    again_s: float  # after which one that has not come back is sent again
    back: set[int] = field(default_factory=set)
    sent: dict[int, float] = field(default_factory=dict)

    def due(self, now: float) -> list[int]:
        """Return the chunks to send now: the first few that are not back, unless they are on their way."""
        missing = [chunk for chunk in range(self.total) if chunk not in self.back][:WINDOW]
        due = [chunk for chunk in missing if now - self.sent.get(chunk, -np.inf) >= self.again_s]
        self.sent.update(dict.fromkeys(due, now))
        return due

    def again(self) -> None:
        """Send all that is not back: somebody may have lost what it had in hand."""
        self.sent.clear()

    def came_back(self, chunk: int, now: float) -> None:
        """Count a chunk as finished; those behind it are on their way still, so their time begins again."""
        self.sent.pop(chunk, None)
        self.back.add(chunk)
        self.sent = dict.fromkeys(self.sent, now)


@dataclass(frozen=True, slots=True)
class Rule:
    """Rule of an alignment, as the job states it."""

    job: Mapping[str, Any]  # canonical
    ring: Ring
    at_least: int
    at_most: int | None
    pad: int
    chunk: int = CHUNK

    @property
    def largest(self) -> float:
        """Return the largest size that a party may report, rounded up as it does."""
        return math.inf if self.at_most is None else padded(self.at_most, self.pad)


def positions_of(
    finished: Iterable[Masks], places: npt.NDArray[np.integer], common: Masks, n_ids: int
) -> npt.NDArray[np.int64]:
    """Find which of the own ids are shared, ascending; what is beyond `n_ids` stands for nobody.

    `finished`: own masks in parts, in the order in which they left; `places`: the id of each. `common`: those that all
    hold, ascending. Raises RemoteProtocolError for one that is nobody's.
    """
    shared, first = np.zeros(len(places), np.bool_), 0
    for masks in finished:
        at = np.searchsorted(common, masks)
        among = common[np.minimum(at, len(common) - 1)] == masks if len(common) else np.zeros(len(masks), np.bool_)
        shared[places[first : first + len(masks)][among]] = True
        first += len(masks)
    if np.count_nonzero(shared) != len(common):
        raise RemoteProtocolError(f"{SCHEDULER} names shared ids that are not among its own")
    if shared[n_ids:].any():
        raise RemoteProtocolError(f"{SCHEDULER} names shared ids that nobody has")
    return np.flatnonzero(shared)


def payload(body: bytes | memoryview, item_bytes: int) -> Payload:
    """Wrap points or masks as a tensor of bytes."""
    return Payload("int8", (len(body) // item_bytes, item_bytes), body)

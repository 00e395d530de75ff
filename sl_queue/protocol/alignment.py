"""Private set intersection of all parties: who masks whose ids in which order, and what the scheduler compares.

    owner: ids -> points x blind -> sorted -> every other party: x its mask, order kept -> back at the owner: x finish
    owner: finished masks, shortened, sorted -> scheduler -> the masks that all sets hold -> every party

Feature parties have no queues to each other, so the label holder passes on what is between two of them.

Who learns what: the scheduler, which holds no ids, how many rows any of the parties share; a party, which of its rows
all others hold, and how many ids each brings, rounded up; of an id that is not shared by all, nobody anything. The
scheduler together with one party learns, of each of this party's ids, who else holds it.

Everything here is a function of what was said, and everything that was said can be said again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.control import Offer
from sl_queue.protocol.messages import SCHEDULER, MicroBatch
from sl_queue.protocol.scheduler.state import Phase
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus

ALIGNING = "aligning"  # the phase of a run before its rows are known
CHUNK = 20_000  # ids in a message
POINT_BYTES = 32
MASK_BYTES = 16  # of a finished point: two of 2**32 ids collide with a chance of 2**-65
MESSAGE_BYTES = CHUNK * POINT_BYTES + 4096
WINDOW = 4  # chunks of one set on their way
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """Masks that all parties hold; written down before anyone hears of them."""

    tokens: Mapping[str, str]  # of the parties that were compared
    sizes: Mapping[str, int]
    masks: Masks | None = field(repr=False)  # ascending; None once all parties have what they need
    aligned: frozenset[str] = frozenset()  # parties that have it on disk


@dataclass(slots=True)
class Comparison:
    """The scheduler's side. Mutable: what it forgets is said again, but the outcome."""

    rule: Rule
    outcome: Outcome | None = None
    offers: dict[str, Offer] = field(default_factory=dict)
    sets: dict[str, dict[int, bytes]] = field(default_factory=dict)
    progress: dict[str, float] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()
    round: int = 0

    def __post_init__(self) -> None:
        if self.outcome is not None:
            self.aligned = self.outcome.aligned

    @property
    def session(self) -> str | None:
        """Names the secrets and ids of all parties; None until all are here."""
        if self.outcome is not None:
            return _session(self.outcome.tokens, self.outcome.sizes)
        if len(self.offers) < len(self.rule.ring.parties):
            return None
        return _session({p: o.token for p, o in self.offers.items()}, self.sizes)

    @property
    def sizes(self) -> dict[str, int]:
        return {party: self.offers[party].size for party in self.rule.ring.parties if party in self.offers}

    def offered(self, sender: str, offer: Offer) -> str | None:
        """Take note of a party that is here; say why nothing can come of it, or None."""
        known = self.offers.get(sender)
        if known is not None and known.incarnation == offer.incarnation:
            return None
        self.offers[sender] = offer
        self.round += 1
        if self.outcome is not None and self.outcome.tokens.get(sender) != offer.token:
            if self.aligned:
                return _begun_without(sender, self.aligned - {sender})
            self.outcome = None
        if (problem := self._lost()) is not None:
            return problem
        if known is None or known.token != offer.token:
            self.sets.clear()
        return self._fault()

    def _fault(self) -> str | None:
        at_most = self.rule.at_most
        large = {party: size for party, size in self.sizes.items() if at_most is not None and size > at_most}
        if large:
            told = ", ".join(f"{party} up to {size}" for party, size in large.items())
            return f"more ids than alignment.at_most = {at_most} allows: {told}; leave rows out, or agree on another"
        types = {party: offer.id_type for party, offer in self.offers.items()}
        if len(set(types.values())) > 1:
            told = ", ".join(f"{party} {types[party]}" for party in sorted(types))
            return (
                f'the parties\' ids are of different types: {told}; write them alike, or give data.id_type = "text" in '
                "all files"
            )
        return None

    def confirmed(self, sender: str) -> str | None:
        """Note that a party has the outcome on disk; say why the others cannot get it any more, or None."""
        self.aligned |= {sender}
        if self.outcome is not None:
            self.outcome = replace(self.outcome, aligned=self.aligned)
        return self._lost()

    def _lost(self) -> str | None:
        """Say that some have an outcome that others do not know and nobody has any more."""
        others = sorted(set(self.offers) - self.aligned)
        return _begun_without(others[0], self.aligned) if self.aligned and others and self.outcome is None else None

    def took(self, sender: str, session: str, chunk: int, body: bytes) -> None:
        """Keep a chunk of finished masks. Raises RemoteProtocolError for one that cannot be."""
        if self.outcome is not None or session != self.session:
            return
        cut = Cut(self.sizes[sender], self.rule.chunk)
        if not body or len(body) != cut.size_of(chunk) * MASK_BYTES:
            raise RemoteProtocolError(f"{sender!r} sent {len(body)} bytes as chunk {chunk} of {cut.n_ids} masked ids")
        self.sets.setdefault(sender, {})[chunk] = body

    def missing(self, party: str) -> tuple[int, ...]:
        """Name the first chunks of finished masks that a party has not sent."""
        if self.outcome is not None or self.session is None:
            return ()
        here = self.sets.get(party, {})
        total = Cut(self.sizes[party], self.rule.chunk).chunks
        return tuple(chunk for chunk in range(total) if chunk not in here)[:ASKED]

    def compared(self) -> Outcome | None:
        """Compare the sets once all are here. Raises RemoteProtocolError for one that repeats a mask."""
        if self.outcome is not None or self.session is None or any(map(self.missing, self.rule.ring.parties)):
            return None
        common: Masks | None = None
        for party in self.rule.ring.parties:
            here = self.sets[party]
            masks = np.sort(as_masks(b"".join(here[chunk] for chunk in sorted(here))))
            if len(masks) > 1 and (masks[1:] == masks[:-1]).any():
                raise RemoteProtocolError(f"{party!r} sent a masked id twice")
            common = masks if common is None else np.intersect1d(common, masks, assume_unique=True)
        assert common is not None
        tokens = {party: self.offers[party].token for party in self.rule.ring.parties}
        return Outcome(tokens, self.sizes, common)

    def concluded(self, outcome: Outcome) -> str | None:
        """Remember an outcome that is on disk; say why it is too small, or None."""
        assert outcome.masks is not None
        self.outcome, shared = outcome, len(outcome.masks)
        self.sets.clear()
        return too_few(shared, self.rule.at_least, outcome.sizes) if shared < self.rule.at_least else None

    @property
    def done(self) -> bool:
        """True if every party has its part on disk."""
        return self.aligned >= set(self.rule.ring.parties)


def too_few(shared: int, at_least: int, sizes: Mapping[str, int]) -> str:
    """Say that too few rows are shared, without a hint at which."""
    told = ", ".join(f"{party} up to {size}" for party, size in sizes.items())
    if not shared:
        return f"no row is shared by all: {told} rows. Ids may be written differently: ask the other parties how"
    return f"{shared} rows are shared by all, and alignment.at_least = {at_least}: {told} rows"


def standing(about: Comparison, job: str, epochs: int, wall: float, reason: str | None, error: str | None) -> RunStatus:
    """Describe an alignment for people; `wall` is the time in seconds since 1970."""
    parties = {party: PartyStatus(_phase(about, party)) for party in about.rule.ring.parties}
    phase = ALIGNING if error is None else Phase.STOPPED.value if error == "RunStopped" else Phase.FAILED.value
    told_at = datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")
    failed = error if phase == Phase.FAILED else None
    return RunStatus(phase, job, epochs=epochs, parties=parties, reason=reason, error=failed, told_at=told_at)


def _phase(about: Comparison, party: str) -> str:
    if party in about.aligned:
        return "aligned"
    if party not in about.offers:
        return f"{about.progress[party]:.0%} of its set masked" if party in about.progress else "not joined"
    return f"{about.progress.get(party, 0.0):.0%} of its set masked"


def _begun_without(sender: str, aligned: frozenset[str]) -> str:
    told = ", ".join(sorted(aligned))
    return (
        f"party {sender!r} is not aligned, or its table or state folder is another, and the rows of {told} are aligned "
        "already: restore that state folder, or give every party and the scheduler a new one to align from scratch"
    )


def _session(tokens: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    told = [f"{party} {tokens[party]} {sizes[party]}" for party in sorted(tokens)]
    return sha256("\n".join(told).encode()).hexdigest()[:24]


def positions_of(finished: Masks, common: Masks, n_ids: int) -> npt.NDArray[np.int64]:
    """Find which of the own ids are shared, ascending; what is beyond `n_ids` stands for nobody.

    Raises RemoteProtocolError for a shared mask that is nobody's.
    """
    order = np.argsort(finished, kind="stable")
    ascending = finished[order]
    places = np.searchsorted(ascending, common)
    if (places >= len(ascending)).any() or (ascending[np.minimum(places, len(ascending) - 1)] != common).any():
        raise RemoteProtocolError(f"{SCHEDULER} names shared ids that are not among its own")
    found = np.sort(order[places]).astype(np.int64)
    if len(found) and found[-1] >= n_ids:
        raise RemoteProtocolError(f"{SCHEDULER} names shared ids that nobody has")
    return found

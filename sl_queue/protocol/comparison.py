"""The scheduler's side of an alignment: sets of finished masks, compared; and what it says of that. It holds no ids.

What it forgets is said again by the parties, but the outcome: that is on disk before anyone hears of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256

import numpy as np

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.alignment import ALIGNING, ASKED, MASK_BYTES, Cut, Masks, Rule, as_masks
from sl_queue.protocol.control import Offer
from sl_queue.protocol.scheduler.state import Phase
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus
from sl_queue.protocol.text import counted


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
        large = {party: size for party, size in self.sizes.items() if size > self.rule.largest}
        if large:
            told = ", ".join(f"{party} up to {size}" for party, size in large.items())
            bound = f"alignment.at_most = {self.rule.at_most}"
            return f"more ids than {bound} allows: {told}; leave rows out, or agree on another"
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
            raise RemoteProtocolError(
                f"{sender!r} sent {len(body)} bytes as chunk {chunk} of {counted(cut.n_ids, 'masked id', 'masked ids')}"
            )
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
    return f"{counted(shared, 'row is', 'rows are')} shared by all, and alignment.at_least = {at_least}: {told} rows"


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

"""Events of a party with hands, a part of the vocabulary in events.py."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HandCame:
    """A hand computes for a party from now on; `hands`: how many do."""

    party: str
    hand: str
    hands: int


@dataclass(frozen=True, slots=True)
class HandLeft:
    """A hand is gone, and what it had is given to others; `hands`: how many are left."""

    party: str
    hand: str
    hands: int
    reason: str


@dataclass(frozen=True, slots=True)
class HandRefused:
    """A process that would be a hand of a party is not, since it would compute other bits."""

    party: str
    reason: str


OfHands = HandCame | HandLeft | HandRefused

"""Peers that speak another version of the protocol: named once nothing else has come of them for a patience.

Not at once: a message of an older version may have lain in a queue since before an upgrade. What lies there arrives in
one go; a worker that lives says something several times a patience.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class _Foreign:
    speaks: str
    first: float
    last: float


class Versions:
    """The version of each sender that could not be understood. Mutable; `now` is monotonic, in seconds.

    Thread-safe as far as one thread writes: every change is one operation.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._foreign: dict[str, _Foreign] = {}
        self._understood: set[str] = set()

    def foreign(self, sender: str, speaks: str, now: float) -> None:
        """Remember that `sender` sent a message of another version."""
        known = self._foreign.get(sender)
        self._foreign[sender] = _Foreign(speaks, now, now) if known is None else replace(known, speaks=speaks, last=now)

    def understood(self, sender: str) -> None:
        """Remember that `sender` sent a message of our version."""
        if sender not in self._understood:
            self._understood.add(sender)
        if self._foreign:
            self._foreign.pop(sender, None)

    def has_understood(self, sender: str) -> bool:
        """Return True if any message of `sender` was of our version."""
        return sender in self._understood

    def named(self, now: float) -> dict[str, str]:
        """Return what it means, of each sender that has spoken nothing but another version for a patience."""
        patience_s = self._patience_s
        return {
            sender: f"party {sender!r} speaks {known.speaks}: a run needs one version at every party; stop all "
            "workers, upgrade them, and start them again (docs/upgrade.md)"
            for sender, known in list(self._foreign.items())
            if now - known.first >= patience_s and known.last - known.first >= patience_s / 4
        }

"""A first look at undefended gradients: how well a feature party reads the labels of the first rows that it is sent."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from sl_queue.cut.guard import Crossing, Tap
from sl_queue.privacy import attacks
from sl_queue.privacy.attacks import Classes, Rows
from sl_queue.privacy.guards import RowIndex, numbers_of
from sl_queue.privacy.sampled import WIDTH

ROWS = 2000  # that are enough
READABLE = 0.6  # an AUC above which labels count as readable


@dataclass(frozen=True, slots=True)
class Reading:
    """Success of a party at reading the labels."""

    party: str
    auc: float  # of the best attack
    rows: int

    def told(self, more: str = "") -> str:
        """Return it as a warning; `more`: where it comes from, if not from a run."""
        return (
            f"{self.party} can read your labels from its gradients (attack AUC {self.auc:.2f} on {self.rows:,} rows "
            f"here{more}), and nothing in [privacy] defends them; `sl-queue privacy` shows what each defence costs"
        )


@dataclass(slots=True)
class FirstLook:
    """A tap on the gradients to all feature parties. Mutable: it gathers rows until it has seen enough."""

    labels: Classes = field(repr=False)  # of all rows
    index: RowIndex = field(repr=False)
    wanted: int  # rows, at most ROWS
    say: Callable[[Reading], None]
    _seen: dict[str, tuple[list[Rows], list[Classes]]] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, labels: Classes, index: RowIndex, rows: int, say: Callable[[Reading], None]) -> "FirstLook":
        """Look at the first `rows` rows, or fewer of a larger table."""
        return cls(labels, index, min(rows, ROWS), say)

    def see(self, tensor: Tensor, crossing: Crossing) -> None:
        """Keep a copy; say what can be read once there are rows enough."""
        party = crossing.receiver
        if crossing.what != "gradient" or party in self._said:
            return
        rows, labels = self._seen.setdefault(party, ([], []))
        numbers = numbers_of(tensor).reshape(len(tensor), -1)
        rows.append(numbers[:, :: -(-numbers.shape[1] // WIDTH)].astype(np.float64))
        labels.append(self.labels[self.index(crossing.rows.keys)])
        if self.rows(party) >= self.wanted:
            self.finish(party)

    def rows(self, party: str) -> int:
        """Count the rows that were seen of a party."""
        return sum(map(len, self._seen[party][1])) if party in self._seen else 0

    def finish(self, party: str) -> None:
        """Say what can be read by the rows that were seen, if it is more than by chance; look no further."""
        if party in self._said or party not in self._seen:
            return
        self._said.add(party)
        kept = self._seen.pop(party)
        rows, labels = np.concatenate(kept[0]), np.concatenate(kept[1])
        unit, rng = attacks.directions(rows), np.random.default_rng(0)
        best = max(attacks.direction(unit, labels, rng), attacks.norm(rows, labels), attacks.spectral(unit, labels))
        if best > READABLE:
            self.say(Reading(party, best, len(labels)))


@dataclass(frozen=True, slots=True)
class Both:
    """Two taps as one."""

    first: Tap
    second: Tap

    def see(self, tensor: Tensor, crossing: Crossing) -> None:
        """Show it to both."""
        self.first.see(tensor, crossing)
        self.second.see(tensor, crossing)

"""Loss and speed over the steps of a run, in a bounded number of points however long it is."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sl_queue.protocol.scheduler.past import Point

MOST_POINTS = 2000
RATE_OVER_S = 10.0


@dataclass(slots=True)
class Curves:
    """Points in the order of their steps. Mutable; `serial` changes whenever points that were here are gone."""

    points: list[Point] = field(default_factory=list)
    gap: int = 1  # steps from one point to the next, at least
    serial: int = 0
    _marks: deque[tuple[float, int, int]] = field(default_factory=deque)  # (when, samples, step)

    def take(self, at_s: float, step: int, samples: int, loss: float | None) -> None:
        """Take where the run is; a step that comes before the newest point means that the run went back."""
        self.mark(at_s, samples, step)
        if loss is None or step < 0:
            return
        if self.points and step < self.points[-1][0] - self.gap:
            self.points = [point for point in self.points if point[0] <= step]
            self.serial += 1
        if self.points and step < self.points[-1][0] + self.gap:
            return
        rate = self.samples_per_s
        self.points.append((step, loss, None if rate is None else round(rate, 1)))
        if len(self.points) > MOST_POINTS:
            self._thin()

    def fill(self, points: Iterable[Point]) -> None:
        """Add points of steps that passed unseen; where a step is here, it stays as it is."""
        newest = self.points[-1][0] if self.points else None
        here = {step for step, _, _ in self.points}
        missed = [p for p in points if p[0] not in here and p[0] >= 0 and (newest is None or p[0] < newest)]
        if not missed:
            return
        self.points = sorted([*self.points, *missed[-MOST_POINTS:]])
        self.serial += 1
        if len(self.points) > MOST_POINTS:
            self._thin()

    @property
    def samples_per_s(self) -> float | None:
        """The mean over the last seconds; None while it is not known."""
        return self._over(1)

    @property
    def steps_per_s(self) -> float | None:
        """As `samples_per_s`."""
        return self._over(2)

    def as_json(self) -> dict[str, Any]:
        """Return all points as plain values."""
        return {"points": self.points, "gap": self.gap, "serial": self.serial}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Curves":
        """Read what `as_json` wrote. Raises KeyError, TypeError, ValueError for anything else."""
        points = [
            (int(step), float(loss), None if rate is None else float(rate)) for step, loss, rate in values["points"]
        ]
        return cls(points[:MOST_POINTS], max(1, int(values["gap"])), int(values["serial"]))

    def mark(self, at_s: float, samples: int, step: int) -> None:
        """Note how far the run is, for its speed."""
        marks = self._marks
        if marks and (samples < marks[-1][1] or step < marks[-1][2]):
            marks.clear()  # the label holder was restarted and counts from 0, or the run went back
        if not marks or at_s > marks[-1][0]:
            marks.append((at_s, samples, step))
        while len(marks) > 2 and at_s - marks[1][0] >= RATE_OVER_S:
            marks.popleft()

    def _over(self, place: int) -> float | None:
        if len(self._marks) < 2:
            return None
        first, last = self._marks[0], self._marks[-1]
        return (last[place] - first[place]) / (last[0] - first[0])

    def _thin(self) -> None:
        """Keep every other point, and the newest."""
        self.gap = max(2 * self.gap, (self.points[-1][0] - self.points[0][0]) * 2 // MOST_POINTS)
        self.points = [*self.points[:-1:2], self.points[-1]]
        self.serial += 1

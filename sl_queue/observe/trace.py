"""A run as it is watched: status, curves, who waited for whom, what happened. Made of statuses alone, and bounded.

The live page shows it, the scheduler keeps it beside its history, and a report is made of what was kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sl_queue.observe.activity import Activity, Spent, spent_of
from sl_queue.observe.curves import Curves
from sl_queue.observe.happenings import Happenings, Line, is_lost, line_of
from sl_queue.protocol.event_json import finite
from sl_queue.protocol.scheduler.past import Past
from sl_queue.protocol.scheduler.state import history_line
from sl_queue.protocol.scheduler.status import RunStatus
from sl_queue.protocol.scheduler.status import as_json as status_as_json

MOST_EPOCHS = 2000
MISSED_S = 2.0  # between two statuses: some were not heard, as the scheduler tells several a second

Ideal = Callable[[Mapping[str, float]], float | None]  # the bubble that is left, from each party's busy seconds a step


def unknown(_: Mapping[str, float], /) -> float | None:
    """Know no ideal."""
    return None


def _is_another(before: RunStatus, status: RunStatus) -> bool:
    """Return True if a status is of another run than the one before."""
    return before.job != status.job or (status.run is not None and before.run not in (None, status.run))


@dataclass(slots=True)
class Trace:
    """Mutable: each status is folded in. Not thread-safe."""

    status: RunStatus | None = None
    curves: Curves = field(default_factory=Curves)
    epochs: list[dict[str, Any]] = field(default_factory=list)  # as in history.jsonl
    parties: dict[str, Activity] = field(default_factory=dict)
    happenings: Happenings = field(default_factory=Happenings)
    _taken_s: float = float("-inf")  # when the newest status was taken
    _behind: bool = True  # steps have passed that were not seen

    def take(self, status: RunStatus, at_s: float) -> None:
        """Take a status of that time, in seconds since 1970."""
        if self.status is not None and _is_another(self.status, status):
            self._forget()
        self._behind, self._taken_s = self._behind or at_s - self._taken_s > MISSED_S, at_s
        self.status = replace(status, past=None)
        self.curves.take(at_s, status.step, status.samples, status.loss)
        self._take_epochs(status)
        if status.past is not None and self._behind:
            self._behind = False
            self._catch_up(status.past)
        for name, party in status.parties.items():
            if party.totals is not None:
                self.parties.setdefault(name, Activity()).take(party.totals)
        self.happenings.take(status, at_s)

    def _forget(self) -> None:
        """Begin with another run of the same job."""
        self.curves, self.epochs, self.parties = Curves(serial=self.curves.serial + 1), [], {}
        self.happenings, self._behind = Happenings(), True

    def _catch_up(self, past: Past) -> None:
        """Add what passed unseen; what was seen stays as it is."""
        self.curves.fill(past.points)
        seen = {line["epoch"]: line for line in (*map(history_line, past.epochs), *self.epochs)}
        self._keep_epochs([seen[epoch] for epoch in sorted(seen)])

    def _take_epochs(self, status: RunStatus) -> None:
        if not status.history:
            return
        first = status.history[0].epoch
        kept = [line for line in self.epochs if line["epoch"] < first]
        self._keep_epochs([*kept, *map(history_line, status.history)])

    def _keep_epochs(self, epochs: list[dict[str, Any]]) -> None:
        self.epochs = epochs
        while len(self.epochs) > MOST_EPOCHS:
            self.epochs = [*self.epochs[: -MOST_EPOCHS // 2 : 2], *self.epochs[-MOST_EPOCHS // 2 :]]

    # What is shown ----------------------------------------------------------------------------------------------

    def view(self, ideal: Ideal = unknown) -> dict[str, Any]:
        """Return all that a page shows, but for the points of the curves."""
        status = self.status
        steps_per_s = self.curves.steps_per_s
        left = None if status is None or status.steps is None else status.steps - 1 - status.step
        return {
            "status": None if status is None else finite(status_as_json(status)),
            "samples_per_s": self.curves.samples_per_s,
            "left_s": left / steps_per_s if left is not None and steps_per_s else None,
            "epochs": finite(self.epochs),
            "parties": {name: self._party(name) for name in ({} if status is None else status.parties)},
            "bubble": self._bubble(ideal),
            "log": [line.as_json() for line in self.happenings.lines],
        }

    def points(self) -> dict[str, Any]:
        """Return the points of the curves."""
        return finite(self.curves.as_json())  # type: ignore[no-any-return]

    def _party(self, name: str) -> dict[str, Any]:
        assert self.status is not None
        activity = self.parties.get(name, Activity())
        lost = is_lost(self.status.parties[name])
        return {"lately": activity.lately.as_json(), "whole": activity.whole.as_json(), "lost": lost}

    def _bubble(self, ideal: Ideal) -> dict[str, Any] | None:
        """Return the share of the last seconds in which even the busiest party waited, and what it could be."""
        lately = {name: activity.lately for name, activity in self.parties.items() if activity.lately.seconds > 0}
        if not lately:
            return None
        busy = {name: spent.busy_s / spent.seconds for name, spent in lately.items()}
        busiest = max(busy, key=busy.__getitem__)
        steps_per_s = self.curves.steps_per_s
        best = ideal({name: share / steps_per_s for name, share in busy.items()}) if steps_per_s else None
        return {"measured": max(0.0, 1.0 - busy[busiest]), "of": busiest, "ideal": best}

    # What is kept -----------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            **self.view(),
            "curves": self.points(),
            "whole": {name: activity.whole.as_json() for name, activity in self.parties.items()},
        }

    @classmethod
    def from_json(cls, run: str, values: Mapping[str, Any]) -> "Trace":
        """Go on with what was kept of a run. Raises KeyError, TypeError, ValueError for what is no trace of it."""
        if values["status"]["run"] != run:
            raise ValueError(f"a trace of another run than {run}")
        whole: dict[str, Spent] = {str(name): spent_of(spent) for name, spent in values["whole"].items()}
        lines: list[Line] = [line_of(line) for line in values["log"]]
        return cls(
            curves=Curves.from_json(values["curves"]),
            epochs=[dict(line) for line in values["epochs"]],
            parties={name: Activity(earlier=spent) for name, spent in whole.items()},
            happenings=Happenings(lines),
        )

"""Numbers of a run for trackers, by name and step, made of the statuses that the scheduler reports."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite

from sl_queue.observe.activity import Activity
from sl_queue.observe.curves import Curves
from sl_queue.protocol.scheduler.status import RunStatus

ACTIVITY_S = 10.0  # waits and bytes of a party are said so often


@dataclass(frozen=True, slots=True)
class Scalar:
    """One number; `at_s` since 1970."""

    name: str
    step: int
    value: float
    at_s: float


def named(name: str) -> str:
    """Return a name that every tracker takes."""
    return re.sub(r"[^\w./ -]", "_", name)


@dataclass(slots=True)
class Scalars:
    """Mutable: it knows what it has said of this run."""

    curves: Curves = field(default_factory=Curves)
    parties: dict[str, Activity] = field(default_factory=dict)
    step: int = -1
    epochs: int = 0
    activity_at_s: float = 0.0

    def of(self, status: RunStatus, at_s: float) -> list[Scalar]:
        """Return what is new in a status."""
        self.curves.mark(at_s, status.samples, status.step)
        for name, party in status.parties.items():
            if party.totals is not None:
                self.parties.setdefault(name, Activity()).take(party.totals)
        found = [*self._step(status), *self._epochs(status), *self._activity(status, at_s)]
        return [Scalar(named(name), step, value, at_s) for name, step, value in found if isfinite(value)]

    def _step(self, status: RunStatus) -> Iterator[tuple[str, int, float]]:
        if status.loss is None or status.step <= self.step:
            return
        self.step = status.step
        yield "loss", status.step, status.loss
        if self.curves.samples_per_s is not None:
            yield "samples_per_s", status.step, self.curves.samples_per_s

    def _epochs(self, status: RunStatus) -> Iterator[tuple[str, int, float]]:
        for epoch in status.history:
            if epoch.epoch < self.epochs:
                continue
            self.epochs = epoch.epoch + 1
            yield "epoch/loss", epoch.step, epoch.loss
            yield "epoch/seconds", epoch.step, epoch.seconds
            for name, value in (epoch.holdout or {}).items():
                if value is not None:
                    yield f"holdout/{name}", epoch.step, value
            for party, numbers in (epoch.leak or {}).items():
                for name, value in numbers.items():
                    yield f"leak/{party}/{name}", epoch.step, value

    def _activity(self, status: RunStatus, at_s: float) -> Iterator[tuple[str, int, float]]:
        if at_s - self.activity_at_s < ACTIVITY_S or status.step < 0:
            return
        self.activity_at_s = at_s
        for name, activity in self.parties.items():
            lately, whole = activity.lately, activity.whole
            if lately.seconds <= 0:
                continue
            yield f"busy/{name}", status.step, lately.busy_s / lately.seconds
            sources = {source: 0.0 for source, _ in lately.waited_s}
            for (source, _), seconds in lately.waited_s.items():
                sources[source] += seconds
            for source, seconds in sources.items():
                yield f"waits/{name}/{source}", status.step, seconds / lately.seconds
            for what in ("sent_bytes", "received_bytes"):
                yield f"{what}/{name}", status.step, float(whole.counts.get(what, 0))

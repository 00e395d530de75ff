"""Time of a party, by what it was spent on: in the last seconds, and in all of its processes. From totals alone."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sl_queue.protocol.totals import Totals

WINDOW_S = 10.0

Whom = tuple[str, str]  # source and cause of a wait


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds, bytes and messages between two moments."""

    seconds: float
    busy_s: float
    waited_s: Mapping[Whom, float]
    counts: Mapping[str, int]  # by the names of `counted`

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values; a wait is [source, cause, seconds], the longest first."""
        waits = sorted(self.waited_s.items(), key=lambda item: -item[1])
        listed = [[source, cause, round(seconds, 3)] for (source, cause), seconds in waits if seconds > 0]
        return {
            "seconds": round(self.seconds, 3),
            "busy_s": round(self.busy_s, 3),
            "waits": listed,
            "counts": dict(self.counts),
        }

    def __add__(self, other: "Spent") -> "Spent":
        waited = {
            whom: self.waited_s.get(whom, 0.0) + other.waited_s.get(whom, 0.0)
            for whom in {**self.waited_s, **other.waited_s}
        }
        counts = Counter(self.counts)
        counts.update(other.counts)
        return Spent(self.seconds + other.seconds, self.busy_s + other.busy_s, waited, dict(counts))


NOTHING = Spent(0.0, 0.0, {}, {})


def spent_of(values: Mapping[str, Any]) -> Spent:
    """Read what `as_json` wrote. Raises KeyError, TypeError, ValueError for anything else."""
    waited = {(str(source), str(cause)): float(seconds) for source, cause, seconds in values["waits"]}
    counts = {str(name): int(count) for name, count in values["counts"].items()}
    return Spent(float(values["seconds"]), float(values["busy_s"]), waited, counts)


def between(before: Totals | None, after: Totals) -> Spent:
    """Return what happened from one telling to the next of the same process; None: from its start."""
    before = before or Totals()
    waits_before = dict(_waits(before))
    waited = {whom: max(0.0, seconds - waits_before.get(whom, 0.0)) for whom, seconds in _waits(after)}
    counts_before = counted(before)
    counts = {name: max(0, count - counts_before.get(name, 0)) for name, count in counted(after).items()}
    return Spent(max(0.0, after.age_s - before.age_s), max(0.0, after.busy_s - before.busy_s), waited, counts)


def counted(totals: Totals) -> dict[str, int]:
    """Return the counters by name, data messages by their fate among them."""
    own = ("sent_bytes", "received_bytes", "tensor_bytes", "float32_bytes", "resent", "commits", "reconnects")
    return {**{name: getattr(totals, name) for name in own}, **totals.messages}


def _waits(totals: Totals) -> Iterator[tuple[Whom, float]]:
    for source, causes in totals.waited_s.items():
        for cause, seconds in causes.items():
            yield (source, cause), seconds


def is_restart(before: Totals | None, after: Totals) -> bool:
    """Return True if a new process tells: its age is less than that of the one before."""
    return before is not None and after.age_s < before.age_s


@dataclass(slots=True)
class Activity:  # mutable: it grows with each telling
    """One party's time."""

    told: deque[Totals] = field(default_factory=deque)  # of one process, over WINDOW_S
    earlier: Spent = NOTHING  # of the processes before

    def take(self, totals: Totals) -> None:
        """Take what a party told; the same again changes nothing."""
        if self.told and is_restart(self.told[-1], totals):
            self.earlier = self.earlier + between(None, self.told[-1])
            self.told.clear()
        if self.told and totals.age_s == self.told[-1].age_s:
            return
        self.told.append(totals)
        while len(self.told) > 2 and totals.age_s - self.told[1].age_s >= WINDOW_S:
            self.told.popleft()

    @property
    def lately(self) -> Spent:
        """The last ten seconds; of a process that has told once, its time so far."""
        if not self.told:
            return NOTHING
        return between(self.told[0] if len(self.told) > 1 else None, self.told[-1])

    @property
    def whole(self) -> Spent:
        """The time of all processes."""
        return self.earlier + between(None, self.told[-1]) if self.told else self.earlier

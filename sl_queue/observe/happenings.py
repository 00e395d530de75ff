"""Faults and recoveries of a run in words, read from the differences of successive statuses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sl_queue.observe.activity import between, is_restart
from sl_queue.protocol.scheduler.status import PartyStatus, RunStatus
from sl_queue.protocol.totals import Totals

MOST = 300  # lines that are kept
SILENT_S = 2.5  # a worker that tells its totals does so once a second
SAME_S = 30.0  # within which a count of the same thing goes on in the same line

COUNTED = {  # of totals: what is said of so many
    "reconnects": "lost the broker and connected to it again",
    "resent": "sent messages again that a peer lacked",
    "redelivered": "got messages a second time from the broker",
    "duplicates": "dropped duplicates",
    "rejected": "rejected messages",
}


@dataclass(slots=True)
class Line:  # mutable: a count may grow
    """One thing that happened."""

    at_s: float  # since 1970
    party: str
    what: str  # a word for programs
    text: str
    count: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {"at": self.at_s, "party": self.party, "what": self.what, "text": self.text, "count": self.count}


def is_lost(party: PartyStatus) -> bool:
    """Return True for a worker that should be telling and is not heard of."""
    talks = party.totals is not None and party.phase in ("here", "waiting")
    return party.phase == "silent" or (talks and party.silent_s is not None and party.silent_s >= SILENT_S)


@dataclass(slots=True)
class Happenings:
    """The newest lines. Mutable: it compares each status with the one before."""

    lines: list[Line] = field(default_factory=list)
    before: RunStatus | None = None
    told: dict[str, Totals] = field(default_factory=dict)  # by each party last, also before a scheduler was restarted

    def take(self, status: RunStatus, at_s: float) -> None:
        """Add what has happened since the status before."""
        before, self.before = self.before, status
        for line in _of_run(before, status, at_s):
            self._add(line)
        for name, party in status.parties.items():
            known = None if before is None else before.parties.get(name)
            for line in (*_of_party(name, known, party, at_s), *_of_totals(name, self.told.get(name), party, at_s)):
                self._add(line)
            if party.totals is not None:
                self.told[name] = party.totals
        del self.lines[:-MOST]

    def _add(self, line: Line) -> None:
        if line.what == "checkpoint":  # the newest of each party says it all
            self.lines = [other for other in self.lines if (other.what, other.party) != (line.what, line.party)]
        if line.count is not None:
            for other in reversed(self.lines):
                if (other.what, other.party) == (line.what, line.party) and line.at_s - other.at_s < SAME_S:
                    other.count, other.at_s = (other.count or 0) + line.count, line.at_s
                    return
        self.lines.append(line)


def _of_run(before: RunStatus | None, status: RunStatus, at_s: float) -> Iterator[Line]:
    if before is None or before.phase != status.phase:
        reason = f": {status.reason}" if status.reason else ""
        yield Line(at_s, "", "phase", f"the run is {status.phase}{reason}")
    if before is not None and status.generation > before.generation:
        text = "messages were lost for good: all parties go back to a checkpoint that they have in common"
        yield Line(at_s, "", "generation", text)


def _of_party(name: str, before: PartyStatus | None, party: PartyStatus, at_s: float) -> Iterator[Line]:
    if before is None:
        return
    lost, was_lost = is_lost(party), is_lost(before)
    if lost and not was_lost:
        yield Line(at_s, name, "lost", f"nothing heard from it for {party.silent_s or 0:.0f} s: killed, or cut off")
    if was_lost and not lost and party.silent_s is not None:
        yield Line(at_s, name, "back", f"is heard again, after {before.silent_s or 0:.0f} s")
    if party.phase != before.phase and party.phase in ("refused", "stopped", "finished"):
        reason = f": {party.refused}" if party.refused else ""
        yield Line(at_s, name, party.phase, f"{party.phase}{reason}")
    if party.committed > before.committed:
        yield Line(at_s, name, "checkpoint", f"step {party.committed + 1} is on disk")


def _of_totals(name: str, before: Totals | None, party: PartyStatus, at_s: float) -> Iterator[Line]:
    if party.totals is None or before is None:
        return
    restarted = is_restart(before, party.totals)
    if restarted:
        yield Line(at_s, name, "restarted", f"a new process goes on from its checkpoint, step {party.committed + 1}")
    counts = between(None if restarted else before, party.totals).counts
    for what, text in COUNTED.items():
        if counts.get(what, 0):
            yield Line(at_s, name, what, text, counts[what])


def line_of(values: Mapping[str, Any]) -> Line:
    """Read what `as_json` wrote. Raises KeyError, TypeError, ValueError for anything else."""
    count = None if values["count"] is None else int(values["count"])
    return Line(float(values["at"]), str(values["party"]), str(values["what"]), str(values["text"]), count)

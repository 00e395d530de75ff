"""Measurements of a run: time a step, waiting, CPU and bytes, from marks that its processes made as they trained.

All clocks are the machine's monotonic one, so marks of different processes can be compared.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from sl_queue.protocol.events import EpochDone, Event, Sent, StepDone, Waited

WARM_UP = 0.1  # share of the steps that does not count


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment at the end of a step."""

    step: int
    at_s: float
    cpu_s: float  # of this process so far
    waited_s: float  # by this party so far
    committing_s: float  # by this party so far
    sent_bytes: int  # by this party so far


@dataclass(slots=True)
class Trace:
    """The steps, waits and bytes of one party, from its events or marked by hand; mutable while it trains."""

    party: str
    marks: list[Mark] = field(default_factory=list)
    waited_s: float = 0.0
    committing_s: float = 0.0  # held up by a checkpoint that is being written
    sent_bytes: int = 0
    holdout: Mapping[str, float | None] | None = None  # of the last epoch, at the label holder

    def __call__(self, event: Event, /) -> None:
        """Take in an event of the party."""
        match event:
            case Sent():
                self.sent_bytes += event.bytes
            case Waited(source="disk"):
                self.committing_s += event.seconds
            case Waited():
                self.waited_s += event.seconds
            case StepDone():
                self.mark(event.step)
            case EpochDone():
                self.holdout = event.holdout

    def mark(self, step: int) -> None:
        spent = (time.process_time(), self.waited_s, self.committing_s, self.sent_bytes)
        self.marks.append(Mark(step, time.monotonic(), *spent))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that the body takes as waiting."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run."""

    step_ms: float
    samples_per_s: float
    cpu: float  # cores in use by the parties
    waiting: Mapping[str, float]  # by party: share of the time
    committing: float  # share of the time, by the party that spends most on it
    wire_bytes: float  # per step, by all parties together
    holdout: Mapping[str, float | None] | None

    @property
    def bubble(self) -> float:
        """The share of the time in which even the busiest party waits."""
        return min(self.waiting.values(), default=0.0)


def measured(traces: Sequence[Trace], leader: str, rows_per_step: int, one_process: bool) -> Measurement:
    """Summarize the marks, from the end of the warm-up to the last step, by the clock of `leader`."""
    common = set.intersection(*({mark.step for mark in trace.marks} for trace in traces))
    steps = sorted(common)
    first, last = steps[int(len(steps) * WARM_UP)], steps[-1]
    at = {trace.party: {mark.step: mark for mark in trace.marks} for trace in traces}
    wall_s = at[leader][last].at_s - at[leader][first].at_s
    count = last - first
    spans = [(at[trace.party][first], at[trace.party][last]) for trace in traces]
    clocks = spans[:1] if one_process else spans
    return Measurement(
        step_ms=wall_s / count * 1e3,
        samples_per_s=count * rows_per_step / wall_s,
        cpu=sum(b.cpu_s - a.cpu_s for a, b in clocks) / wall_s,
        waiting={trace.party: (b.waited_s - a.waited_s) / wall_s for trace, (a, b) in zip(traces, spans, strict=True)},
        committing=max((b.committing_s - a.committing_s) / wall_s for a, b in spans),
        wire_bytes=sum(b.sent_bytes - a.sent_bytes for a, b in spans) / count,
        holdout=next((trace.holdout for trace in traces if trace.holdout is not None), None),
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """Several runs of the same thing."""

    runs: tuple[Measurement, ...]

    def middle(self, value: Callable[[Measurement], float]) -> float:
        return median(map(value, self.runs))

    def range(self, value: Callable[[Measurement], float]) -> tuple[float, float]:
        values = [value(run) for run in self.runs]
        return min(values), max(values)

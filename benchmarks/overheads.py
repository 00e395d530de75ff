"""Cost of being looked at: the live page, and the meter of leakage, each beside the same run without it.

All variants take turns. A busy machine hits wall clocks more than processors' clocks, so both are shown: the time of a
step, and what the parties' processes spend of their processors on it.

Python's collector never looks at what was imported before the processes are forked: a pass over torch takes as long as
a dozen steps and would fall into the measured part of some runs only; and no scheduler has torch in it elsewhere.
"""

import gc
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import goals, split
from benchmarks.measure import Measurement, Trace, measured
from benchmarks.processes import Work, together
from benchmarks.report import table
from benchmarks.training import GPIPE, LOCK_STEP, Order
from benchmarks.workloads import LABEL, WORKLOADS, Workload
from sl_queue.config.job import Job
from sl_queue.launch.following import Follower
from sl_queue.observe.live import Live
from sl_queue.observe.web import WatchServer
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.status import RunStatus
from sl_queue.testing.private_broker import PrivateBroker

TIMEOUT_S = 300.0
TURNS = 9
PAGE = "page"
_numbers = count()


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train the same."""

    name: str
    meter: bool = False
    watched: bool = False


PLAIN = Variant("plain")
WATCHED = Variant("with the page open", watched=True)
METERED = Variant("with the meter at every party", meter=True)


@dataclass(frozen=True, slots=True)
class Turn:
    """One run."""

    parties: Measurement
    scheduler: float  # share of one processor, over the life of its process
    page: float | None  # the same of `sl-queue watch`

    @property
    def cpu_ms(self) -> float:
        """Processors' time of all parties for one step."""
        return self.parties.cpu * self.parties.step_ms


class _Ended(Live):
    """The page's trace, which notes that the run is over."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def take(self, status: RunStatus, age_s: float = 0.0) -> None:
        super().take(status, age_s)
        if status.over:
            self.over.set()


def _watch(job: Job, url: str) -> float:
    """Show a run on a page that somebody looks at until it is over; returns the share of one processor."""
    began, spent = time.monotonic(), time.process_time()
    live = _Ended()
    with WatchServer(live, 0) as server, Follower(job, url, None, live):
        threading.Thread(target=_look, args=(f"{server.url}/events",), daemon=True).start()
        live.over.wait(TIMEOUT_S)
    return (time.process_time() - spent) / (time.monotonic() - began)


def _look(url: str) -> None:
    with suppress(OSError), urllib.request.urlopen(url, timeout=TIMEOUT_S) as events:
        for _ in events:
            pass


def _work(plan: split.Plan, role: str, url: str, state: Path) -> tuple[Trace | None, float]:
    gc.freeze()
    began, spent = time.monotonic(), time.process_time()
    trace = split.rabbit_worker(plan, role, url, state)
    return trace, (time.process_time() - spent) / (time.monotonic() - began)


def _turn(workload: Workload, epochs: int, variant: Variant, private: PrivateBroker, order: Order = GPIPE) -> Turn:
    plan = split.Plan(workload, epochs, {"pipeline": order.table}, meter=variant.meter)
    vhost = f"overheads{next(_numbers)}"
    url = private.url(vhost)
    try:
        with TemporaryDirectory(prefix="sl_queue-bench-") as folder:
            roles = (*workload.feature_parties, LABEL, SCHEDULER)
            works: dict[str, Work] = {role: (_work, (plan, role, url, Path(folder) / role)) for role in roles}
            if variant.watched:
                works[PAGE] = (_watch, (plan.job, url))
            found = together(works, TIMEOUT_S)
    finally:
        private.delete_vhost(vhost)
    page = found.pop(PAGE, None)
    traces = [trace for trace, _ in found.values() if trace is not None]
    return Turn(measured(traces, LABEL, workload.batch, one_process=False), found[SCHEDULER][1], page)


def _turns(
    workload: Workload, epochs: int, variants: Sequence[Variant], turns: int, private: PrivateBroker
) -> dict[Variant, list[Turn]]:
    found: dict[Variant, list[Turn]] = {variant: [] for variant in variants}
    for turn in range(turns):
        for variant in variants if turn % 2 == 0 else reversed(variants):
            found[variant].append(_turn(workload, epochs, variant, private))
            last = found[variant][-1]
            print(
                f"{workload.name} {turn + 1}/{turns}: {variant.name}: {last.parties.step_ms:.2f} ms a step", flush=True
            )
    return found


def _ratios(found: Mapping[Variant, Sequence[Turn]], variant: Variant) -> tuple[float, float]:
    """Return throughput and processors' time a step to those of the plain run of the same turn, in the middle."""
    pairs = list(zip(found[PLAIN], found[variant], strict=True))
    speed = median(plain.parties.step_ms / other.parties.step_ms for plain, other in pairs)
    return speed, median(other.cpu_ms / plain.cpu_ms for plain, other in pairs)


def _table(found: Mapping[Variant, Sequence[Turn]]) -> str:
    rows = []
    for variant, turns in found.items():
        steps = [turn.parties.step_ms for turn in turns]
        speed, cpu = _ratios(found, variant)
        page = [turn.page for turn in turns if turn.page is not None]
        rows.append((
            variant.name,
            f"{median(steps):.2f} ({min(steps):.2f} to {max(steps):.2f})",
            f"{speed:.3f}",
            f"{median(turn.cpu_ms for turn in turns):.2f}",
            f"{cpu:.3f}",
            f"{median(turn.scheduler for turn in turns):.1%}",
            f"{median(page):.1%}" if page else "",
        ))  # fmt: skip
    head = (
        "", "ms a step (range)", "throughput to plain", "processor ms a step", "to plain", "scheduler's processor",
        "the page's",
    )  # fmt: skip
    return table(head, rows)


def _workloads(quick: bool) -> Iterator[tuple[Workload, int]]:
    """Yield the small job and W1, whole unless `quick`, with the epochs to train."""
    small, w1 = WORKLOADS["small"], WORKLOADS["W1"]
    yield replace(small, rows=small.batch * 10) if quick else small, 2 if quick else 4
    yield replace(w1, rows=w1.batch * 4) if quick else w1, 2 if quick else 3


def _compare(variant: Variant, throughput: float, cpu: float, private: PrivateBroker, *, quick: bool) -> Iterator[str]:
    for workload, epochs in _workloads(quick):
        found = _turns(workload, epochs, (PLAIN, variant), 1 if quick else TURNS, private)
        yield f"### {workload.name}, {workload.rows:,} rows, {workload.steps(epochs)} steps\n\n{_table(found)}"
        speed, spent = _ratios(found, variant)
        yield goals.line(f"throughput {variant.name}, to plain", speed, throughput, at_least=True)
        yield goals.line(f"processors' time a step {variant.name}, to plain", spent, cpu) + "\n"


def _long(private: PrivateBroker, *, quick: bool) -> Iterator[str]:
    """Yield what a run of 10,000 steps in lock-step costs its scheduler while the page is open."""
    small = WORKLOADS["small"]
    epochs = 1 if quick else 100
    turn = _turn(small, epochs, WATCHED, private, LOCK_STEP)
    yield f"### small in lock-step, {small.steps(epochs):,} steps, the page open\n"
    yield f"{turn.parties.step_ms:.2f} ms a step; the page's processor {turn.page:.1%}.\n"
    yield goals.line("scheduler's processor", 100 * turn.scheduler, 3.0, unit=" %") + "\n"


def watch(private: PrivateBroker, quick: bool) -> list[str]:
    """Compare a run whose page is open with one that nobody watches; then watch a long one."""
    return [*_compare(WATCHED, 0.98, 1.02, private, quick=quick), *_long(private, quick=quick)]


def meter(private: PrivateBroker, quick: bool) -> list[str]:
    """Compare a run whose parties measure what leaks with one that does not."""
    return list(_compare(METERED, 0.95, 1.05, private, quick=quick))

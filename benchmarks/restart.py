"""From the SIGKILL of a party's worker to its next step: started again by a supervisor, and with a standby in place.

Beside each kill, at the same moment of the run, a process imports torch and does nothing else: that is the yardstick.
The worker is stopped meanwhile, so nobody computes beside either.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import goals
from benchmarks.report import table
from benchmarks.restart_files import BANK, JOB_FILE, PARTIES, write_files
from sl_queue.config.environment import BROKER, EVENTS, LOCAL, THREADS
from sl_queue.config.job import Job
from sl_queue.launch.operator import request_stop
from sl_queue.local.processes import Place, command
from sl_queue.local.supervise import Worker, supervise
from sl_queue.observe.json_lines import Entry
from sl_queue.protocol.events import Began, Event, Loaded, Prepared, Ready, StandsBy, StepDone, TookOver
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.testing.run_log import following

KILLS, QUICK = 6, 1
STEPS = 30  # of a worker before it is killed
LIMIT_S = 300.0
BESIDE = f"{BANK}, standby"
WAYS = {"started again by a supervisor": False, "with a standby": True}
PARTS = (  # what is over when: in a worker that is started, or that takes over
    ("process, or lock", ("started", "took over")),
    ("imports", ("loaded",)),
    ("state folder, checkpoint", ("checkpoint",)),
    ("table", ("table",)),
    ("model", ("model",)),
    ("connection", ("ready",)),
    ("handshake", ("began",)),
    ("first step", ("step",)),
)
GOAL = 1.5  # times importing torch


def moment_of(event: Event) -> str | None:
    """Name what is over with an event; None for one that ends no part."""
    match event:
        case Loaded():
            return "loaded"
        case StandsBy():
            return "stands by"
        case TookOver():
            return "took over"
        case Prepared(what=what):
            return what
        case Ready():
            return "ready"
        case Began():
            return "began"
        case StepDone():
            return "step"
        case _:
            return None


@dataclass(slots=True)
class Moments:
    """Times at which each process of the party came how far. Mutable, thread-safe: events come on another thread."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    first: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))  # by process
    steps: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    reached: int = -1
    ended: bool = False

    def start(self, worker: str, pid: int) -> None:
        """Note that a process of the party was started."""
        if worker in (BANK, BESIDE):
            with self.changed:
                self.first[pid]["started"] = time.monotonic()

    def take(self, entry: Entry) -> None:
        """Take in an event of a worker."""
        name = moment_of(entry.event)
        if name is None or entry.event.party != BANK:
            return
        with self.changed:
            self.first[entry.pid].setdefault(name, entry.at_s)
            if isinstance(entry.event, StepDone):
                self.steps[entry.pid] += 1
                self.reached = max(self.reached, entry.event.step)
            self.changed.notify_all()

    def end(self) -> None:
        """Note that nothing more will come."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def await_pid(self, holds: Callable[[int], bool], what: str) -> int:
        """Block until that holds of a process; returns which."""
        with self.changed:
            self.changed.wait_for(lambda: self.ended or any(map(holds, self.first)), LIMIT_S)
            found = next(filter(holds, self.first), None)
        if found is None:
            raise RuntimeError(f"waited in vain for {what}")
        return found


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: seconds to the next step, in all and of each part, and those of importing torch beside it."""

    total_s: float
    parts_s: Mapping[str, float]
    torch_s: float


def import_torch_s() -> float:
    """Time a process that imports torch."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - began


def _kills(moments: Moments, count: int, *, standby: bool) -> list[Kill]:
    """Kill the worker again and again, each time when it has trained for a while and a standby, if any, is ready."""
    found, gone = [], set[int]()

    def has_trained(pid: int) -> bool:
        return pid not in gone and moments.steps[pid] >= STEPS

    def stands_by(pid: int) -> bool:
        return pid not in gone and not moments.steps[pid] and "standby" in moments.first[pid]

    def goes_on(pid: int) -> bool:
        return pid not in gone and moments.steps[pid] > 0

    for _ in range(count):
        pid = moments.await_pid(has_trained, f"{STEPS} steps")
        if standby:
            moments.await_pid(stands_by, "a standby")
        os.kill(pid, signal.SIGSTOP)
        torch_s = import_torch_s()
        gone.add(pid)
        at_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        after = moments.await_pid(goes_on, "the next step")
        found.append(_measured(moments.first[after], at_s, torch_s))
        if standby:  # the next one, which would not hear of the end of the run while it starts
            moments.await_pid(lambda pid: "stands by" in moments.first[pid] and not moments.steps[pid], "a standby")
    return found


def _measured(first: Mapping[str, float], killed_s: float, torch_s: float) -> Kill:
    parts, before = {}, killed_s
    for name, ends in PARTS:
        at_s = max((first[end] for end in ends if first.get(end, 0.0) >= before), default=before)
        parts[name], before = at_s - before, at_s
    return Kill(before - killed_s, parts, torch_s)


def measure(broker: PrivateBroker, count: int, *, standby: bool) -> list[Kill]:
    """Train under a supervisor, and kill the feature party's worker so often."""
    moments, found = Moments(), list[Kill]()
    with TemporaryDirectory(prefix="sl_queue-restart-") as name:
        folder = Path(name)
        write_files(folder)
        job, url = Job.load(folder / JOB_FILE), broker.url(f"restart{next(_numbers)}")
        events = folder / "events.jsonl"

        def act() -> None:
            try:
                found.extend(_kills(moments, count, standby=standby))
            finally:
                request_stop(job, url)

        environ = {**os.environ, BROKER.name: url, THREADS.name: "1", LOCAL.name: "1", EVENTS.name: str(events)}
        with following(events, moments.take):
            thread = threading.Thread(target=act)
            thread.start()
            try:
                workers = _workers(job, folder, standby=standby)
                failure = supervise(workers, environ, _pass, lambda _: moments.reached, on_start=moments.start)
            finally:
                moments.end()
                thread.join()
    if failure is not None:
        raise RuntimeError(f"{failure.worker}: {failure.reason}")
    return found


_numbers = itertools.count()


def _pass(worker: str, line: str) -> None:
    """Take no notice of what a worker writes."""


def _workers(job: Job, folder: Path, *, standby: bool) -> list[Worker]:
    places = {party: Place(folder / f"{party}.toml", folder / "state" / party) for party in PARTIES}
    places[SCHEDULER] = Place(None, folder / "state" / SCHEDULER)
    words = {role: command(job, role, folder / JOB_FILE, place) for role, place in places.items()}
    if standby:
        words |= dict.fromkeys((BANK, BESIDE), (*words[BANK], "--standby"))
    return [Worker(name, each) for name, each in words.items()]


def compare(broker: PrivateBroker, quick: bool) -> list[str]:
    """Return a table of the parts of both ways, and the goals."""
    found = {way: measure(broker, QUICK if quick else KILLS, standby=standby) for way, standby in WAYS.items()}
    rows = [
        (name, *(f"{median(kill.parts_s[name] for kill in kills):.3f}" for kills in found.values()))
        for name, _ in PARTS
    ]
    rows.append(("**SIGKILL to the next step**", *(f"**{_median(k, _total):.3f}**" for k in found.values())))
    rows.append(("range", *(f"{min(map(_total, k)):.2f} to {max(map(_total, k)):.2f}" for k in found.values())))
    rows.append(('`python -c "import torch"` beside it', *(f"{_median(k, _torch):.3f}" for k in found.values())))
    rows.append(("ratio, median of each kill's", *(f"**{_median(k, _ratio):.2f}**" for k in found.values())))
    said = f"Medians over {len(next(iter(found.values())))} kills of the feature party's worker, in seconds.\n"
    lines = (goals.line(f"{way}, to importing torch", _median(kills, _ratio), GOAL) for way, kills in found.items())
    return [said, table(("", *found), rows), goals.listed(lines)]


def _median(kills: Sequence[Kill], of: Callable[[Kill], float]) -> float:
    return median(map(of, kills))


def _total(kill: Kill) -> float:
    return kill.total_s


def _torch(kill: Kill) -> float:
    return kill.torch_s


def _ratio(kill: Kill) -> float:
    return kill.total_s / kill.torch_s

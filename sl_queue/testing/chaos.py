"""The proof that nothing ends a run: once in peace, once under faults, and the bits of the weights compared.

Real processes are killed with SIGKILL, a real broker is killed and started again on its data, real connections are
cut, delayed and stalled. When each fault comes follows from the seed and from how far the run is.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import assert_never

from sl_queue.config.environment import BROKER, EVENTS, LOCAL, LOG_FORMAT, THREADS
from sl_queue.config.job import Job
from sl_queue.errors import JobError
from sl_queue.local.processes import Place, command, failure_in
from sl_queue.local.supervise import Failure, Limits, Worker, supervise
from sl_queue.local.threads import shared_threads
from sl_queue.observe.json_lines import Entry
from sl_queue.protocol.events import Failed
from sl_queue.protocol.messages import BEFORE_FIRST_STEP, SCHEDULER
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.testing.proxy import Proxy
from sl_queue.testing.run_log import RunLog, following

LONGEST_WAIT_S = 0.3  # after the step at which a fault is due, so that it may hit anything that happens between steps
LATEST = 0.95  # share of the steps: who is killed must not have finished
DELAY_S, TROUBLE_S = 0.2, 2.0  # of a delayed connection, for each piece that is passed on; and how long it lasts

Say = Callable[[str], None]
Sums = Mapping[str, str]  # SHA-256 by file name


class Kind(StrEnum):
    """A kind of fault."""

    KILL = "SIGKILL"
    BROKER = "broker killed and started again"
    CUT = "connection cut"
    DELAY = "connection delayed"
    STALL = "connection half-open"


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The number of faults of each kind in a run, and the seed that places them."""

    kills: int
    broker_restarts: int
    cuts: int
    seed: int


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong: `wait_s` seconds after the first worker has done `step`."""

    step: int
    wait_s: float
    kind: Kind
    victim: str  # a role; "broker"

    def __str__(self) -> str:
        return self.kind if self.kind is Kind.BROKER else f"{self.victim}: {self.kind}"


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that happened."""

    fault: Fault
    at_s: float  # monotonic


@dataclass(frozen=True, slots=True)
class Run:
    """One of the two runs, when it is over."""

    failure: Failure | None
    seconds: float
    run_log: RunLog = field(repr=False)
    injected: tuple[Injected, ...]
    weights: Sums


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both runs, side by side."""

    roles: tuple[str, ...]
    planned: tuple[Fault, ...]
    peace: Run
    faults: Run

    @property
    def passed(self) -> bool:
        """True if both runs ended well, every fault happened, and all weights are equal to the bit."""
        ended_well = self.peace.failure is None and self.faults.failure is None
        all_happened = len(self.faults.injected) == len(self.planned)
        return ended_well and all_happened and bool(self.peace.weights) and self.peace.weights == self.faults.weights


def plan_faults(plan: FaultPlan, roles: Sequence[str], last_step: int) -> tuple[Fault, ...]:
    """Draw the faults and when each comes, in order; the same for the same seed, roles and number of steps."""
    chance = random.Random(plan.seed)
    connection = (Kind.CUT, Kind.CUT, Kind.DELAY, Kind.STALL)
    kinds = [Kind.KILL] * plan.kills + [Kind.BROKER] * plan.broker_restarts
    kinds += [chance.choice(connection) for _ in range(plan.cuts)]
    latest = max(1, int(LATEST * last_step))
    faults = [
        Fault(
            step=chance.randrange(latest),
            wait_s=chance.uniform(0.0, LONGEST_WAIT_S),
            kind=kind,
            victim="broker" if kind is Kind.BROKER else chance.choice(roles),
        )
        for kind in kinds
    ]
    return tuple(sorted(faults, key=lambda fault: (fault.step, fault.wait_s)))


def run_chaos(
    job: Job, job_file: Path, party_files: Mapping[str, Path], out: Path, plan: FaultPlan, say: Say
) -> Comparison:
    """Do both runs; `party_files` by party. Raises JobError if `out` is not empty. Call from the main thread."""
    if out.exists() and any(out.iterdir()):
        raise JobError(f"{out} is not empty; both runs must begin from scratch: give --out another folder")
    roles = (*job.parties, SCHEDULER)
    with PrivateBroker() as broker:
        harness = _Harness(job, job_file, party_files, broker, say)
        say("in peace:")
        peace = harness.run("peace", out / "peace", ())
        planned = plan_faults(plan, roles, peace.run_log.last_step)
        if peace.failure is not None:
            return Comparison(roles, planned, peace, peace)
        say(f"  {peace.run_log.last_step + 1} steps in {peace.seconds:.1f} s\nunder faults:")
        return Comparison(roles, planned, peace, harness.run("faults", out / "faults", planned))


@dataclass(frozen=True, slots=True)
class _Harness:
    """Harness in which both runs take place."""

    job: Job
    job_file: Path
    party_files: Mapping[str, Path]
    broker: PrivateBroker
    say: Say

    def run(self, name: str, out: Path, faults: tuple[Fault, ...]) -> Run:
        """Do one run from nothing to its final weights, in a virtual host and folders of its own."""
        run_log, places = RunLog(), self._places(out)
        with ExitStack() as stack:
            proxies = {role: stack.enter_context(Proxy(self.broker.port)) for role in places}
            injector = _Injector(faults, run_log, self.broker, proxies, self.say)
            workers = self._workers(places, proxies, self.broker.url(name))
            threads = str(shared_threads(len(self.job.parties)))
            events = out / "events.jsonl"
            environ = {**os.environ, THREADS.name: threads, LOCAL.name: "1"}
            environ |= {EVENTS.name: str(events), LOG_FORMAT.name: "text"}
            stack.enter_context(following(events, self._take(run_log)))
            patient = Limits(crashes=len(faults) + Limits().crashes)  # those that we cause ourselves are no crash loop
            with injector.working():
                failure = supervise(
                    workers,
                    environ,
                    _no_line,
                    _committed(places),
                    patient,
                    on_start=run_log.start,
                    reason_of=partial(failure_in, events),
                )
            seconds = time.monotonic() - injector.began_s
        return Run(failure, seconds, run_log, tuple(injector.injected), _sums(places))

    def _places(self, out: Path) -> dict[str, Place]:
        places = {party: Place(path, out / party) for party, path in self.party_files.items()}
        return {**places, SCHEDULER: Place(None, out / SCHEDULER)}

    def _workers(self, places: Mapping[str, Place], proxies: Mapping[str, Proxy], url: str) -> list[Worker]:
        return [
            Worker(role, command(self.job, role, self.job_file, place), {BROKER.name: proxies[role].url(url)})
            for role, place in places.items()
        ]

    def _take(self, run_log: RunLog) -> Callable[[Entry], None]:
        def take(entry: Entry) -> None:
            run_log.take(entry)
            if isinstance(entry.event, Failed):
                self.say(f"  {entry.event.party} error: {entry.event.message}")

        return take


def _no_line(worker: str, text: str) -> None:
    """Take no notice of what a worker writes: its events say more."""


class _Injector:  # mutable: it remembers what it did
    """Carries out faults on a thread of its own, in order, each when its step has come."""

    def __init__(
        self,
        faults: tuple[Fault, ...],
        run_log: RunLog,
        broker: PrivateBroker,
        proxies: Mapping[str, Proxy],
        say: Say,
    ) -> None:
        self._faults, self._run_log, self._broker, self._proxies, self._say = faults, run_log, broker, proxies, say
        self._thread = threading.Thread(target=self._work, name="faults", daemon=True)
        self.began_s = time.monotonic()
        self.injected: list[Injected] = []

    @contextmanager
    def working(self) -> Iterator[None]:
        """Have faults happen while the body runs."""
        self.began_s = time.monotonic()
        self._thread.start()
        try:
            yield
        finally:
            self._run_log.end()
            self._thread.join()

    def _work(self) -> None:
        for fault in self._faults:
            if not self._run_log.await_step(fault.step) or self._run_log.await_end(fault.wait_s):
                return
            if not self._carry_out(fault):
                return

    def _carry_out(self, fault: Fault) -> bool:
        """Do it; False if the run has ended."""
        match fault.kind:
            case Kind.KILL:
                return self._kill(fault)
            case Kind.BROKER:
                self._note(fault)
                self._broker.restart()
            case Kind.CUT:
                self._note(fault)
                self._proxies[fault.victim].cut()
            case Kind.DELAY:
                self._note(fault)
                self._proxies[fault.victim].delay_s = DELAY_S
                self._run_log.await_end(TROUBLE_S)
                self._proxies[fault.victim].delay_s = 0.0
            case Kind.STALL:
                self._note(fault)
                self._proxies[fault.victim].stall()
                self._run_log.await_end(TROUBLE_S)
                self._proxies[fault.victim].resume()
            case _:
                assert_never(fault.kind)
        return True

    def _kill(self, fault: Fault) -> bool:
        while (pid := self._run_log.await_process(fault.victim)) is not None:
            self._run_log.killed(fault.victim)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself a moment ago, and is restarted
            self._note(fault)
            return True
        return False

    def _note(self, fault: Fault) -> None:
        now = time.monotonic()
        self.injected.append(Injected(fault, now))
        count = f"{len(self.injected)}/{len(self._faults)}"
        self._say(f"  {now - self.began_s:6.1f} s  step {self._run_log.last_step:5d}  {count:>6}  {fault}")


def _committed(places: Mapping[str, Place]) -> Callable[[str], int]:
    """Return the last step that a role has on disk; the scheduler, which computes none, has everybody's newest."""

    def newest(role: str) -> int:
        names = (path.stem for path in (places[role].state / "checkpoints").glob("step-*.safetensors"))
        return max((int(name.removeprefix("step-")) for name in names), default=BEFORE_FIRST_STEP)

    return lambda role: max(map(newest, places)) if role == SCHEDULER else newest(role)


def _sums(places: Mapping[str, Place]) -> Sums:
    files = [(role, path) for role, place in places.items() for path in (place.state / "final").glob("*.safetensors")]
    return {f"{role}/final/{path.name}": sha256(path.read_bytes()).hexdigest() for role, path in sorted(files)}

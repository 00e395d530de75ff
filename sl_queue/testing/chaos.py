"""The proof that nothing ends a run: once in peace, once under faults, and the bits of the weights compared.

Real processes are killed with SIGKILL, a real broker is killed and started again on its data, real connections are
cut, delayed and stalled. Where parties have hands, these are killed too, and so is their broker; the run in peace has
none, so that equal weights say both.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

from sl_queue.config.environment import BROKER, HANDS_BROKER
from sl_queue.config.job import Job
from sl_queue.errors import JobError
from sl_queue.local.processes import (
    Place,
    command,
    environ_of_workers,
    failure_in,
    hand_command,
    hand_name,
    read_history,
)
from sl_queue.local.supervise import Failure, Limits, Worker, supervise
from sl_queue.local.threads import key_in
from sl_queue.observe.json_lines import Entry
from sl_queue.protocol.events import Failed
from sl_queue.protocol.messages import BEFORE_FIRST_STEP, SCHEDULER
from sl_queue.protocol.text import counted
from sl_queue.testing.faults import Fault, FaultPlan, Injected, Injector, Say, plan_faults
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.testing.proxy import Proxy
from sl_queue.testing.run_log import RunLog, following

Sums = Mapping[str, str]  # SHA-256 by file name


@dataclass(frozen=True, slots=True)
class Run:
    """One of the two runs, when it is over."""

    failure: Failure | None
    seconds: float
    run_log: RunLog = field(repr=False)
    injected: tuple[Injected, ...]
    weights: Sums
    history: str = field(default="", repr=False)  # without its times


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both runs, side by side."""

    roles: tuple[str, ...]
    planned: tuple[Fault, ...]
    peace: Run
    faults: Run

    @property
    def passed(self) -> bool:
        """True if both runs ended well, every fault happened, and weights and history are equal to the bit."""
        ended_well = self.peace.failure is None and self.faults.failure is None
        all_happened = len(self.faults.injected) == len(self.planned)
        equal = self.peace.weights == self.faults.weights and self.peace.history == self.faults.history
        return ended_well and all_happened and bool(self.peace.weights) and equal


def run_chaos(
    job: Job,
    job_file: Path,
    party_files: Mapping[str, Path],
    out: Path,
    plan: FaultPlan,
    say: Say,
    *,
    hands: Mapping[str, int] = MappingProxyType({}),
    keys: Path | None = None,
) -> Comparison:
    """Do both runs, the one under faults with `hands`; `party_files` and `hands` by party.

    `keys`: a folder with the roles' private keys, for a job that seals. Raises JobError if `out` is not empty. Call
    from the main thread.
    """
    if out.exists() and any(out.iterdir()):
        raise JobError(f"{out} is not empty; both runs must begin from scratch: give --out another folder")
    roles = (*job.parties, SCHEDULER)
    with ExitStack() as stack:
        broker = stack.enter_context(PrivateBroker())
        meeting = stack.enter_context(PrivateBroker()) if hands else None
        harness = _Harness(job, job_file, party_files, keys, broker, meeting, say)
        say("in peace:")
        peace = harness.run("peace", out / "peace", (), {})
        planned = plan_faults(plan, roles, peace.run_log.last_step, _names(hands))
        if peace.failure is not None:
            return Comparison(roles, planned, peace, peace)
        say(f"  {counted(peace.run_log.last_step + 1, 'step', 'steps')} in {peace.seconds:.1f} s\nunder faults:")
        return Comparison(roles, planned, peace, harness.run("faults", out / "faults", planned, hands))


def _names(hands: Mapping[str, int]) -> dict[str, str]:
    """Return the party of each hand, by the hand's name."""
    return {hand_name(party, number): party for party, count in hands.items() for number in range(1, count + 1)}


@dataclass(frozen=True, slots=True)
class _Harness:
    """Harness in which both runs take place."""

    job: Job
    job_file: Path
    party_files: Mapping[str, Path]
    keys: Path | None
    broker: PrivateBroker
    meeting: PrivateBroker | None  # of leads and hands
    say: Say

    def run(self, name: str, out: Path, faults: tuple[Fault, ...], hands: Mapping[str, int]) -> Run:
        """Do one run from nothing to its final weights, in a virtual host and folders of its own."""
        run_log, places = RunLog(), self._places(out, hands)
        with ExitStack() as stack:
            proxies = {role: stack.enter_context(Proxy(self.broker.port)) for role in places}
            if self.meeting is not None:
                proxies |= {hand: stack.enter_context(Proxy(self.meeting.port)) for hand in _names(hands)}
            injector = Injector(faults, run_log, self.broker, self.meeting, proxies, self.say)
            workers = self._workers(places, proxies, name)
            events = out / "events.jsonl"
            stack.enter_context(following(events, self._take(run_log)))
            patient = Limits(crashes=len(faults) + Limits().crashes)  # those that we cause ourselves are no crash loop
            with injector.working():
                failure = supervise(
                    workers,
                    environ_of_workers(self.job, events, self.say),
                    _no_line,
                    _committed(places, _names(hands)),
                    patient,
                    on_start=run_log.start,
                    reason_of=partial(failure_in, events),
                )
            seconds = time.monotonic() - injector.began_s
        return Run(failure, seconds, run_log, tuple(injector.injected), _sums(places), _untimed_history(places))

    def _places(self, out: Path, hands: Mapping[str, int]) -> dict[str, Place]:
        files: dict[str, Path | None] = {**self.party_files, SCHEDULER: None}
        return {role: Place(file, out / role, key_in(self.keys, role), hands.get(role)) for role, file in files.items()}

    def _workers(self, places: Mapping[str, Place], proxies: Mapping[str, Proxy], vhost: str) -> list[Worker]:
        url, meet = self.broker.url(vhost), "" if self.meeting is None else self.meeting.url(vhost)
        found = []
        for role, place in places.items():
            led = {HANDS_BROKER.name: meet} if place.hands else {}
            way = {BROKER.name: proxies[role].url(url), **led}
            found.append(Worker(role, command(self.job, role, self.job_file, place), way))
        for hand, party in _names({role: place.hands or 0 for role, place in places.items()}).items():
            way = {HANDS_BROKER.name: proxies[hand].url(meet)}
            found.append(Worker(hand, hand_command(self.job_file, places[party]), way, helps=True))
        return found

    def _take(self, run_log: RunLog) -> Callable[[Entry], None]:
        def take(entry: Entry) -> None:
            run_log.take(entry)
            if isinstance(entry.event, Failed):
                self.say(f"  {entry.event.party} error: {entry.event.message}")

        return take


def _no_line(worker: str, text: str) -> None:
    """Take no notice of what a worker writes: its events say more."""


def _committed(places: Mapping[str, Place], hands: Mapping[str, str]) -> Callable[[str], int]:
    """Return the last step that a role has on disk; the scheduler, which computes none, has everybody's newest.

    A hand's is that of its party.
    """

    def newest(role: str) -> int:
        names = (path.stem for path in (places[role].state / "checkpoints").glob("step-*.safetensors"))
        return max((int(name.removeprefix("step-")) for name in names), default=BEFORE_FIRST_STEP)

    return lambda worker: max(map(newest, places)) if worker == SCHEDULER else newest(hands.get(worker, worker))


def _sums(places: Mapping[str, Place]) -> Sums:
    files = [(role, path) for role, place in places.items() for path in (place.state / "final").glob("*.safetensors")]
    return {f"{role}/final/{path.name}": sha256(path.read_bytes()).hexdigest() for role, path in sorted(files)}


def _untimed_history(places: Mapping[str, Place]) -> str:
    """Return the history as text, without how long its epochs took."""
    return json.dumps([{**epoch, "seconds": None} for epoch in read_history(places[SCHEDULER].state)])

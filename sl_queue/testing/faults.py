"""Faults of a run: which there will be and when, from a seed, and the thread that carries them out.

When each comes follows from the seed and from how far the run is.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.testing.proxy import Proxy
from sl_queue.testing.run_log import RunLog

LONGEST_WAIT_S = 0.3  # after the step at which a fault is due, so that it may hit anything that happens between steps
LATEST = 0.95  # share of the steps: who is killed must not have finished
DELAY_S, TROUBLE_S = 0.2, 2.0  # of a delayed connection, for each piece that is passed on; and how long it lasts

Say = Callable[[str], None]


class Kind(StrEnum):
    """A kind of fault."""

    KILL = "SIGKILL"
    BROKER = "broker killed and started again"
    MEETING = "hands' broker killed and started again"
    CUT = "connection cut"
    DELAY = "connection delayed"
    STALL = "connection half-open"


BROKERS = (Kind.BROKER, Kind.MEETING)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The number of faults of each kind in a run, and the seed that places them.

    Each broker is killed `broker_restarts` times: the job's, and that of hands where there are any.
    """

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
    victim: str  # a role, or a hand; "broker"

    def __str__(self) -> str:
        return self.kind if self.kind in BROKERS else f"{self.victim}: {self.kind}"


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that happened."""

    fault: Fault
    at_s: float  # monotonic


def plan_faults(plan: FaultPlan, roles: Sequence[str], last_step: int, hands: Iterable[str] = ()) -> tuple[Fault, ...]:
    """Draw the faults and when each comes, in order; the same for the same seed, roles, hands and number of steps."""
    chance, victims = random.Random(plan.seed), (*roles, *hands)
    connection = (Kind.CUT, Kind.CUT, Kind.DELAY, Kind.STALL)
    brokers = BROKERS if len(victims) > len(roles) else (Kind.BROKER,)
    kinds = [Kind.KILL] * plan.kills + [kind for kind in brokers for _ in range(plan.broker_restarts)]
    kinds += [chance.choice(connection) for _ in range(plan.cuts)]
    latest = max(1, int(LATEST * last_step))
    faults = [
        Fault(
            step=chance.randrange(latest),
            wait_s=chance.uniform(0.0, LONGEST_WAIT_S),
            kind=kind,
            victim="broker" if kind in BROKERS else chance.choice(victims),
        )
        for kind in kinds
    ]
    return tuple(sorted(faults, key=lambda fault: (fault.step, fault.wait_s)))


class Injector:  # mutable: it remembers what it did
    """Carries out faults on a thread of its own, in order, each when its step has come."""

    def __init__(
        self,
        faults: tuple[Fault, ...],
        run_log: RunLog,
        broker: PrivateBroker,
        meeting: PrivateBroker | None,
        proxies: Mapping[str, Proxy],
        say: Say,
    ) -> None:
        self._faults, self._run_log, self._proxies, self._say = faults, run_log, proxies, say
        self._broker, self._meeting = broker, meeting
        self._thread = threading.Thread(target=self._work, name="faults", daemon=True)
        self._meeting_starts: threading.Thread | None = None
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
            self._await_meeting()

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
            case Kind.MEETING:
                self._note(fault)
                if self._meeting is not None:
                    self._restart_beside(self._meeting)
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

    def _restart_beside(self, meeting: PrivateBroker) -> None:
        """Kill the hands' broker, and start it while other faults come: a run without hands goes on and may end."""
        self._await_meeting()
        meeting.kill()
        self._meeting_starts = threading.Thread(target=meeting.start, name="hands' broker", daemon=True)
        self._meeting_starts.start()

    def _await_meeting(self) -> None:
        if self._meeting_starts is not None:
            self._meeting_starts.join()

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

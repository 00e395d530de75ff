"""Every role of a job as a process of its own on this machine, over a broker: what `sl-queue local` does over amqp."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sl_queue.config.environment import BROKER, EVENTS, FINAL_EXIT, HANDS_BROKER, LOCAL, LOG_FORMAT, METRICS, THREADS
from sl_queue.config.job import Job
from sl_queue.errors import TransportError
from sl_queue.launch.following import Follower
from sl_queue.launch.operator import read_status
from sl_queue.launch.scheduler import OnStatus
from sl_queue.local.supervise import Failure, Worker, supervise
from sl_queue.local.threads import shared_threads
from sl_queue.observe.console import Screen
from sl_queue.observe.json_lines import entries
from sl_queue.protocol.events import Failed
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.status import RunStatus
from sl_queue.security.sealing import Seal


@dataclass(frozen=True, slots=True)
class Place:
    """Files and state folder of a role on this machine."""

    party_file: Path | None  # None: the scheduler
    state: Path
    key: Path | None = None  # the role's private key, if the job seals and its party file does not name it
    hands: int | None = None  # processes that compute its micro-batches; None: it computes them itself


def run_processes(
    job: Job,
    job_file: Path,
    places: Mapping[str, Place],
    broker: str,
    screen: Screen,
    seal: Seal | None = None,
    tell: OnStatus = lambda _: None,
) -> Failure | None:
    """Train to the end, restarting workers as `supervise` does; None, or why it ended before.

    The broker's URL goes to the workers through the environment: everybody on a machine can read a command line.
    `seal` is the operator's; `tell` gets each status, beside the screen. Raises BrokerUnreachable before anything is
    started.
    """

    def show(status: RunStatus) -> None:
        screen.status(status)
        tell(status)

    stale = read_status(job, broker, timeout_s=0.5, seal=seal)  # what an earlier run may have left
    newest = _Newest(job.label_holder, stale, show)
    asked: Path | None = EVENTS.read()
    hands = {hand_name(role, n): role for role, place in places.items() for n in range(1, 1 + (place.hands or 0))}
    workers = _workers(job, job_file, places, hands, broker)

    def step_of(name: str) -> int | None:
        return newest.committed(hands.get(name, name))  # a hand's is its party's

    with TemporaryDirectory(prefix="sl_queue-events-") as folder:
        events = asked or Path(folder) / "events.jsonl"
        environ = environ_of_workers(job, events, partial(screen.line, "workers")) | {BROKER.name: broker}
        reason_of = partial(failure_in, events)
        try:
            with Follower(job, broker, seal, newest):
                return supervise(workers, environ, screen.line, step_of, reason_of=reason_of)
        finally:
            _last_word(job, broker, seal, newest)


def environ_of_workers(job: Job, events: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Return this process's environment for workers that it supervises, without what is for one worker by itself."""
    if METRICS.read() is not None:
        say(f"{METRICS.name} is left out: it is one port, and here are several workers")
    kept = {name: value for name, value in os.environ.items() if name not in (METRICS.name, FINAL_EXIT.name)}
    threads = str(shared_threads(len(job.parties)))
    shown_to_a_person = {LOG_FORMAT.name: "text"}
    return {**kept, THREADS.name: threads, LOCAL.name: "1", EVENTS.name: str(events.absolute()), **shown_to_a_person}


def _workers(
    job: Job, job_file: Path, places: Mapping[str, Place], hands: Mapping[str, str], broker: str
) -> list[Worker]:
    """List the workers of all roles, and their hands; `hands`: by name, whose."""
    roles = [Worker(r, command(job, r, job_file, place), _meeting(place, broker)) for r, place in places.items()]
    helpers = [
        Worker(hand, hand_command(job_file, places[r]), _meeting(places[r], broker), helps=True)
        for hand, r in hands.items()
    ]
    return [*roles, *helpers]


def _meeting(place: Place, broker: str) -> dict[str, str]:
    """Tell a worker and its hands where they meet: at the one broker, whose owner holds all files anyway."""
    return {} if place.hands is None else {HANDS_BROKER.name: broker}


def hand_name(party: str, number: int) -> str:
    """Name a hand among the workers of this machine."""
    return f"{party}, hand {number}"


def hand_command(job_file: Path, place: Place) -> tuple[str, ...]:
    """Return what starts a hand."""
    return (sys.executable, "-m", "workers.hand", "--job", str(job_file), "--party", str(place.party_file))


def failure_in(events: Path, pid: int) -> str | None:
    """Look up the error that a process has left in a file of events."""
    found = (entry.event for entry in entries(events.read_text()) if entry.pid == pid) if events.exists() else ()
    return next((event.message for event in found if isinstance(event, Failed)), None)


def command(job: Job, role: str, job_file: Path, place: Place) -> tuple[str, ...]:
    """Return the command that starts the worker of a role."""
    if role == SCHEDULER:
        module = "workers.scheduler"
    else:
        module = "workers.label_holder" if role == job.label_holder else "workers.feature_party"
    party = () if place.party_file is None else ("--party", str(place.party_file))
    key = () if place.key is None else ("--key", str(place.key))
    return (sys.executable, "-m", module, "--job", str(job_file), *party, *key, "--state", str(place.state))


class _Newest:
    """Passes the run's statuses on, and remembers the newest; mutable: a thread tells while the main one supervises."""

    def __init__(self, label_holder: str, stale: RunStatus | None, tell: OnStatus) -> None:
        self._label_holder, self._stale, self._tell = label_holder, stale, tell
        self._newest: RunStatus | None = None

    def committed(self, role: str) -> int | None:
        """Return the last step that a role is known to have on disk; for the scheduler the label holder's."""
        newest = self._newest
        if newest is None:
            return None
        party = newest.parties.get(self._label_holder if role == SCHEDULER else role)
        return None if party is None else party.committed

    def take(self, status: RunStatus, age_s: float = 0.0) -> None:
        """Pass on what is not left of an earlier run."""
        if status not in (self._stale, self._newest):
            self._newest = status
            self._tell(status)

    def trouble(self, problem: str) -> None:
        """Pass over it: the workers notice it too, and what they say is shown."""


def _last_word(job: Job, broker: str, seal: Seal | None, newest: _Newest) -> None:
    """Read how the run has ended: the follower may have left before."""
    with suppress(TransportError):
        status = read_status(job, broker, seal=seal)
        if status is not None:
            newest.take(status)


def read_history(scheduler_state: Path) -> list[dict[str, Any]]:
    """Read the epochs in a scheduler's history.jsonl so far."""
    path = scheduler_state / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

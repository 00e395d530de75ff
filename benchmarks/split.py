"""sl_queue itself: the workers as they are deployed, with an observer that writes down how long each waited."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import Trace
from benchmarks.processes import Work, together
from benchmarks.workloads import LABEL, Workload, job_of, party_file
from sl_queue.compute.threads import limit_threads
from sl_queue.config.job import Job
from sl_queue.config.privacy import PrivacyFile
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.cut.guard import Guard
from sl_queue.launch.connect import Connect, topology
from sl_queue.launch.party import serve_party
from sl_queue.launch.scheduler import serve_scheduler
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.transport.link import Link
from sl_queue.transport.memory import MemoryBroker
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.rabbitmq.names import QueueType

TIMEOUT_S = 600.0  # of one run that is watched


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of how a workload is trained here."""

    workload: Workload
    epochs: int
    tables: Mapping[str, Any]  # of the job: pipeline, wire, holdout
    queue_type: QueueType = "classic"
    meter: bool = False  # every party measures what leaks

    @property
    def job(self) -> Job:
        return job_of(self.workload, self.epochs, **self.tables)


def over_rabbitmq(plan: Plan, urls: Mapping[str, str], timeout_s: float) -> list[Trace]:
    """Train in a process for each party and one for the scheduler; `urls` by role, where each reaches the broker."""
    with TemporaryDirectory(prefix="sl_queue-bench-") as folder:
        works: dict[str, Work] = {
            role: (rabbit_worker, (plan, role, urls[role], Path(folder) / role)) for role in _roles(plan)
        }
        found = together(works, timeout_s)
    return [trace for trace in found.values() if trace is not None]


def over_memory(plan: Plan, timeout_s: float) -> list[Trace]:
    """Train in a thread for each role, in one process of its own."""
    return list(together({"threads": (_threads, (plan,))}, timeout_s)["threads"])


def _roles(plan: Plan) -> tuple[str, ...]:
    return (*plan.workload.feature_parties, LABEL, SCHEDULER)


def rabbit_worker(plan: Plan, role: str, url: str, state: Path) -> Trace | None:
    """Serve one role until the run is over; returns what a party's observer wrote down."""

    def connect(party: str, prefetch: int, **_: bool) -> Link:
        return RabbitLink(url, party, topology(plan.job, url), prefetch, queue_type=plan.queue_type)

    return _serve(plan, role, connect, state)


def _threads(plan: Plan) -> list[Trace]:
    broker, job = MemoryBroker(), plan.job

    def connect(party: str, prefetch: int, **_: bool) -> Link:
        return broker.link(party, job.topology(), prefetch)

    errors: list[BaseException] = []
    traces: dict[str, Trace | None] = {}

    def serve(role: str, state: Path) -> None:
        try:
            traces[role] = _serve(plan, role, connect, state)
        except BaseException as error:
            errors.append(error)

    with TemporaryDirectory(prefix="sl_queue-bench-") as folder:
        threads = [threading.Thread(target=serve, args=(role, Path(folder) / role)) for role in _roles(plan)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return [trace for trace in traces.values() if trace is not None]


def watched(private: PrivateBroker, plan: Plan, name: str, worker: Callable[..., Any]) -> Mapping[str, Any]:
    """Run `worker(plan, role, url, state)` in a process for each role, in a virtual host; what they return, by role."""
    with TemporaryDirectory(prefix="sl_queue-bench-") as folder:
        url = private.url(name)
        works: dict[str, Work] = {role: (worker, (plan, role, url, Path(folder) / role)) for role in _roles(plan)}
        found = together(works, TIMEOUT_S)
        private.delete_vhost(name)
    return {role: each for role, each in found.items() if each is not None}


def serve_watched(
    plan: Plan, role: str, place: Workplace, guards_to: Callable[[Sequence[str]], Mapping[str, Guard]]
) -> bool:
    """Serve one role with an observer and taps at its cuts; False for the scheduler, which has neither."""
    limit_threads(1)
    if role == SCHEDULER:
        serve_scheduler(plan.job, place, lambda _: None)
        return False
    spec = resolve(plan.job, party_file(plan.workload, role), Importer())
    peers = plan.workload.feature_parties if role == LABEL else (LABEL,)
    serve_party(plan.job, spec, place, guards=guards_to(peers))
    return True


def _serve(plan: Plan, role: str, connect: Connect, state: Path) -> Trace | None:
    limit_threads(1)
    if role == SCHEDULER:
        serve_scheduler(plan.job, Workplace(connect, state), lambda _: None)
        return None
    trace, metrics = Trace(role), ("auroc",) if plan.job.holdout else ()
    file = party_file(plan.workload, role, metrics)
    if plan.meter:
        file = file.model_copy(update={"privacy": PrivacyFile(meter=True)})
    spec = resolve(plan.job, file, Importer())
    serve_party(plan.job, spec, Workplace(connect, state, observe=trace))
    return trace

"""sl_queue itself: the workers as they are deployed, with a channel that also writes down how long it waited."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from benchmarks.measure import Trace
from benchmarks.processes import Work, together
from benchmarks.workloads import LABEL, Workload, job_of, party_file
from sl_queue.compute.threads import limit_threads
from sl_queue.config.job import Job
from sl_queue.launch import party as party_launch
from sl_queue.launch.connect import Channels, topology
from sl_queue.launch.scheduler import serve_scheduler
from sl_queue.protocol.control import EpochDone
from sl_queue.protocol.messages import SCHEDULER, Kind, MicroBatch, Payload
from sl_queue.protocol.party.orders import Orders
from sl_queue.transport.link import Link
from sl_queue.transport.memory import MemoryBroker
from sl_queue.transport.party_channel import PartyChannel
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.rabbitmq.names import QueueType

T = TypeVar("T")

TRACES: dict[str, Trace] = {}  # of the parties in this process


@dataclass(frozen=True, slots=True)
class Plan:
    """How a workload is trained here."""

    workload: Workload
    epochs: int
    tables: Mapping[str, Any]  # of the job: pipeline, wire, holdout
    queue_type: QueueType = "classic"

    @property
    def job(self) -> Job:
        return job_of(self.workload, self.epochs, **self.tables)


class TimedChannel(PartyChannel):
    """A party's channel that writes a trace; mutable as the channel is."""

    def __init__(self, link: Link, party: str, *args: Any, **settings: Any) -> None:
        super().__init__(link, party, *args, **settings)
        self._trace = TRACES.setdefault(party, Trace(party))

    def receive(self, sender: str, kind: Kind, micro_batch: MicroBatch) -> Payload:
        with self._trace.waiting():
            return super().receive(sender, kind, micro_batch)

    def wait_for(self, decision: Callable[[Orders], T | None]) -> T:
        with self._trace.waiting():
            return super().wait_for(decision)

    def commit(self, step: int, save: Callable[[], None]) -> None:
        with self._trace.committing():
            super().commit(step, save)

    def wait_committed(self) -> None:
        with self._trace.committing():
            super().wait_committed()

    def progress(self, report: Any) -> None:
        self._trace.mark(report.step)
        super().progress(report)

    def report(self, report: Any) -> None:
        if isinstance(report, EpochDone):
            self._trace.holdout = report.result.holdout
        super().report(report)


class CountingLink:
    """A link that counts what it is given to publish."""

    def __init__(self, link: Link, party: str) -> None:
        self._link, self._trace = link, TRACES.setdefault(party, Trace(party))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def publish(self, receiver: str, kind: Kind, run: str, body: bytes, **settings: Any) -> None:
        self._trace.sent_bytes += len(body)
        self._link.publish(receiver, kind, run, body, **settings)


def over_rabbitmq(plan: Plan, urls: Mapping[str, str], timeout_s: float) -> list[Trace]:
    """A process for each party and one for the scheduler; `urls` by role, where each reaches the broker."""
    with TemporaryDirectory(prefix="sl_queue-bench-") as folder:
        works: dict[str, Work] = {
            role: (_rabbit_worker, (plan, role, urls[role], Path(folder) / role)) for role in _roles(plan)
        }
        found = together(works, timeout_s)
    return [trace for trace in found.values() if trace is not None]


def over_memory(plan: Plan, timeout_s: float) -> list[Trace]:
    """A thread for each role in one process of its own."""
    return list(together({"threads": (_threads, (plan,))}, timeout_s)["threads"])


def _roles(plan: Plan) -> tuple[str, ...]:
    return (*plan.workload.feature_parties, LABEL, SCHEDULER)


def _rabbit_worker(plan: Plan, role: str, url: str, state: Path) -> Trace | None:
    def connect(party: str, prefetch: int) -> Link:
        return RabbitLink(url, party, topology(plan.job, url), prefetch, queue_type=plan.queue_type)

    _serve(plan, role, connect, state)
    return TRACES.get(role)


def _threads(plan: Plan) -> list[Trace]:
    broker, job = MemoryBroker(), plan.job

    def connect(party: str, prefetch: int) -> Link:
        return broker.link(party, job.topology(), prefetch)

    errors: list[BaseException] = []

    def serve(role: str, state: Path) -> None:
        try:
            _serve(plan, role, connect, state)
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
    return [TRACES[party] for party in (*plan.workload.feature_parties, LABEL)]


def _serve(plan: Plan, role: str, connect: Callable[[str, int], Link], state: Path) -> None:
    vars(party_launch)["PartyChannel"] = TimedChannel  # all that is not as it is deployed, with the counting link
    limit_threads(1)
    if role == SCHEDULER:
        serve_scheduler(plan.job, connect, state, lambda _: None, Channels())
        return

    def counted(party: str, prefetch: int) -> Any:
        return CountingLink(connect(party, prefetch), party)

    metrics = ("auroc",) if plan.job.holdout else ()
    party_launch.serve_party(plan.job, party_file(plan.workload, role, metrics), counted, state, Channels())

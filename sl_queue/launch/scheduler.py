"""The scheduler, put together. It needs no torch, and so is there again half a second after it was killed."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sl_queue.config.job import Job
from sl_queue.config.party import BROKER, read_url
from sl_queue.errors import BrokerUnreachable, JobError
from sl_queue.launch.connect import Channels, Connect, connector, key_file, require_network, sealing
from sl_queue.loops.scheduling import Scheduler
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.state import EarlyStopping, Phase, Plan, RunState, epoch_text
from sl_queue.security.sealing import Seal
from sl_queue.storage.run_file import RunFile
from sl_queue.transport.scheduler_channel import PREFETCH, LinkSchedulerChannel

log = logging.getLogger("sl_queue")

LATE_S = 10.0  # a worker with its libraries has started after that
LOWER_IS_BETTER = frozenset({"loss", "mse", "mae"})

OnStatus = Callable[[Mapping[str, Any]], None]


def run_scheduler(
    job: Job, broker: str | None, state: Path | None, key: Path | None = None, metrics: str | None = None
) -> None:
    """The scheduler in this process until the run ends. Raises SlQueueError; RunStopped if it was stopped on purpose.

    `metrics`: `[HOST:]PORT` where Prometheus may ask.
    """
    given = broker or os.environ.get(BROKER)
    if given is None:
        raise JobError(f"the scheduler needs a broker: give --broker URL or set {BROKER}")
    url = read_url(given)
    require_network(url)
    seal = sealing(job, SCHEDULER, key_file(key), url)
    connect = connector(job, url, again=lambda: read_url(given, again=True))
    folder = state or Path("state/scheduler")
    serve_scheduler(job, connect, folder, _Epochs().tell, Channels(), seal, metrics=metrics)


@dataclass(slots=True)
class _Epochs:  # mutable: it remembers what it told
    """A log line for each epoch that ends; what a resumed run brings is not told again."""

    told: int | None = None

    def tell(self, status: Mapping[str, Any]) -> None:
        told = status["epoch"] if self.told is None else self.told
        for epoch in status["history"]:
            if epoch["epoch"] >= told:
                text = epoch_text(epoch, status["epochs"])
                log.info("scheduler: %s  after step %d, %.1f s", text, epoch["step"], epoch["seconds"])
        self.told = status["epoch"]


def serve_scheduler(
    job: Job,
    connect: Connect,
    state: Path,
    on_status: OnStatus,
    open_channels: Channels,
    seal: Seal | None = None,
    late_s: float = LATE_S,
    metrics: str | None = None,
) -> RunState:
    """The scheduler until every party has finished.

    `late_s`: how long a run that had finished before waits for parties that have lost what it left.
    `metrics`: `[HOST:]PORT` where Prometheus may ask.
    """
    with ExitStack() as stack:
        ledger = RunFile(state, job.canonical(), job.digest)
        stack.callback(ledger.close)
        saved = ledger.load()
        if saved is not None and saved.phase is Phase.FINISHED:
            log.info("scheduler: run %s is already finished", saved.run)
            ledger.save(saved)  # the history may have been lost
            if not late_s:
                return saved
        plan = plan_of(job)
        incarnation = secrets.token_hex(8)
        link = connect(SCHEDULER, PREFETCH)
        channel = LinkSchedulerChannel(link, job.topology(), incarnation, patience_s=plan.patience_s, seal=seal)
        stack.callback(channel.close)
        if metrics is not None:
            on_status = _shown(metrics, channel, on_status, stack)
        try:
            channel.open()
        except BrokerUnreachable:
            if saved is not None and saved.phase is Phase.FINISHED:
                return saved
            raise
        open_channels.add(channel)
        fresh_run = secrets.token_hex(6)
        late_s = min(late_s, plan.patience_s)
        return Scheduler(plan, channel, ledger, fresh_run, time.monotonic, on_status, late_s).serve()


def plan_of(job: Job) -> Plan:
    """What the scheduler must know of a job."""
    rule = job.early_stopping
    early = None
    if rule is not None:
        early = EarlyStopping(rule.metric, rule.patience, rule.min_delta, rule.metric in LOWER_IS_BETTER)
    return Plan(
        job=job.canonical(),
        label_holder=job.label_holder,
        feature_parties=job.feature_parties,
        epochs=job.epochs,
        patience_s=job.broker.patience,
        early_stopping=early,
        steps=lambda n_rows: job.batches(n_rows).steps if n_rows else None,
    )


def _shown(address: str, channel: LinkSchedulerChannel, on_status: OnStatus, stack: ExitStack) -> OnStatus:
    """Have the newest status, and whether the scheduler is alive, shown at that address."""
    from sl_queue.observe.prometheus import SchedulerCollector, Vitals, serve

    newest: list[Mapping[str, Any]] = [{}]

    def vitals() -> Vitals:
        return Vitals(channel.pulse_age_s, channel.connectivity)

    def tell(status: Mapping[str, Any]) -> None:
        newest[0] = status
        on_status(status)

    stack.callback(serve(address, SchedulerCollector(lambda: newest[0], vitals), vitals).close)
    return tell

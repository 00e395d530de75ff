"""The scheduler, put together. It needs no torch, and so is there again half a second after it was killed."""

import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from sl_queue.compute.names import LOWER_IS_BETTER
from sl_queue.config.broker_url import read_url
from sl_queue.config.environment import BROKER
from sl_queue.config.job import Job
from sl_queue.errors import BrokerUnreachable, JobError
from sl_queue.launch.alignment import align_scheduler
from sl_queue.launch.asked import digest_of, folder_of, for_alignment, plan_of_prediction
from sl_queue.launch.connect import connector, key_file, require_network, sealing
from sl_queue.launch.workplace import Workplace
from sl_queue.loops.scheduling import Scheduler
from sl_queue.observe.keeper import Keeper
from sl_queue.observe.log import to_log
from sl_queue.observe.tracking import Tracker, sink_of
from sl_queue.protocol import events
from sl_queue.protocol.events import Observer
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.state import EarlyStopping, Phase, Plan, RunState
from sl_queue.protocol.scheduler.status import RunStatus
from sl_queue.storage.run_file import RunFile
from sl_queue.transport.scheduler_channel import PREFETCH, LinkSchedulerChannel

log = logging.getLogger("sl_queue")

LATE_S = 30.0  # a worker with its libraries has started after that, on a busy machine too

OnStatus = Callable[[RunStatus], None]


def run_scheduler(
    job: Job,
    broker: str | None,
    state: Path | None,
    key: Path | None = None,
    metrics: str | None = None,
    observe: Observer = to_log,
    prediction: str | None = None,
    track: Sequence[str] = (),
) -> None:
    """Run the scheduler in this process until the run ends. Raises SlQueueError; RunStopped if it was stopped.

    `metrics`: `[HOST:]PORT` where Prometheus may ask. `track`: trackers, as `tensorboard:DIR` or `mlflow:URL`.
    """
    given = broker or BROKER.read()
    if given is None:
        raise JobError(f"the scheduler needs a broker: give --broker URL or set {BROKER.name}")
    url = read_url(given)
    require_network(url)
    seal = sealing(job, SCHEDULER, key_file(key), url)
    connect = connector(job, url, again=lambda: read_url(given, again=True))
    folder = state or Path("state/scheduler")
    epochs, sinks = _Epochs(observe), {text: sink_of(text, job.name) for text in track}
    with ExitStack() as stack:
        trackers = [stack.enter_context(closing(Tracker(_shown_as(t), s, job.canonical()))) for t, s in sinks.items()]
        tell = _told_to(epochs.tell, *(tracker.take for tracker in trackers))
        if prediction is not None:  # has no epochs to report
            folder, tell = folder_of(folder, prediction), _told_to()
        place = Workplace(connect, folder, seal=seal, observe=observe)
        serve_scheduler(job, place, tell, metrics=metrics, prediction=prediction)


def _shown_as(track: str) -> str:
    """Return a tracker's name for the log, without a password."""
    return re.sub(r"//[^/@]*@", "//", track)


@dataclass(slots=True)
class _Epochs:  # mutable: it remembers what it reported
    """An event for each epoch that ends; what a resumed run brings is not reported again."""

    observe: Observer
    told: int | None = None

    def tell(self, status: RunStatus) -> None:
        told = status.epoch if self.told is None else self.told
        for done in status.history:
            if done.epoch >= told:
                numbers = (done.epoch, done.step, done.loss, done.holdout, done.seconds)
                self.observe(events.EpochDone(SCHEDULER, *numbers, status.epochs))
        self.told = status.epoch


def serve_scheduler(
    job: Job,
    place: Workplace,
    on_status: OnStatus,
    late_s: float = LATE_S,
    metrics: str | None = None,
    prediction: str | None = None,
) -> RunState:
    """Run the scheduler until every party has finished.

    `late_s`: how long a run that had finished before waits for parties that have lost what it left. `metrics`: where
    Prometheus may ask, as `[HOST:]PORT`. `prediction`: the name of the one that is run in the place of a training.
    """
    place = place.watched_by()
    plan = plan_of(job) if prediction is None else plan_of_prediction(job, prediction)
    with ExitStack() as stack:
        digest = job.digest if prediction is None else digest_of(job, prediction)
        ledger = stack.enter_context(closing(RunFile(place.state, plan.job, digest)))
        finished = _finished_before(ledger)
        if finished is not None and not late_s:
            return finished
        if job.alignment.method == "psi" and finished is None:
            align_scheduler(job if prediction is None else for_alignment(job), place, on_status)
        about = (place.connect(SCHEDULER, PREFETCH), job.topology(), secrets.token_hex(8))
        channel = LinkSchedulerChannel(*about, patience_s=plan.patience_s, seal=place.seal, observe=place.observe)
        keeper = Keeper(place.state)
        on_status = _shown(metrics, channel, _told_to(keeper.take, on_status), stack)
        try:
            stack.enter_context(place.opened(channel))
        except BrokerUnreachable:
            if finished is None:
                raise
            return finished
        place.observe(events.Ready(SCHEDULER))
        of_run = (secrets.token_hex(6), time.monotonic, on_status, min(late_s, plan.patience_s))
        return Scheduler(plan, channel, ledger, *of_run, observe=place.observe, past=keeper.past).serve()


def _told_to(*takers: OnStatus) -> OnStatus:
    """Return what hands each status to all of these, in this order."""

    def tell(status: RunStatus) -> None:
        for take in takers:
            take(status)

    return tell


def _finished_before(ledger: RunFile) -> RunState | None:
    """Return the state of a run that has finished; its history is written again, for it may have been lost."""
    saved = ledger.load()
    if saved is None or saved.phase is not Phase.FINISHED:
        return None
    log.info("scheduler: run %s is already finished", saved.run)
    ledger.save(saved)
    return saved


def plan_of(job: Job) -> Plan:
    """Return what the scheduler must know of a job."""
    rule = job.early_stopping
    early = None
    if rule is not None:
        lower = rule.metric.removeprefix("train_") in LOWER_IS_BETTER if rule.mode is None else rule.mode == "min"
        early = EarlyStopping(rule.metric, rule.patience, rule.min_delta, lower)
    return Plan(
        job=job.canonical(),
        label_holder=job.label_holder,
        feature_parties=job.feature_parties,
        epochs=job.epochs,
        patience_s=job.broker.patience,
        early_stopping=early,
        steps=lambda n_rows: job.batches(n_rows).steps if n_rows and not job.tells_holdout else None,
    )


def _shown(address: str | None, channel: LinkSchedulerChannel, on_status: OnStatus, stack: ExitStack) -> OnStatus:
    """Have the newest status, and whether the scheduler is alive, shown at that address, if there is one."""
    if address is None:
        return on_status
    from sl_queue.observe.prometheus import SchedulerCollector, Vitals, serve

    newest: list[RunStatus | None] = [None]

    def vitals() -> Vitals:
        return Vitals(channel.pulse_age_s, channel.connectivity)

    def tell(status: RunStatus) -> None:
        newest[0] = status
        on_status(status)

    stack.callback(serve(address, SchedulerCollector(lambda: newest[0], vitals), vitals).close)
    return tell

"""The composition root: the one place that joins a job, its adapters and a role.

`run_worker` is one role in this process, until it ends. `local.run_local` is every role, a thread each.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from sl_queue.compute.base import base_stage
from sl_queue.compute.fuse import fuse_stage
from sl_queue.compute.models import fingerprint, limit_threads
from sl_queue.data.table import read_table
from sl_queue.errors import JobError, SlQueueError
from sl_queue.job import Job, PartyFile
from sl_queue.party_file import BROKER, read_url
from sl_queue.ports import Table
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.pipeline import Pipeline
from sl_queue.protocol.progress import EarlyStopping, Plan, RunState
from sl_queue.protocol.topology import Topology
from sl_queue.roles.feature_party import FeatureParty
from sl_queue.roles.label_holder import LabelHolder
from sl_queue.roles.scheduler import Scheduler
from sl_queue.roles.worker import Identity, Worker
from sl_queue.security import KEY
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.run_file import RunFile
from sl_queue.transport.channel import PartyChannel
from sl_queue.transport.hpke import Cipher
from sl_queue.transport.keys import PublicKey, read_key
from sl_queue.transport.link import Link
from sl_queue.transport.memory import MemoryBroker
from sl_queue.transport.retry import Limits
from sl_queue.transport.scheduler_channel import LinkSchedulerChannel
from sl_queue.transport.seal import Seal

log = logging.getLogger("sl_queue")

MEMORY = "memory://"
LOWER_IS_BETTER = frozenset({"loss", "mse", "mae"})

Role = Literal["scheduler", "feature", "label"]
Connect = Callable[[str, int], Link]  # (party, prefetch) -> its link
OnStatus = Callable[[Mapping[str, Any]], None]


def topology(job: Job, broker: str) -> Topology:
    """The names at that broker: the default virtual host is shared, so the job's name stands before every name."""
    vhost = unquote(urlsplit(broker).path[1:]) or "/"
    return job.topology(prefix=f"{job.name}." if vhost == "/" and broker != MEMORY else "")


def connector(job: Job, broker: str, limits: Limits = Limits()) -> Connect:
    """How parties reach the broker at that URL, and for how long they try."""
    if broker == MEMORY:
        memory = MemoryBroker()
        return lambda party, prefetch: memory.link(party, topology(job, broker), prefetch)
    from sl_queue.transport.rabbitmq import RabbitLink  # a run over memory loads no pika

    return lambda party, prefetch: RabbitLink(
        broker, party, topology(job, broker), prefetch, queue_type=job.broker.queues, limits=limits
    )


def sealing(job: Job, role: str, key: Path | None, broker: str) -> Seal | None:
    """What seals the messages of a role; None if the job does not ask for it, or if they never leave this process.

    `key` is the file with its private key. Raises JobError without one, AlignmentError if it is not the job's.
    """
    if not job.security.seal or broker == MEMORY:
        return None
    if key is None:
        raise JobError(
            f"the job says seal = true, so {role!r} needs its private key: give --key FILE, set {KEY}, or write "
            'key = "FILE" under [security] into its party file'
        )
    keys = {name: PublicKey.parse(keys.seal, keys.sign) for name, keys in job.security.keys.items()}
    return Seal(role, read_key(key), keys, Cipher(job.security.cipher))


def key_file(option: Path | None, party_file: PartyFile | None = None) -> Path | None:
    """Where a private key lies: `option`, else SL_QUEUE_KEY, else as the party's file says."""
    if option is not None:
        return option
    if environ := os.environ.get(KEY):
        return Path(environ)
    return None if party_file is None or party_file.security is None else party_file.security.key


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


def serve_party(
    job: Job,
    party_file: PartyFile,
    connect: Connect,
    state: Path,
    open_channels: "Channels",
    seal: Seal | None = None,
    metrics: str | None = None,
) -> None:
    """One data party from its table to its final weights; says so and returns if it has finished before."""
    party, incarnation = party_file.party, secrets.token_hex(8)
    with ExitStack() as stack:
        folder = Folder(state, job_digest=job.digest, party=party, fingerprint=fingerprint(job, party_file))
        stack.callback(folder.close)
        done = folder.finished()
        if done is not None and done.told:
            log.info("%s: already finished after step %d; final weights in %s", party, done.step, state / "final")
            return
        table = read_table(job, party_file)
        identity = Identity(incarnation, job.canonical(), table.n_rows, table.digest, table.id_type)
        batches = job.batches(table.n_rows)
        pipeline = job.pipeline_of(batches)
        channel = PartyChannel(
            connect(party, pipeline.prefetch + PREFETCH_MARGIN),
            party,
            job.feature_parties if party == job.label_holder else (job.label_holder,),
            incarnation,
            patience_s=job.broker.patience,
            persistent=job.broker.persistent,
            depth=pipeline.depth,
            seal=seal,
        )
        worker, train = _role(job, party_file, table, pipeline, channel, folder, identity)
        if metrics is not None:
            _show_party(metrics, job, party, channel, worker)
        stack.callback(channel.close)
        channel.open()
        open_channels.add(channel)
        worker.serve(train)
        log.info("%s: finished; final weights in %s", party, state / "final")


def _role(
    job: Job,
    party_file: PartyFile,
    table: Table,
    pipeline: Pipeline,
    channel: PartyChannel,
    folder: Folder,
    identity: Identity,
) -> tuple[Worker, Callable[[int], None]]:
    """The worker of this party, and the loop it runs."""
    if party_file.party == job.label_holder:
        fuse = fuse_stage(job, party_file, table, pipeline.batches)
        worker = Worker(identity, channel, fuse, folder, pipeline)
        return worker, LabelHolder(job.feature_parties, channel, fuse, pipeline, worker).train
    base = base_stage(job, party_file, table, pipeline.batches)
    worker = Worker(identity, channel, base, folder, pipeline)
    return worker, FeatureParty(job.label_holder, channel, base, pipeline, worker).train


PREFETCH_MARGIN = 8  # signs of life and questions of a peer, which are acknowledged as soon as they are read


def serve_scheduler(
    job: Job, connect: Connect, state: Path, on_status: OnStatus, open_channels: "Channels", seal: Seal | None = None
) -> RunState:
    """The scheduler until every party has finished."""
    with ExitStack() as stack:
        ledger = RunFile(state, job.digest)
        stack.callback(ledger.close)
        saved = ledger.load()
        if saved is not None and saved.phase == "finished":
            log.info("scheduler: run %s is already finished", saved.run)
            return saved
        plan = plan_of(job)
        incarnation = secrets.token_hex(8)
        link = connect(SCHEDULER, 0)
        channel = LinkSchedulerChannel(link, plan.parties, incarnation, patience_s=plan.patience_s, seal=seal)
        stack.callback(channel.close)
        channel.open()
        open_channels.add(channel)
        fresh_run = secrets.token_hex(6)
        return Scheduler(plan, channel, ledger, fresh_run, time.monotonic, on_status).serve()


def run_worker(
    role: Role,
    job: Job,
    party_file: PartyFile | None,
    broker: str | None,
    state: Path | None,
    key: Path | None = None,
    metrics: str | None = None,
) -> None:
    """One role in this process until it ends. Raises SlQueueError; RunStopped if the run was stopped on purpose.

    `metrics`: `[HOST:]PORT` where Prometheus may ask.
    """
    if role == "scheduler":
        given = broker or os.environ.get(BROKER)
        if given is None:
            raise JobError(f"the scheduler needs a broker: give --broker URL or set {BROKER}")
        url = read_url(given)
        require_network(url)
        seal = sealing(job, SCHEDULER, key_file(key), url)
        on_status = (lambda _: None) if metrics is None else _show_scheduler(metrics)
        serve_scheduler(job, connector(job, url), state or Path("state/scheduler"), on_status, Channels(), seal)
        return
    if party_file is None:
        raise JobError(f"a worker of role {role!r} needs a party file: give --party PARTY")
    party_file.check(job)
    if job.parties[party_file.party].role != role:
        raise JobError(
            f"party {party_file.party!r} has the role {job.parties[party_file.party].role!r} in the job, "
            f"and this worker is for role {role!r}; start the other worker"
        )
    url = party_file.broker_url(broker)
    require_network(url)
    limit_threads(party_file.threads or int(os.environ.get("SL_QUEUE_THREADS", 0)) or None)
    seal = sealing(job, party_file.party, key_file(key, party_file), url)
    folder = _state_folder(party_file, state)
    serve_party(job, party_file, connector(job, url), folder, Channels(), seal, metrics)


def _show_party(address: str, job: Job, party: str, channel: PartyChannel, worker: Worker) -> None:
    from sl_queue.observe import PartyCollector, Training, serve  # only who is observed loads the library

    def training() -> Training:
        return Training(worker.run, worker.generation, worker.step, worker.committed, worker.samples)

    serve(address, PartyCollector(job.name, party, lambda: channel.measures, training))


def _show_scheduler(address: str) -> OnStatus:
    from sl_queue.observe import SchedulerCollector, serve

    newest: list[Mapping[str, Any]] = [{}]

    def on_status(status: Mapping[str, Any]) -> None:
        newest[0] = status

    serve(address, SchedulerCollector(lambda: newest[0]))
    return on_status


def require_network(url: str) -> None:
    """Raise JobError for memory://, which does not reach beyond one process."""
    if url.startswith(MEMORY):
        raise JobError("a worker in a process of its own needs amqp:// or amqps://; memory:// is for `sl-queue local`")


def _state_folder(party_file: PartyFile, state: Path | None) -> Path:
    folder = state or party_file.state
    if folder is None:
        raise JobError(f"party {party_file.party!r} needs a state folder: give --state DIR or set `state` in its file")
    return folder


class Channels:
    """The channels of the roles in this process, to end them all when one role cannot go on. Mutable, thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[PartyChannel | LinkSchedulerChannel] = []
        self._error: SlQueueError | None = None

    def add(self, channel: PartyChannel | LinkSchedulerChannel) -> None:
        with self._lock:
            self._open.append(channel)
            error = self._error
        if error is not None:
            channel.fail(error)

    def fail(self, error: SlQueueError) -> None:
        """Whoever waits at a channel now, or opens one later, raises `error`."""
        with self._lock:
            self._error = error
            channels = list(self._open)
        for channel in channels:
            channel.fail(error)

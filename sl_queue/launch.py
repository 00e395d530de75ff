"""The composition root: the one place that joins a job, its adapters and a role.

`run_worker` is one role in this process, until it ends; `run_local` is every role, a thread each.
"""

import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from torch import nn

from sl_queue.compute.base import base_stage
from sl_queue.compute.fuse import fuse_stage
from sl_queue.compute.models import final_module, fingerprint, limit_threads
from sl_queue.data.table import read_table
from sl_queue.errors import BrokerUnreachable, ComputeError, JobError, RunStopped, SlQueueError, TransportError
from sl_queue.job import Job, PartyFile
from sl_queue.ports import Table
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import (
    OPERATOR,
    SCHEDULER,
    Failed,
    Header,
    Kind,
    MicroBatch,
    Status,
    Stopped,
    StopRequest,
)
from sl_queue.protocol.pipeline import Pipeline
from sl_queue.protocol.progress import EarlyStopping, Plan, RunState, history_line
from sl_queue.protocol.topology import Topology
from sl_queue.roles.feature_party import FeatureParty
from sl_queue.roles.label_holder import LabelHolder
from sl_queue.roles.scheduler import Scheduler
from sl_queue.roles.worker import Identity, Worker
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.run_file import RunFile
from sl_queue.transport.channel import PartyChannel
from sl_queue.transport.link import Delivery, Link
from sl_queue.transport.memory import MemoryBroker
from sl_queue.transport.scheduler_channel import LinkSchedulerChannel

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


def connector(job: Job, broker: str) -> Connect:
    """How parties reach the broker at that URL."""
    if broker == MEMORY:
        memory = MemoryBroker()
        return lambda party, prefetch: memory.link(party, topology(job, broker), prefetch)
    from sl_queue.transport.rabbitmq import RabbitLink  # a run over memory loads no pika

    return lambda party, prefetch: RabbitLink(broker, party, topology(job, broker), prefetch)


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


def serve_party(job: Job, party_file: PartyFile, connect: Connect, state: Path, open_channels: "Channels") -> None:
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
        )
        worker, train = _role(job, party_file, table, pipeline, channel, folder, identity)
        stack.callback(channel.close)
        channel.open()
        open_channels.add(channel)
        _tell_the_end(worker, channel, lambda: worker.serve(train))
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


def _tell_the_end(worker: Worker, channel: PartyChannel, serve: Callable[[], object]) -> None:
    """Whatever ends this worker and would not be mended by a restart is told to the scheduler."""
    incarnation = worker.identity.incarnation
    try:
        serve()
    except RunStopped:
        channel.report(Stopped(incarnation, worker.committed))
        raise
    except TransportError:
        raise
    except SlQueueError as error:
        channel.report(Failed(incarnation, type(error).__name__, str(error)))
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        log.exception("an error in the model, loss or optimizer, or a bug")
        channel.report(Failed(incarnation, "ComputeError", told))
        raise ComputeError(told) from error


def serve_scheduler(
    job: Job, connect: Connect, state: Path, on_status: OnStatus, open_channels: "Channels"
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
        channel = LinkSchedulerChannel(connect(SCHEDULER, 0), plan.parties, incarnation, patience_s=plan.patience_s)
        stack.callback(channel.close)
        channel.open()
        open_channels.add(channel)
        fresh_run = secrets.token_hex(6)
        return Scheduler(plan, channel, ledger, fresh_run, time.monotonic, on_status).serve()


def run_worker(role: Role, job: Job, party_file: PartyFile | None, broker: str | None, state: Path | None) -> None:
    """One role in this process until it ends. Raises SlQueueError; RunStopped if the run was stopped on purpose."""
    if role == "scheduler":
        url = broker or os.environ.get("SL_QUEUE_BROKER")
        if url is None:
            raise JobError("the scheduler needs a broker: give --broker URL or set SL_QUEUE_BROKER")
        _require_network(url)
        serve_scheduler(job, connector(job, url), state or Path("state/scheduler"), lambda _: None, Channels())
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
    _require_network(url)
    limit_threads(party_file.threads or int(os.environ.get("SL_QUEUE_THREADS", 0)) or None)
    serve_party(job, party_file, connector(job, url), _state_folder(party_file, state), Channels())


def _require_network(url: str) -> None:
    if url.startswith(MEMORY):
        raise JobError("a worker in a process of its own needs amqp:// or amqps://; memory:// is for `sl-queue local`")


def _state_folder(party_file: PartyFile, state: Path | None) -> Path:
    folder = state or party_file.state
    if folder is None:
        raise JobError(f"party {party_file.party!r} needs a state folder: give --state DIR or set `state` in its file")
    return folder


# The operator -------------------------------------------------------------------------------------------------------


def read_status(job: Job, broker: str, timeout_s: float = 3.0) -> dict[str, Any] | None:
    """The newest status that the scheduler published, which stays where it is; None if there is none.

    Raises BrokerUnreachable.
    """
    _require_network(broker)
    arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    link = connector(job, broker)(OPERATOR, 1)
    link.open(arrived.put, lambda: None, lambda _: None)
    try:
        _, status = decode(arrived.get(timeout=timeout_s).body)
        return dict(status.run) if isinstance(status, Status) else None
    except queue.Empty:
        return None
    finally:
        link.close()  # unacknowledged, so it goes back


def request_stop(job: Job, broker: str) -> None:
    """Ask the scheduler for an orderly stop at the next commit. Raises BrokerUnreachable."""
    _require_network(broker)
    link = connector(job, broker)(OPERATOR, 1)
    link.open(lambda _: None, lambda: None, lambda _: None)
    try:
        body = encode(Header("", 0, Kind.REPORT, OPERATOR, SCHEDULER, MicroBatch(0, 0)), StopRequest())
        link.publish(SCHEDULER, Kind.REPORT, "", body, persistent=True)
        if not link.flush(timeout_s=10.0):
            raise BrokerUnreachable("the broker did not confirm the request within 10 s; ask again")
    finally:
        link.close()


# Every role in one process --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """What a run left: the history, one dict an epoch as in history.jsonl, and the trained modules."""

    history: list[dict[str, Any]]
    modules: Mapping[tuple[str, str], nn.Module] = field(repr=False)
    label_holder: str

    def base(self, party: str) -> nn.Module:
        """The trained base model of a party, in evaluation mode on the CPU. KeyError if it has none."""
        return self.modules[party, "base"]

    @property
    def fuse(self) -> nn.Module:
        """The trained fuse model, in evaluation mode on the CPU."""
        return self.modules[self.label_holder, "fuse"]


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


def run_local(
    job: Job,
    parties: Sequence[PartyFile],
    broker: str = MEMORY,
    out: Path | str | None = None,
    on_status: OnStatus | None = None,
) -> Result:
    """Train with every role as a thread of this process, and return the history and the trained modules.

    `broker` is memory:// or an amqp(s):// URL; `out` keeps each role's state under `out/<party>` and `out/scheduler`
    (run again on the same folder, it resumes), None forgets it. `on_status` gets the status a few times a second.
    Raises the error of the party that failed, RunStopped if the run was stopped.
    """
    with ExitStack() as stack:
        root = Path(out) if out is not None else Path(stack.enter_context(TemporaryDirectory(prefix="sl_queue-")))
        states = {role: root / role for role in (*job.parties, SCHEDULER)}
        return run_threads(job, parties, broker, states, on_status or (lambda _: None))


def run_threads(
    job: Job, parties: Sequence[PartyFile], broker: str, states: Mapping[str, Path], on_status: OnStatus
) -> Result:
    """As `run_local`, with the state of each role, the scheduler's too, in a folder of its own choice."""
    require_all(job, parties)
    run_state = _Threads(job, parties, broker, states, on_status).run()
    history = [history_line(result) for result in run_state.history]
    modules = {
        (party.party, path.stem): final_module(job, party, path)
        for party in parties
        for path in sorted((states[party.party] / "final").glob("*.safetensors"))
    }
    return Result(history, modules, job.label_holder)


def require_all(job: Job, parties: Sequence[PartyFile]) -> None:
    """Raise JobError unless there is exactly one file for each party of the job, and each fits the job."""
    for party_file in parties:
        party_file.check(job)
    given = [party_file.party for party_file in parties]
    missing = [party for party in job.parties if party not in given]
    twice = sorted({party for party in given if given.count(party) > 1})
    if missing or twice:
        problem = f"no file for {', '.join(missing)}" if missing else f"two files for {', '.join(twice)}"
        raise JobError(f"job {job.name!r} has the parties {', '.join(job.parties)}: {problem}")


class _Threads:
    """All roles of a run as threads. Mutable while it runs: it collects how each thread ended."""

    def __init__(
        self, job: Job, parties: Sequence[PartyFile], broker: str, states: Mapping[str, Path], on_status: OnStatus
    ) -> None:
        self._job, self._parties, self._states, self._on_status = job, parties, states, on_status
        self._connect = connector(job, broker)
        self._channels = Channels()
        self._errors: list[SlQueueError] = []
        self._state = RunState()

    def run(self) -> RunState:
        threads = [threading.Thread(target=self._run_one, args=(p,), name=p.party) for p in self._parties]
        scheduler = threading.Thread(target=self._run_scheduler, name=SCHEDULER)
        for thread in (scheduler, *threads):
            thread.start()
        try:
            for thread in (*threads, scheduler):
                thread.join()
        except BaseException:  # KeyboardInterrupt: let nobody wait for who is gone
            self._channels.fail(RunStopped("interrupted; run again on the same folder to resume"))
            for thread in (*threads, scheduler):
                thread.join()
            raise
        if self._errors:
            raise next((e for e in self._errors if not isinstance(e, RunStopped)), self._errors[0])
        return self._state

    def _run_one(self, party_file: PartyFile) -> None:
        limit_threads(party_file.threads or shared_threads(len(self._parties)))
        state = self._states[party_file.party]
        self._guard(lambda: serve_party(self._job, party_file, self._connect, state, self._channels))

    def _run_scheduler(self) -> None:
        def serve() -> None:
            folder = self._states[SCHEDULER]
            self._state = serve_scheduler(self._job, self._connect, folder, self._on_status, self._channels)

        self._guard(serve)

    def _guard(self, serve: Callable[[], None]) -> None:
        """Keep a thread's error; one that the scheduler cannot tell the others about ends them here."""
        try:
            serve()
        except SlQueueError as error:
            self._errors.append(error)
            if not isinstance(error, RunStopped):
                self._channels.fail(RunStopped(f"another role of this process failed: {error}"))
        except Exception as error:
            log.exception("a bug in sl_queue")
            self._errors.append(SlQueueError(f"{type(error).__name__}: {error}"))
            self._channels.fail(RunStopped("another role of this process failed"))


def shared_threads(workers: int) -> int:
    """Torch threads for each of several workers on this machine: more than its cores together are slower."""
    return int(os.environ.get("SL_QUEUE_THREADS", 0)) or max(1, (os.cpu_count() or 1) // workers)

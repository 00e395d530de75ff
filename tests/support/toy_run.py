"""A whole run over a MemoryBroker without torch: real roles, real channels, toy stages; any role may be crashed."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sl_queue.errors import SlQueueError
from sl_queue.loops.lifecycle import Identity, Worker
from sl_queue.loops.record import Record
from sl_queue.loops.scheduling import Scheduler
from sl_queue.loops.training import FeatureParty, LabelHolder
from sl_queue.observe.log import to_log
from sl_queue.protocol.history import History
from sl_queue.protocol.messages import SCHEDULER, Kind
from sl_queue.protocol.party.bounds import Bounds
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.scheduler.state import EarlyStopping, Plan, RunState
from sl_queue.protocol.topology import Topology
from sl_queue.security.sealing import Seal
from sl_queue.transport.memory import MemoryBroker
from sl_queue.transport.party_channel import PartyChannel
from sl_queue.transport.scheduler_channel import PREFETCH, LinkSchedulerChannel
from tests.support.toy import MemoryCheckpoints, ToyStage


class Crash(BaseException):
    """The process is gone at this operation; nothing after it happens."""


@dataclass(slots=True)
class CrashAt:
    """Raises Crash at the n-th operation it is asked about; counts them all."""

    operation: int | None = None
    act: Callable[[], None] | None = None  # what happens besides, or instead if `survives`
    survives: bool = False
    count: int = 0
    seen: list[str] = field(default_factory=list)

    def __call__(self, name: str) -> None:
        self.count += 1
        self.seen.append(name)
        if self.count - 1 == self.operation:
            if self.act is not None:
                self.act()
            if not self.survives:
                raise Crash(name)


class AtOnce(Executor):
    """Runs what it is given before anything else: a commit that nothing overlaps, on the worker's own thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class AtLast(Executor):
    """Runs what it is given when its result is awaited, or a little later: a commit that overlaps all it may."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        awaited = threading.Event()

        class Late(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                awaited.set()
                return super().result(timeout)

        late = Late()

        def run() -> None:
            awaited.wait(0.02)  # who waits for the scheduler does not wait for this
            try:
                late.set_result(fn(*args, **kwargs))
            except BaseException as error:
                late.set_exception(error)

        threading.Thread(target=run, name=threading.current_thread().name, daemon=True).start()
        return late


def until_all_have_ended(roles: Iterable[str], serve: Callable[[str], None], starts: int) -> None:
    """Serve each role in a thread of its own, and once more when it has crashed, `starts` times at most.

    Raises AssertionError for a role that failed, or has not ended.
    """
    errors: list[BaseException] = []

    def until_done(role: str) -> None:
        for _ in range(starts):
            try:
                serve(role)
                return
            except Crash:
                continue
            except (SlQueueError, AssertionError) as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=until_done, args=(role,), name=f"{role}-main") for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and not any(thread.is_alive() for thread in threads), errors


class FaultyLink:
    """A link whose worker dies at a chosen operation, before or after it took effect."""

    def __init__(self, link: Any, role: str, crash: CrashAt) -> None:
        self._link, self._thread, self._crash = link, f"{role}-main", crash

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def publish(self, *args: Any, **kwargs: Any) -> None:
        lasting = kwargs.get("expires_s") is None and threading.current_thread().name == self._thread
        if lasting:
            self._crash("before publish")
        self._link.publish(*args, **kwargs)
        if lasting:
            self._crash("after publish")

    def mark(self) -> int:
        return self._link.mark()

    def flush(self, timeout_s: float | None = None, mark: int | None = None) -> bool:
        return self._link.flush(timeout_s, mark)

    def acknowledge(self, tags: Any) -> None:
        if threading.current_thread().name != self._thread:
            return self._link.acknowledge(tags)
        self._crash("before acknowledge")
        half = len(tags) // 2
        self._link.acknowledge(tags[:half])
        self._crash("within acknowledge")
        self._link.acknowledge(tags[half:])
        self._crash("after acknowledge")
        return None


@dataclass(slots=True)
class FaultyCheckpoints(MemoryCheckpoints):
    crash: CrashAt = field(default_factory=CrashAt)

    def write_final(self, *args: Any, **kwargs: Any) -> None:
        self.crash("before write_final")
        MemoryCheckpoints.write_final(self, *args, **kwargs)
        self.crash("after write_final")

    def mark_reported(self) -> None:
        self.crash("before mark_reported")
        MemoryCheckpoints.mark_reported(self)
        self.crash("after mark_reported")

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.crash("before save")
        MemoryCheckpoints.save(self, *args, **kwargs)
        self.crash("after save")


@dataclass(slots=True)
class FaultyJournal:
    """ports.HistoryLog that survives a worker's crash, but not the test."""

    history: History = field(default_factory=History)
    crash: CrashAt = field(default_factory=CrashAt)

    def load(self) -> History:
        return self.history

    def write(self, history: History) -> None:
        if history == self.history:
            return
        self.crash("before history")
        self.history = history
        self.crash("after history")


@dataclass(slots=True)
class MemoryLedger:
    state: RunState | None = None
    crash: CrashAt = field(default_factory=CrashAt)

    def load(self) -> RunState | None:
        return self.state

    def save(self, state: RunState) -> None:
        self.crash("before save")
        self.state = state
        self.crash("after save")


@dataclass(slots=True)
class ToyRun:
    """Two feature parties, a label holder and a scheduler; each role crashes as `crashes` says, and is restarted."""

    epochs: int = 2
    n_rows: int = 22
    batch_size: int = 4
    micro_batches: int = 2
    depth: int = 2
    staleness: int = 0
    checkpoint_every: int = 2
    holdout: float = 0.2
    patience_s: float = 1.0
    late_s: float = 0.0
    scheduler: str = ""  # the incarnation of the one that runs
    early_stopping: EarlyStopping | None = None
    stage: Callable[[str], ToyStage] = ToyStage
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    stores: dict[str, Any] = field(default_factory=dict)
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    journal: FaultyJournal = field(default_factory=FaultyJournal)
    stages: dict[str, list[ToyStage]] = field(default_factory=dict)
    crashes: dict[str, CrashAt] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)
    state: RunState | None = None
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    on_start: Callable[[str, Any], None] = lambda role, link: None
    on_role: Callable[[Any, Any, PartyChannel], None] = lambda stage, role, channel: None
    seal_of: Callable[[str], Seal | None] = lambda role: None
    committer: Callable[[], Executor | None] = AtOnce  # so that a crash comes at the same operation every time

    topology = Topology("label", ("a", "b"))
    _numbers = itertools.count()

    @property
    def pipeline(self) -> Pipeline:
        batches = Batches(self.n_rows, 7, self.epochs, self.batch_size, self.micro_batches, self.holdout)
        return Pipeline(batches, self.depth, self.staleness, self.checkpoint_every)

    def run(self, timeout_s: float = 120.0) -> "ToyRun":
        """To the end; every crashed role is started again, as a supervisor would."""
        roles = (SCHEDULER, *self.topology.parties)
        threads = [threading.Thread(target=self._supervise, args=(r,), name=f"{r}-main", daemon=True) for r in roles]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads), [t.name for t in threads if t.is_alive()]
        if self.errors:
            raise self.errors[0]
        return self

    def newest(self, party: str) -> int:
        """Return the newest step that is on the party's disk."""
        return max(tuple(self.stores[party].saved), default=-1) if party in self.stores else -1

    def weights(self) -> dict[str, Any]:
        return {party: self.stores[party].final_weights for party in self.topology.parties}

    def _supervise(self, role: str) -> None:
        while True:
            try:
                if role == SCHEDULER:
                    self._serve_scheduler()
                else:
                    self._serve_party(role)
                return
            except Crash:
                continue
            except SlQueueError as error:
                self.errors.append(error)
                return

    @contextmanager
    def _link(self, role: str, prefetch: int) -> Iterator[FaultyLink]:
        link = self.broker.link(role, self.topology, prefetch)
        try:
            faulty = FaultyLink(link, role, self.crashes.get(role, CrashAt()))
            self.on_start(role, link)
            yield faulty
        finally:
            link.abort()

    def _serve_scheduler(self) -> None:
        early = self.early_stopping
        plan = Plan({"name": "toy"}, "label", ("a", "b"), self.epochs, self.patience_s, early)
        self.ledger.crash = self.crashes.get(SCHEDULER, CrashAt())
        if self.ledger.state is not None and self.ledger.state.phase == "finished" and not self.late_s:
            self.state = self.ledger.state
            return
        with self._link(SCHEDULER, PREFETCH) as link:
            number = str(next(self._numbers))
            seal = self.seal_of(SCHEDULER)
            channel = LinkSchedulerChannel(
                link, self.topology, number, patience_s=self.patience_s, seal=seal, observe=to_log
            )
            channel.open()
            run, self.scheduler = f"run{number}", number
            about = (run, time.monotonic, lambda _: None, self.late_s)
            scheduler = Scheduler(plan, channel, self.ledger, *about, observe=to_log)
            try:
                self.state = scheduler.serve()
            finally:
                channel._pulse.end()

    def _channel(self, party: str, link: FaultyLink, number: str, bounds: Bounds) -> PartyChannel:
        """Open the channel of a party's worker."""
        channel = PartyChannel(
            link,
            party,
            self.topology,
            number,
            patience_s=self.patience_s,
            persistent=False,
            depth=self.depth,
            seal=self.seal_of(party),
            committer=self.committer(),
            bounds=bounds,
            observe=to_log,
        )
        channel.open()
        return channel

    def _serve_party(self, party: str) -> None:
        pipeline, label = self.pipeline, self.topology.label_holder
        store = self.stores.setdefault(party, FaultyCheckpoints())
        store.crash = self.crashes.get(party, CrashAt())
        if store.final is not None and store.final.reported:
            return
        self.stages.setdefault(party, []).append(stage := self.stage(party))
        kinds = (Kind.ACTIVATION, Kind.HOLDOUT) if party == label else (Kind.GRADIENT,)
        bounds = Bounds(pipeline, frozenset(kinds))
        with self._link(party, bounds.prefetch) as link:
            number = str(next(self._numbers))
            channel = self._channel(party, link, number, bounds)
            self._train(party, channel, stage, number, pipeline)

    def _train(self, party: str, channel: PartyChannel, stage: Any, number: str, pipeline: Pipeline) -> None:
        label, store = self.topology.label_holder, self.stores[party]
        peers = self.topology.feature_parties if party == label else (label,)
        identity = Identity(number, {"name": "toy"}, self.n_rows, "digest", "integer", party=party)
        self.journal.crash = self.crashes.get(label, CrashAt())
        worker = Worker(
            identity,
            channel,
            stage,
            store,
            pipeline,
            record=Record(self.journal if party == label else None),
            observe=to_log,
        )
        role = (
            LabelHolder(peers, channel, stage, pipeline, worker)
            if party == label
            else FeatureParty(label, channel, stage, pipeline, worker)
        )
        self.on_role(stage, role, channel)
        try:
            worker.serve(role.train)
        finally:
            channel._pulse.end()
            self.counts[party] = channel.counts

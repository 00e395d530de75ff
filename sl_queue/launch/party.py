"""A data party, put together: its table, its stage over torch, its checkpoints, its channel and its role."""

import logging
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.fingerprint import fingerprint
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.modules.handover import Take, itself
from sl_queue.compute.spread import SpreadBaseStage, SpreadFuseStage
from sl_queue.compute.threads import limit_threads
from sl_queue.config.environment import LOCAL, THREADS
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import PartySpec, resolve
from sl_queue.config.user_code import Importer
from sl_queue.cut.guard import Guard
from sl_queue.errors import JobError
from sl_queue.launch.alignment import aligned_before
from sl_queue.launch.connect import Channels, Connect, connector, key_file, require_network, sealing
from sl_queue.launch.hands import Lanes, Leading, answering, leading, whole_of
from sl_queue.launch.holdout import Way, chosen_before, hear_held_out, tell_held_out
from sl_queue.launch.keeping import rules_to_keep, secret_to_keep
from sl_queue.launch.privacy import parts_of, require_lasting_secret
from sl_queue.launch.rows import aligned_rows, own_version, table_of
from sl_queue.launch.spending import Spending
from sl_queue.launch.stages import build_stage, of_start
from sl_queue.launch.versions import keep_trained
from sl_queue.loops.lifecycle import Identity, Worker
from sl_queue.loops.training import FeatureParty, LabelHolder
from sl_queue.observe.fan_out import fan_out
from sl_queue.observe.log import to_log
from sl_queue.observe.meter import Meter
from sl_queue.privacy.guards import EpochMeter
from sl_queue.protocol import events
from sl_queue.protocol.alignment import MESSAGE_BYTES
from sl_queue.protocol.events import Observer
from sl_queue.protocol.measures import Measures
from sl_queue.protocol.messages import Role
from sl_queue.protocol.party.bounds import Bounds, tensors_to
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.table import Table
from sl_queue.security.sealing import Seal
from sl_queue.storage.aligned_file import Aligned
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.features_file import write_features
from sl_queue.storage.history_file import Journal
from sl_queue.storage.secret_file import read_secret
from sl_queue.transport.party_channel import PartyChannel

if TYPE_CHECKING:
    from sl_queue.observe.http_server import HttpServer

log = logging.getLogger("sl_queue")


def run_party(
    role: Literal["feature", "label"],
    job: Job,
    party_file: PartyFile,
    broker: str | None,
    state: Path | None,
    key: Path | None = None,
    metrics: str | None = None,
    observe: Observer = to_log,
) -> None:
    """Run one data party in this process until the run ends. Raises SlQueueError; RunStopped if it was stopped.

    `metrics`: `[HOST:]PORT` where Prometheus scrapes.
    """
    spec = resolve(job, party_file, Importer())
    if spec.role != role:
        raise JobError(
            f"party {spec.party!r} has the role {spec.role!r} in the job, and this worker is for role {role!r}; "
            "start the other worker"
        )
    url = party_file.broker_url(broker)
    require_network(url)
    limit_threads(party_file.threads or THREADS.read() or None)
    seal = sealing(job, party_file.party, key_file(key, party_file), url)
    folder = state_folder(party_file, state)
    private = not LOCAL.read()
    connect = connector(job, url, again=lambda: party_file.broker_url(broker, again=True))
    lanes = Lanes.of(job, party_file, broker)
    serve_party(job, spec, connect, folder, Channels(), seal, metrics, private=private, lanes=lanes, observe=observe)


def serve_party(
    job: Job,
    spec: PartySpec,
    connect: Connect,
    state: Path,
    open_channels: Channels,
    seal: Seal | None = None,
    metrics: str | None = None,
    take: Take = itself,
    *,
    private: bool = False,
    guards: Mapping[str, Guard] = MappingProxyType({}),
    lanes: Lanes | None = None,
    observe: Observer = to_log,
) -> None:
    """Run one data party from its table to its final weights; says so and returns if it has finished before.

    `take` says how to come by a model that is given in code. `private`: what its models draw is keyed by a secret of
    its own, unless its file or the run in `state` says no. `guards` are put in at the cuts to these peers.
    `lanes`: the way to hands that compute its micro-batches.
    """
    party, incarnation = spec.party, secrets.token_hex(8)
    with ExitStack() as stack:
        folder = stack.enter_context(Folder(state, job_digest=job.digest, party=party, job=job.canonical()))
        if _has_finished(job, spec, folder, state, observe):
            return
        aligned = aligned_rows(job, spec, connect, state, open_channels, seal, observe)
        way = (connect, state, open_channels, seal, observe)
        spec, rules = _keyed(job, spec, folder, state, private=private)
        table = _prepared(job, spec, aligned, folder, rules, way)
        identity = _identity(job, party, incarnation, table, rules)
        pipeline = job.pipeline_of(job.batches(table.n_rows, table.chosen_by(rules)))
        meter = Meter()
        observe = fan_out(observe, meter)
        channel = channel_of(job, party, connect, incarnation, pipeline, seal, observe, meter)
        journal = Journal(state / "history.jsonl")
        parts = parts_of(spec, table, pipeline.batches)
        guards = {**parts.guards, **guards}
        made, led = build_stage(job, spec, table, pipeline, take, guards, lanes), None
        if lanes is not None:
            led = leading(job, spec, table, rules, made, pipeline, channel, lanes, incarnation, observe)
        stage = made if led is None else led.stage
        worker, train = _role(job, spec, stage, pipeline, channel, folder, journal, identity, observe)
        worker.meter, worker.spending = parts.meter, _spending(job, spec, table, state, parts.meter, worker)
        if metrics is not None:
            stack.callback(_show(metrics, job, party, channel, worker, meter, led).close)
        worker.on_final = partial(keep_trained, job, spec, table, pipeline.batches, state, made)
        stack.callback(channel.close)
        channel.open()
        open_channels.add(channel)
        observe(events.Ready(party))
        with nullcontext() if led is None else led.serving(channel):
            final = worker.serve(train)
        observe(events.Finished(party, final.step, str(state / "final")))


def _has_finished(job: Job, spec: PartySpec, folder: Folder, state: Path, observe: Observer) -> bool:
    """Return True, and say so, if the final weights lie here and the scheduler knows."""
    done = folder.finished()
    if done is None or not done.reported:
        return False
    compare_finished(job, spec, folder)
    observe(events.Finished(spec.party, done.step, str(state / "final"), already=True))
    return True


def _identity(job: Job, party: str, incarnation: str, table: Table, rules: int) -> Identity:
    rows = (table.n_rows, table.digest, table.id_type)
    return Identity(incarnation, job.canonical(), *rows, rules=rules, version=own_version(), party=party)


def _keyed(job: Job, spec: PartySpec, folder: Folder, state: Path, *, private: bool) -> tuple[PartySpec, int]:
    """Return the spec with its secret, and the rules of the run."""
    rules = rules_to_keep(job, spec.party, folder.begun_with)
    require_lasting_secret(spec, state, private=private)
    secret = secret_to_keep(spec.party, spec.chosen_secret, rules, folder.begun_with, state, private=private)
    return replace(spec.with_secret(secret), table=replace(spec.table, scratch=state)), rules


def _prepared(job: Job, spec: PartySpec, aligned: Aligned | None, folder: Folder, rules: int, way: Way) -> Table:
    """Return the rows of the run; `folder` agrees to go on with them, and all parties know which are held out."""
    begun, hears = folder.begun_with is not None, job.tells_holdout and spec.role != "label"
    chosen = hear_held_out(job, spec, aligned, *way, begun=begun) if hears else None
    table = table_of(spec, rules, aligned, chosen)
    for note in table.notes:
        log.info("%s: %s", spec.party, note)
    folder.require({**fingerprint(spec.compute, table, rules), **spec.privacy.fingerprint, **of_start(spec)})
    write_features(folder.path, table.fitted)
    if job.tells_holdout and not hears:
        tell_held_out(job, spec, table, *way)
    return table


def channel_of(
    job: Job,
    party: str,
    connect: Connect,
    incarnation: str,
    pipeline: Pipeline,
    seal: Seal | None,
    observe: Observer,
    meter: Meter,
) -> PartyChannel:
    bounds = bounds_of(job, party, pipeline)
    return PartyChannel(
        connect(party, bounds.prefetch),
        party,
        job.topology(),
        incarnation,
        patience_s=job.broker.patience,
        persistent=job.broker.persistent,
        depth=pipeline.depth,
        seal=seal,
        bounds=bounds,
        observe=observe,
        totals=meter.totals,
    )


def _spending(
    job: Job, spec: PartySpec, table: Table, state: Path, meter: EpochMeter | None, worker: Worker
) -> Spending:
    stage = whole_of(worker.stage)

    def truly() -> Mapping[str, float | None]:
        return stage.truly if isinstance(stage, TorchFuseStage) else {}

    return Spending.of(job, spec, table, state, meter, truly)


def bounds_of(job: Job, party: str, pipeline: Pipeline) -> Bounds:
    """Bound what the peers of `party` may send it: activations to the label holder, gradients of its own cut back."""
    leftover = MESSAGE_BYTES if job.alignment.method == "psi" or job.tells_holdout else 0
    if party == job.label_holder:
        cuts = {peer: job.cut(peer) or () for peer in job.feature_parties}
        return Bounds(pipeline, tensors_to(Role.LABEL_HOLDER), cuts, leftover)
    return Bounds(pipeline, tensors_to(Role.FEATURE_PARTY), {job.label_holder: job.cut(party) or ()}, leftover)


def _role(
    job: Job,
    spec: PartySpec,
    stage: TorchBaseStage | TorchFuseStage | SpreadBaseStage | SpreadFuseStage,
    pipeline: Pipeline,
    channel: PartyChannel,
    folder: Folder,
    journal: Journal,
    identity: Identity,
    observe: Observer,
) -> tuple[Worker, Callable[[int], None]]:
    """Return the worker of this party, and the loop it runs."""
    if isinstance(stage, TorchFuseStage | SpreadFuseStage):
        worker = Worker(identity, channel, stage, folder, pipeline, journal=journal, observe=observe)
        holder = LabelHolder(spec.peers, channel, stage, pipeline, worker, job.early_stopping is not None)
        answering(stage, holder.answer)
        return worker, holder.train
    worker = Worker(identity, channel, stage, folder, pipeline, observe=observe)
    return worker, FeatureParty(job.label_holder, channel, stage, pipeline, worker).train


def compare_finished(job: Job, spec: PartySpec, folder: Folder) -> None:
    """Raise CheckpointError if a run that has finished was trained on another table, or with other models.

    What is no longer there to compare, in a container whose data has gone for instance, is a line in the log.
    """
    try:
        rules = rules_to_keep(job, spec.party, folder.begun_with)
        if isinstance(spec.chosen_secret, Path):
            spec = spec.with_secret(read_secret(spec.chosen_secret))
        aligned = aligned_before(spec.table, folder.path) if job.alignment.method == "psi" else None
        now = fingerprint(spec.compute, table_of(spec, rules, aligned, chosen_before(folder.path)), rules)
        folder.require({**now, **spec.privacy.fingerprint, **of_start(spec)})
    except JobError as error:
        log.warning("%s: not compared with what the finished run was trained on and with: %s", spec.party, error)


def state_folder(party_file: PartyFile, state: Path | None) -> Path:
    """Return the folder of a party's state. Raises JobError if there is none."""
    folder = state or party_file.state
    if folder is None:
        raise JobError(f"party {party_file.party!r} needs a state folder: give --state DIR or set `state` in its file")
    return folder


def _show(
    address: str, job: Job, party: str, channel: PartyChannel, worker: Worker, meter: Meter, led: Leading | None
) -> "HttpServer":
    from sl_queue.observe.prometheus import (  # only who is observed loads the library
        PartyCollector,
        Training,
        Vitals,
        serve,
    )

    def training() -> Training:
        return Training(worker.run, worker.generation, worker.step, worker.committed, worker.samples)

    def measures() -> Measures:
        return meter.read(channel.counts, channel.silent_s, channel.pulse_age_s, channel.connectivity)

    def vitals() -> Vitals:
        return Vitals(channel.pulse_age_s, channel.connectivity)

    hands = None if led is None else led.lead.counts
    return serve(address, PartyCollector(job.name, party, measures, training, hands), vitals)

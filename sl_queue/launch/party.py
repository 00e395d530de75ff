"""A data party, put together: its table, its stage over torch, its checkpoints, its channel and its role."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, cast

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.modules.handover import Take, itself
from sl_queue.compute.threads import limit_threads
from sl_queue.config.environment import HANDS_BROKER, LOCAL, THREADS
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import PartySpec, resolve
from sl_queue.config.user_code import Importer
from sl_queue.cut.guard import Guard
from sl_queue.errors import JobError
from sl_queue.launch.connect import connector, key_file, require_network, sealing
from sl_queue.launch.finished import has_finished
from sl_queue.launch.prepared import Built, Maker, Own, identity_of
from sl_queue.launch.spending import Spending
from sl_queue.launch.standby import Turn, await_turn, ending_noted
from sl_queue.launch.versions import keep_trained
from sl_queue.launch.workplace import Workplace
from sl_queue.loops.lifecycle import Identity, Worker
from sl_queue.loops.record import Record
from sl_queue.loops.training import FeatureParty, LabelHolder
from sl_queue.observe.log import to_log
from sl_queue.observe.meter import Meter
from sl_queue.protocol import events
from sl_queue.protocol.alignment import MESSAGE_BYTES
from sl_queue.protocol.checkpoint import Final
from sl_queue.protocol.events import Observer
from sl_queue.protocol.measures import Measures
from sl_queue.protocol.messages import Role
from sl_queue.protocol.party.bounds import Bounds, tensors_to
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.history_file import Journal
from sl_queue.transport.party_channel import PartyChannel

if TYPE_CHECKING:  # what most workers do without is not loaded: a killed one is to be back soon
    from sl_queue.compute.spread import SpreadBaseStage, SpreadFuseStage
    from sl_queue.launch.hands import Lanes, Leading
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
    *,
    standby: bool = False,
) -> None:
    """Run one data party in this process until the run ends. Raises SlQueueError; RunStopped if it was stopped.

    `metrics`: `[HOST:]PORT` where Prometheus scrapes. `standby`: wait while another worker has the state folder.
    """
    spec = resolve(job, party_file, Importer())
    require_role(spec, role)
    place = workplace_of(job, party_file, broker, state, key, observe)
    private, lanes = not LOCAL.read(), _lanes(job, party_file, broker)
    serve_party(job, spec, place, metrics, private=private, lanes=lanes, standby=standby)


def _lanes(job: Job, party_file: PartyFile, broker: str | None) -> "Lanes | None":
    if party_file.hands is None and not HANDS_BROKER.read():
        return None
    from sl_queue.launch.hands import Lanes

    return Lanes.of(job, party_file, broker)


def require_role(spec: PartySpec, role: str) -> None:
    """Raise JobError unless a worker for `role` is one for this party."""
    if spec.role != role:
        raise JobError(
            f"party {spec.party!r} has the role {spec.role!r} in the job, and this worker is for role {role!r}; "
            "start the other worker"
        )


def workplace_of(
    job: Job, party_file: PartyFile, broker: str | None, state: Path | None, key: Path | None, observe: Observer
) -> Workplace:
    """Return where the worker of a party works in a process of its own. Raises JobError if something is missing."""
    url = party_file.broker_url(broker)
    require_network(url)
    limit_threads(party_file.threads or THREADS.read() or None)
    seal = sealing(job, party_file.party, key_file(key, party_file), url)
    connect = connector(job, url, again=lambda: party_file.broker_url(broker, again=True))
    return Workplace(connect, state_folder(party_file, state), seal=seal, observe=observe)


def serve_party(
    job: Job,
    spec: PartySpec,
    place: Workplace,
    metrics: str | None = None,
    take: Take = itself,
    *,
    private: bool = False,
    guards: Mapping[str, Guard] = MappingProxyType({}),
    lanes: "Lanes | None" = None,
    standby: bool = False,
) -> None:
    """Run one data party from its table to its final weights; says so and returns if it has finished before.

    `take` says how to come by a model that is given in code. `private`: what its models draw is keyed by a secret of
    its own, unless its file or the run in the state folder says no. `guards` are put in at the cuts to these peers.
    `lanes`: the way to hands that compute its micro-batches. `standby`: wait while another worker has the state folder.
    """
    maker = Maker(job, spec, place, take, guards, lanes, private)
    with ExitStack() as stack:
        turn = await_turn(job, spec.party, place, metrics, maker.make_ahead) if standby else Turn()
        own = partial(Folder, place.state, job_digest=job.digest, party=spec.party, job=job.canonical())
        folder = stack.enter_context(own(locked=turn.locked))
        stack.enter_context(ending_noted(place.state))
        if has_finished(job, spec, folder, place):
            return
        if lanes is not None:
            from sl_queue.launch.hands import require_hands_possible  # only who leads hands loads what they take

            require_hands_possible(job, spec.party)
        if turn.waited:
            place.observe(events.TookOver(spec.party))
        place.observe(events.Prepared(spec.party, "checkpoint"))
        built, meter = maker.make(folder, turn.ahead), Meter(leads=lanes is not None)
        place.observe(events.Prepared(spec.party, "model"))
        place = place.watched_by(meter)
        final = _train(job, built, folder, place, meter, lanes, metrics, stack)
        place.observe(events.Finished(spec.party, final.step, str(place.state / "final")))


def _train(
    job: Job,
    built: Built,
    folder: Folder,
    place: Workplace,
    meter: Meter,
    lanes: "Lanes | None",
    metrics: str | None,
    stack: ExitStack,
) -> Final:
    own, party, identity = built.own, built.own.spec.party, identity_of(job, built.own)
    channel = channel_of(job, party, place, identity.incarnation, own.pipeline, meter)
    if job.tells_holdout and party == job.label_holder:
        from sl_queue.launch.holdout import telling_again  # loaded where a label holder chooses

        channel.on_asked = telling_again(job, own.table)
    led = None if lanes is None else _led(job, built, identity, channel, lanes, place)
    worker, train = _role(job, own, identity, built.stage if led is None else led.stage, channel, folder, place)
    worker.meter, worker.spending = built.parts.meter, _spending(job, built, place)
    worker.on_final = partial(keep_trained, job, own.spec, own.table, own.pipeline.batches, place.state, built.stage)
    if metrics is not None:
        stack.callback(_show(metrics, job, party, channel, worker, meter, led).close)
    stack.enter_context(place.opened(channel))
    place.observe(events.Ready(party))
    with nullcontext() if led is None else led.serving(channel):
        return worker.serve(train)


def _led(
    job: Job, built: Built, identity: Identity, channel: PartyChannel, lanes: "Lanes", place: Workplace
) -> "Leading":
    from sl_queue.launch.hands import leading

    own = built.own
    about = (own.spec, own.table, own.rules, built.stage, own.pipeline)
    return leading(job, *about, channel, lanes, identity.incarnation, place.observe)


def channel_of(
    job: Job, party: str, place: Workplace, incarnation: str, pipeline: Pipeline, meter: Meter
) -> PartyChannel:
    """Make the channel of a data party, not yet open."""
    bounds = bounds_of(job, party, pipeline)
    return PartyChannel(
        place.connect(party, bounds.prefetch),
        party,
        job.topology(),
        incarnation,
        patience_s=job.broker.patience,
        persistent=job.broker.persistent,
        depth=pipeline.depth,
        seal=place.seal,
        bounds=bounds,
        observe=place.observe,
        totals=meter.totals,
    )


def _spending(job: Job, built: Built, place: Workplace) -> Spending:
    stage, own = built.stage, built.own

    def truly() -> Mapping[str, float | None]:
        return stage.scoring.truly if isinstance(stage, TorchFuseStage) else {}

    return Spending.of(job, own.spec, own.table, place.state, built.parts.meter, truly)


def bounds_of(job: Job, party: str, pipeline: Pipeline) -> Bounds:
    """Bound what the peers of `party` may send it: activations to the label holder, gradients of its own cut back."""
    leftover = MESSAGE_BYTES if job.alignment.method == "psi" or job.tells_holdout else 0
    if party == job.label_holder:
        cuts = {peer: job.cut(peer) or () for peer in job.feature_parties}
        return Bounds(pipeline, tensors_to(Role.LABEL_HOLDER), cuts, leftover)
    return Bounds(pipeline, tensors_to(Role.FEATURE_PARTY), {job.label_holder: job.cut(party) or ()}, leftover)


def _role(
    job: Job,
    own: Own,
    identity: Identity,
    stage: "TorchBaseStage | TorchFuseStage | SpreadBaseStage | SpreadFuseStage",
    channel: PartyChannel,
    folder: Folder,
    place: Workplace,
) -> tuple[Worker, Callable[[int], None]]:
    """Return the worker of this party, and the loop it runs."""
    about = (identity, channel, stage, folder, own.pipeline)
    if own.spec.role == "label":
        fuse = cast("TorchFuseStage | SpreadFuseStage", stage)
        worker = Worker(*about, record=Record(Journal(place.state / "history.jsonl")), observe=place.observe)
        stops_early = job.early_stopping is not None
        holder = LabelHolder(own.spec.peers, channel, fuse, own.pipeline, worker, stops_early)
        if not isinstance(fuse, TorchFuseStage):
            fuse.answer = holder.answer
        return worker, holder.train
    base = cast("TorchBaseStage | SpreadBaseStage", stage)
    worker = Worker(*about, observe=place.observe)
    return worker, FeatureParty(job.label_holder, channel, base, own.pipeline, worker).train


def state_folder(party_file: PartyFile, state: Path | None) -> Path:
    """Return the folder of a party's state. Raises JobError if there is none."""
    folder = state or party_file.state
    if folder is None:
        raise JobError(f"party {party_file.party!r} needs a state folder: give --state DIR or set `state` in its file")
    return folder


def _show(
    address: str, job: Job, party: str, channel: PartyChannel, worker: Worker, meter: Meter, led: "Leading | None"
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

"""A party's lead, put together: the way to its hands, what they must agree in, and its stage over them."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import torch

from sl_queue.compute.base_stage import TorchBaseStage, base_stage
from sl_queue.compute.fingerprint import fingerprint
from sl_queue.compute.fuse_stage import TorchFuseStage, fuse_stage
from sl_queue.compute.hand import TorchHand
from sl_queue.compute.separate import separate
from sl_queue.compute.spec import ComputeSpec
from sl_queue.compute.spread import SpreadBaseStage, SpreadFuseStage
from sl_queue.compute.threads import limit_threads
from sl_queue.config.broker_url import read_url
from sl_queue.config.environment import HANDS_BROKER
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import PartySpec
from sl_queue.errors import JobError, RunStopped, SlQueueError, TransportError
from sl_queue.hand_ports import Lane
from sl_queue.launch.connect import MEMORY
from sl_queue.loops.hand import GONE_S
from sl_queue.loops.lead import Lead
from sl_queue.protocol.broker_url import fault, split
from sl_queue.protocol.events import Observer
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table
from sl_queue.transport.memory_lane import MemoryLane, MemoryLanes
from sl_queue.transport.party_channel import PartyChannel
from sl_queue.transport.retry import Limits

log = logging.getLogger("sl_queue")

Stage = TorchBaseStage | TorchFuseStage


@dataclass(frozen=True, slots=True)
class Lanes:
    """The way between a party's worker and its hands; `alone`: the worker computes while no hand is here."""

    make: Callable[[bool], Lane]  # of the lead, or of a hand
    alone: bool = True

    @classmethod
    def of(cls, job: Job, party_file: PartyFile, broker: str | None, *, for_hand: bool = False) -> "Lanes | None":
        """Return the way that a party's file asks for; None if it asks for none. Raises JobError.

        `broker` is the job's; a hand may be given the hands' own as `broker`.
        """
        if party_file.hands is None and not HANDS_BROKER.read() and not for_hand:
            return None
        alone = party_file.hands is None or party_file.hands.alone
        url = hands_url(job, party_file, broker)
        from sl_queue.transport.rabbitmq.lane import RabbitLane  # a run over memory loads no pika

        prefix = f"{job.name}.{party_file.party}."

        def again() -> str:
            return hands_url(job, party_file, broker, again=True)

        limits = Limits(first_s=GONE_S) if for_hand else Limits()  # a hand may be there long before its lead
        return cls(lambda lead: RabbitLane(url, prefix, lead=lead, again=again, limits=limits), alone)

    @classmethod
    def in_memory(cls, *, alone: bool = True) -> "Lanes":
        """Return the way between threads of this process."""
        lanes = MemoryLanes()
        return cls(lambda lead: MemoryLane(lanes, lead), alone)

    def computes(self, spec: ComputeSpec) -> ComputeSpec:
        """Return what the lead builds: without its hands' device if it never computes itself."""
        return spec if self.alone else replace(spec, device="cpu")


def hands_url(job: Job, party_file: PartyFile, broker: str | None, *, again: bool = False) -> str:
    """Return the broker of a party's hands: SL_QUEUE_HANDS_BROKER, its file's, or the job's in a vhost of their own.

    Raises JobError.
    """
    own = None if party_file.hands is None else party_file.hands.broker
    for where, url, folder in (
        (HANDS_BROKER.name, HANDS_BROKER.read(), None),
        ("[hands] broker", own, party_file.folder),
    ):
        if url:
            url = read_url(url, folder, again=again)
            if fault(url) is not None:
                raise JobError(f"party {party_file.party!r}: {where} is no URL of a broker: {fault(url)}")
            return url
    url = party_file.broker_url(broker, again=again)
    if url.startswith(MEMORY):
        raise JobError("hands in processes of their own need amqp:// or amqps://; memory:// is for `sl-queue local`")
    vhost = f"{job.name}.{party_file.party}.hands"
    return split(url)._replace(path=f"/{quote(vhost, safe='')}").geturl()


def require_hands_possible(job: Job, party: str) -> None:
    """Raise JobError for what hands cannot do, whatever the model."""
    if job.tells_holdout:
        raise JobError(
            f"party {party!r}: [hands] needs held-out rows that a hand finds by itself, and the label holder "
            "chooses them: take [hands] out, or hold out a share of the rows"
        )
    if job.alignment.method == "psi":
        raise JobError(
            f"party {party!r}: [hands] needs rows that a hand finds by itself, and alignment.method = 'psi' finds "
            "them with the other parties: take [hands] out, or give the parties the rows that they share"
        )


def about(job: Job, spec: PartySpec, table: Table, rules: int) -> dict[str, Any]:
    """Collect what a lead and its hands must agree in, for the same bits to follow; flat, JSON values."""
    found = fingerprint(spec.compute, table, rules)
    found.pop("secret")  # which the lead tells them
    here = {"job": job.digest, "party": spec.party, "cpu": torch.backends.cpu.get_cpu_capability()}
    return {**found, **here}


def stage_of(spec: ComputeSpec, table: Table, batches: Batches) -> Stage:
    """Build a party's part of the model, ready to be computed apart; of modules given in code a copy."""
    build: Callable[..., Stage] = fuse_stage if spec.fuse is not None else base_stage
    stage = build(spec, table, batches)
    separate(stage)
    return stage


@dataclass(frozen=True, slots=True)
class Leading:
    """The lead of a party, and its stage over hands."""

    lead: Lead
    stage: SpreadBaseStage | SpreadFuseStage

    @contextmanager
    def serving(self, channel: PartyChannel) -> Iterator[None]:
        """Be open to hands while the body runs; they go home when the run is over, and wait if it is to be resumed."""
        channel.when_woken(self._between)
        self.lead.open()
        try:
            yield
        except TransportError:
            self.lead.close(home=False)
            raise
        except RunStopped:
            self.lead.close()
            raise
        except SlQueueError as error:
            self.lead.close(error)
            raise
        except BaseException:
            self.lead.close(home=False)
            raise
        self.lead.close()

    def _between(self) -> None:
        """Do what a result may have made possible, while the worker waits for a peer."""
        self.lead.raise_failure()
        if isinstance(self.stage, SpreadFuseStage):
            self.stage.deliver()


def leading(
    job: Job,
    spec: PartySpec,
    table: Table,
    rules: int,
    stage: Stage,
    pipeline: Pipeline,
    channel: PartyChannel,
    lanes: Lanes,
    name: str,
    observe: Observer,
) -> Leading:
    """Put a stage over hands. Raises JobError if its micro-batches cannot be computed apart."""
    separate(stage)
    own = _own_hand(spec, table, pipeline.batches) if lanes.alone else None
    lead = Lead(
        spec.party,
        lanes.make(True),
        about(job, spec, table, rules),
        name,
        secret=spec.compute.secret,
        check=channel.check,
        wake=channel.wake,
        own=own,
        patience_s=job.broker.patience,
        observe=observe,
    )
    if isinstance(stage, TorchFuseStage):
        return Leading(lead, SpreadFuseStage(stage, lead, _nowhere))
    return Leading(lead, SpreadBaseStage(stage, lead, pipeline))


def _own_hand(spec: PartySpec, table: Table, batches: Batches) -> Callable[[], TorchHand]:
    """Build what computes while no hand is here; its thread has torch's threads as this one has."""
    hand, threads = TorchHand(stage_of(spec.compute, table, batches)), torch.get_num_threads()

    def make() -> TorchHand:
        limit_threads(threads)
        return hand

    return make


def _nowhere(micro_batch: object, gradients: Mapping[str, object]) -> None:
    """Send nothing: the loop puts its own way in the place of this."""

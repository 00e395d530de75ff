"""A data party, put together: its table, its stage over torch, its checkpoints, its channel and its role."""

import logging
import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from sl_queue.compute import seeds
from sl_queue.compute.advice import advice
from sl_queue.compute.base import base_stage
from sl_queue.compute.fuse import fuse_stage
from sl_queue.compute.handover import Take, itself
from sl_queue.compute.models import fingerprint, limit_threads
from sl_queue.data.table import read_table
from sl_queue.errors import JobError
from sl_queue.job import Job, PartyFile
from sl_queue.launch.broker import Channels, Connect, connector, key_file, require_network, sealing
from sl_queue.ports import Table
from sl_queue.protocol.pipeline import Pipeline
from sl_queue.roles.feature_party import FeatureParty
from sl_queue.roles.label_holder import LabelHolder
from sl_queue.roles.worker import Identity, Worker
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.history_file import HistoryFile
from sl_queue.transport.channel import PartyChannel
from sl_queue.transport.seal import Seal

log = logging.getLogger("sl_queue")

PREFETCH_MARGIN = 8  # signs of life and questions of a peer, which are acknowledged as soon as they are read


def run_party(
    role: Literal["feature", "label"],
    job: Job,
    party_file: PartyFile,
    broker: str | None,
    state: Path | None,
    key: Path | None = None,
    metrics: str | None = None,
) -> None:
    """One data party in this process until the run ends. Raises SlQueueError; RunStopped if it was stopped on purpose.

    `metrics`: `[HOST:]PORT` where Prometheus may ask.
    """
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


def serve_party(
    job: Job,
    party_file: PartyFile,
    connect: Connect,
    state: Path,
    open_channels: Channels,
    seal: Seal | None = None,
    metrics: str | None = None,
    take: Take = itself,
) -> None:
    """One data party from its table to its final weights; says so and returns if it has finished before.

    `take` says how to come by a model that is given in code.
    """
    party, incarnation = party_file.party, secrets.token_hex(8)
    with ExitStack() as stack:
        about = fingerprint(job, party_file)
        folder = Folder(state, job_digest=job.digest, party=party, fingerprint=about, job=job.canonical())
        stack.callback(folder.close)
        done = folder.finished()
        if done is not None and done.told:
            log.info("%s: already finished after step %d; final weights in %s", party, done.step, state / "final")
            return
        table = _table(job, party_file)
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
        journal = HistoryFile(state / "history.jsonl")
        worker, train = _role(job, party_file, table, pipeline, channel, folder, journal, identity, take)
        if metrics is not None:
            _show(metrics, job, party, channel, worker)
        stack.callback(channel.close)
        channel.open()
        open_channels.add(channel)
        worker.serve(train)
        log.info("%s: finished; final weights in %s", party, state / "final")


def _table(job: Job, party_file: PartyFile) -> Table:
    """Read the party's rows; a source in Python may draw random numbers, beside other parties of this process."""
    if getattr(party_file.data, "source", None) is None:
        return read_table(job, party_file)
    with seeds.seeded(seeds.key(job.seed, party_file.party, "source"), torch.device("cpu")):
        return read_table(job, party_file)


def _role(
    job: Job,
    party_file: PartyFile,
    table: Table,
    pipeline: Pipeline,
    channel: PartyChannel,
    folder: Folder,
    journal: HistoryFile,
    identity: Identity,
    take: Take,
) -> tuple[Worker, Callable[[int], None]]:
    """The worker of this party, and the loop it runs."""
    if party_file.party == job.label_holder:
        fuse = fuse_stage(job, party_file, table, pipeline.batches, take)
        for found in advice(job, fuse):
            log.warning("%s: %s", party_file.party, found.text)
        worker = Worker(identity, channel, fuse, folder, pipeline, journal=journal)
        return worker, LabelHolder(job.feature_parties, channel, fuse, pipeline, worker).train
    base = base_stage(job, party_file, table, pipeline.batches, take)
    worker = Worker(identity, channel, base, folder, pipeline)
    return worker, FeatureParty(job.label_holder, channel, base, pipeline, worker).train


def _state_folder(party_file: PartyFile, state: Path | None) -> Path:
    folder = state or party_file.state
    if folder is None:
        raise JobError(f"party {party_file.party!r} needs a state folder: give --state DIR or set `state` in its file")
    return folder


def _show(address: str, job: Job, party: str, channel: PartyChannel, worker: Worker) -> None:
    from sl_queue.observe import PartyCollector, Training, serve  # only who is observed loads the library

    def training() -> Training:
        return Training(worker.run, worker.generation, worker.step, worker.committed, worker.samples)

    serve(address, PartyCollector(job.name, party, lambda: channel.measures, training))

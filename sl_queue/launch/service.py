"""A service put together: a feature party that answers, and a label holder that fuses, with the version in use."""

import logging
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sl_queue.compute.answering import AnsweringFuse
from sl_queue.compute.predicted import columns_of
from sl_queue.compute.trained import fuse_model, trained_fuse
from sl_queue.config.job import Job
from sl_queue.config.resolve import PartySpec
from sl_queue.errors import CheckpointError, ComputeError, JobError, RemoteProtocolError, SlQueueError
from sl_queue.launch.answering_versions import Versions, versions_of
from sl_queue.launch.connect import Connect
from sl_queue.launch.outcome import meaning_of, undoing
from sl_queue.launch.prediction import loss_of
from sl_queue.loops.requests import Found, Prediction
from sl_queue.loops.serving import FeatureService, LabelService
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.serving import Answered, Came, HourlyLimit, Keys
from sl_queue.protocol.text import counted
from sl_queue.security.sealing import Seal
from sl_queue.storage.versions import Version, choose_version
from sl_queue.transport.serving_channel import ServingChannel

log = logging.getLogger("sl_queue")

PREFETCH = 256
_LOOK_S = 1.0  # between two looks at which version is in use


@dataclass(slots=True)
class Served:
    """A service that runs. Mutable: it is closed."""

    channel: ServingChannel
    feature: FeatureService | None = None
    label: "LabelHolderService | None" = None
    _work: SimpleQueue[Came | None] | None = None

    def close(self) -> None:
        """Stop, and leave the broker."""
        if self.label is not None:
            self.label.service.close()
        if self._work is not None:
            self._work.put(None)
        self.channel.close()


def serve_feature(
    job: Job,
    spec: PartySpec,
    state: Path,
    connect: Connect,
    seal: Seal | None,
    *,
    at_most: int,
    deadline_s: float,
    explains: bool = False,
) -> Served:
    """Begin to answer requests in a thread of its own; it `explains` its columns if it may. Raises SlQueueError."""
    versions, work = versions_of(job, spec, state), SimpleQueue[Came | None]()
    versions.build(choose_version(state).run)
    channel = ServingChannel(
        connect(spec.party, PREFETCH, confirms=False), spec.party, job.topology(), secrets.token_hex(8), work.put,
        deadline_s=deadline_s, patience_s=job.broker.patience, seal=seal,
    )  # fmt: skip

    def refused(rows: int) -> None:
        told = f"the label holder asked for {counted(rows, 'row', 'rows')} beyond {at_most} an hour, and got none"
        log.warning("%s: %s", spec.party, told)

    explained = versions.explained if explains else None
    service = FeatureService(channel, versions.base_of, HourlyLimit(at_most), refused, explained)

    threading.Thread(target=_answer, args=(spec.party, service, work, channel), daemon=True).start()
    channel.open()
    return Served(channel, feature=service, _work=work)


def _answer(party: str, service: FeatureService, work: SimpleQueue[Came | None], channel: ServingChannel) -> None:
    """Answer until the service ends, or the channel fails."""
    while (came := work.get()) is not None:
        try:
            _serve(party, service, came)
        except SlQueueError as error:
            channel.fail(error)
            return
        except Exception as error:  # a bug: the next worker may do better, and the request comes again
            log.exception("%s: a request failed", party)
            channel.fail(SlQueueError(f"{type(error).__name__}: {error}"))
            return


def _serve(party: str, service: FeatureService, came: Came) -> None:
    """Answer one request, if only by a refusal. Raises TransportError."""
    try:
        service.serve(came)
    except RemoteProtocolError as error:
        log.warning("%s: a request was dropped: %s", party, error)
        came.done()
    except (ComputeError, JobError, CheckpointError) as error:  # of these rows, or of this version
        log.warning("%s: a request was refused: %s", party, error)
        service.refuse(came)


class Models:
    """The label holder's models with the weights of one version: loops.requests.Fuse.

    One thread at a time computes with them: what a module does besides is unknown.
    """

    def __init__(self, spec: PartySpec, version: Version, versions: Versions | None) -> None:
        self.run, self.party, self.version = version.run, spec.party, version
        self.base = None if versions is None else versions.base_of(version.run)  # None: the label holder has none
        self.columns = None if versions is None else versions.columns_of(version.run)  # names, of the base model's
        self.fuse: AnsweringFuse = trained_fuse(spec.compute, fuse_model(spec.compute), version.weights("fuse"))
        self._lock = threading.Lock()
        self._about = (*meaning_of(version, loss_of(spec)), undoing(version))

    def own(self, number: MicroBatch, keys: Keys) -> tuple[Found, object] | None:
        """Return which rows the label holder has, and its outputs for those; None without a base model."""
        if self.base is None:
            return None
        with self._lock:
            return self.base.in_place(number, keys)

    def fused(
        self, number: MicroBatch, keys: Keys, there: Found, own: object, answers: Mapping[str, Answered]
    ) -> list[Prediction]:
        """Return predictions for the rows that are `there`. Raises RemoteProtocolError, ComputeError."""
        inputs = {}
        for party, answer in answers.items():
            if answer.activation is None:
                raise RemoteProtocolError(f"party {party!r} has answered without an activation")
            outputs = self.fuse.arrive(party, number, keys[answer.found], answer.activation)
            inputs[party] = _only(outputs, there[answer.found])
        if own is not None:
            assert isinstance(own, tuple)
            inputs[self.party] = _only(own[1], there[own[0]])
        with self._lock:
            columns = columns_of(self.fuse.fuse(number, inputs), *self._about)
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in values]


def _only(outputs: Any, rows: Found) -> list[Any]:
    return list(outputs) if rows.all() else [output[rows] for output in outputs]


class LabelHolderService:
    """The label holder's side; takes over the version in use without a pause. Mutable, thread-safe."""

    def __init__(self, job: Job, spec: PartySpec, state: Path, run: str | None) -> None:
        self.job, self.spec, self._state, self._asked = job, spec, state, run
        base = spec.party in spec.compute.layers.cuts
        self._versions = versions_of(job, spec, state) if base else None
        self.models = Models(spec, choose_version(state, run), self._versions)
        self._looked, self._lock, self._probing = time.monotonic(), threading.Lock(), False
        self.service: LabelService

    def current(self) -> Models:
        """Return the models of the version in use, as far as all parties have it; it is looked up once a second."""
        with self._lock:
            if self._asked is None and not self._probing and time.monotonic() - self._looked > _LOOK_S:
                self._looked, self._probing = time.monotonic(), True
                threading.Thread(target=self._look, daemon=True).start()
            return self.models

    def _look(self) -> None:
        """Take over the version in use, if it is another and every party answers for it."""
        try:
            version = choose_version(self._state)
            if version.run != self.models.run:
                models = Models(self.spec, version, self._versions)
                self.service.probe(models).result()
                self.models = models
                log.info("%s: serves run %s from now on", self.spec.party, version.run)
        except Exception as error:  # whatever is wrong with the new one, this one is not
            log.warning("%s: goes on with run %s: %s", self.spec.party, self.models.run, error)
        finally:
            self._probing = False


def serve_label(
    job: Job, spec: PartySpec, state: Path, connect: Connect, seal: Seal | None, run: str | None, *, deadline_s: float
) -> Served:
    """Begin to take requests by `Served.label.service.predict`. Raises SlQueueError."""
    holder = LabelHolderService(job, spec, state, run)

    def take(came: Came) -> None:
        try:
            holder.service.take(came)
        except RemoteProtocolError as error:
            log.warning("%s: an answer of %s was dropped: %s", spec.party, came.sender, error)
            came.done()

    channel = ServingChannel(
        connect(spec.party, PREFETCH, confirms=False), spec.party, job.topology(), secrets.token_hex(8), take,
        deadline_s=deadline_s, patience_s=job.broker.patience, seal=seal,
    )  # fmt: skip
    holder.service = LabelService(channel, spec.peers, holder.current, deadline_s)
    channel.open()
    holder.service.start()
    return Served(channel, label=holder)

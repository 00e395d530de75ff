"""Measurement of a step's parts: a few steps of all parties, here in this thread.

Each action is measured with other data in the caches; some after a pause, as a worker meets it that has waited for a
message, which alone makes it up to twice as long; and some beside another core that is as busy, as workers of one
machine are to each other. What cannot be measured on one machine is assumed: the way through the broker, and the link
that the user describes.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from sl_queue.compute.base_stage import TorchBaseStage, base_stage
from sl_queue.compute.fuse_stage import TorchFuseStage, fuse_stage
from sl_queue.compute.spec import ComputeSpec
from sl_queue.config.job import Job, JobPipeline, JobWire
from sl_queue.config.resolve import layers_of
from sl_queue.cut.packing import Mask, Wire
from sl_queue.cut.relu import gradient_mask
from sl_queue.cut.tensors import cast
from sl_queue.planning.costs import COLD_S, LABEL, Affine, Costs, FeatureCosts, Way
from sl_queue.planning.stopwatch import Stopwatch, copying
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import Activation, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table
from sl_queue.storage.checkpoints import Folder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Handling:
    """Cost of a message in seconds, by bytes."""

    driver: Affine  # at each end
    broker: Affine
    overhead: Affine  # CPU time beyond the way of the message: much is spent when it has arrived


# RabbitMQ 3.10 on two cores, as `python -m benchmarks plan` measures it.
HANDLING = Handling(driver=Affine(0.17e-3, 0.3e-9), broker=Affine(0.1e-3, 0.3e-9), overhead=Affine(0.1e-3, 0.5e-9))

STEPS = 8  # measured, after as many to warm up
PARTS = 8  # of a batch, for the cost of small micro-batches
PLAYED = 50  # steps of a simulation between two commits, at most


@dataclass(frozen=True, slots=True)
class Link:
    """Link between a feature party and the broker, and the number of cores that all share (None: nobody shares)."""

    rtt_ms: float = 0.0
    mbit_s: float | None = None
    cores: int | None = None
    own: Mapping[str, "Link"] = field(default_factory=dict)  # of feature parties whose link is another

    @property
    def way(self) -> Way:
        """The link as the simulation has it."""
        return Way(self.rtt_ms / 1e3, None if self.mbit_s is None else self.mbit_s * 1e6 / 8)


@dataclass(frozen=True, slots=True)
class Sample:
    """Measurements with micro-batches of one size."""

    rows: int
    clock: Stopwatch = field(repr=False)
    activations: Mapping[str, Payload] = field(repr=False)  # of one micro-batch, as they were computed
    gradients: Mapping[str, Payload] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Measured:
    """A few steps, with a whole batch at once and in parts."""

    samples: tuple[Sample, Sample]
    cold_factor: float  # slowdown after a pause
    contention: float  # slowdown beside one other that computes on this machine
    relu: Mapping[str, bool]  # whose zeros ask for no gradient
    commit_s: float

    def line(self, value: Callable[[Sample], float]) -> Affine:
        """Return a cost by the rows of a micro-batch."""
        one, other = self.samples
        return Affine.through((one.rows, value(one)), (other.rows, value(other)))


def measure(job: Job, specs: Mapping[str, ComputeSpec], tables: Mapping[str, Table]) -> Measured:
    """Run a few steps of every stage in this thread."""
    plain = {"wire": JobWire(), "holdout": 0.0, "test": 0.0, "early_stopping": None, "epochs": 1_000_000}
    samples, cold_factors, contentions = [], [], []
    for parts in (1, min(PARTS, job.batch_size)):
        changed = job.model_copy(update={**plain, "pipeline": JobPipeline(micro_batches=parts)})
        stages = _Stages.build(changed, specs, tables)
        samples.append(stages.sample())
        cold_factors.append(stages.cold_factor(samples[-1]))
        contentions.append(stages.contention(samples[-1]))
    with TemporaryDirectory(prefix="sl_queue-plan-") as folder:
        commit_s = stages.commit_s(Path(folder))
    return Measured((samples[0], samples[1]), cold_factors[0], contentions[0], stages.relu(), commit_s)


@dataclass(frozen=True, slots=True)
class _Stages:
    """All parties' stages in one thread."""

    fuse: TorchFuseStage
    bases: Mapping[str, TorchBaseStage]
    batches: Batches

    @classmethod
    def build(cls, job: Job, specs: Mapping[str, ComputeSpec], tables: Mapping[str, Table]) -> "_Stages":
        """Build the stages of all parties as `job` has them, with the models of `specs`."""
        holder, batches, layers = job.label_holder, job.batches(tables[job.label_holder].n_rows), layers_of(job)
        own = {party: replace(spec, layers=layers) for party, spec in specs.items()}
        fuse = fuse_stage(own[holder], tables[holder], batches)
        bases = {party: base_stage(own[party], tables[party], batches) for party in job.feature_parties}
        return cls(fuse, bases, batches)

    def sample(self) -> Sample:
        """Run a few steps, after as many to warm up."""
        self._steps(Stopwatch(), range(STEPS))
        clock = Stopwatch()
        sent, back = self._steps(clock, range(STEPS, 2 * STEPS))
        return Sample(len(self.batches.rows(MicroBatch(0, 0))), clock, sent, back)

    def cold_factor(self, sample: Sample) -> float:
        """Return the slowdown of a step whose every action comes after a pause."""
        clock = Stopwatch(COLD_S)
        self._steps(clock, range(2 * STEPS, 3 * STEPS))
        return clock.times_as_long_as(sample.clock)

    def contention(self, sample: Sample) -> float:
        """Return the slowdown of a step while another core does nothing but copy."""
        if os.cpu_count() == 1:
            return 1.0
        clock = Stopwatch()
        with copying():
            self._steps(clock, range(3 * STEPS, 4 * STEPS))
        return clock.times_as_long_as(sample.clock)

    def _steps(self, clock: Stopwatch, steps: range) -> tuple[Mapping[str, Payload], Mapping[str, Payload]]:
        """Return the activations and gradients of the last one's first micro-batch, which is as large as any."""
        for step in steps:
            for index in reversed(range(self.batches.parts(step))):
                sent, back = self._micro_batch(clock, MicroBatch(step, index))
            clock.time(LABEL, "update", self.fuse.update)
            for party, base in self.bases.items():
                clock.time(party, "update", base.update)
        return sent, back

    def _micro_batch(
        self, clock: Stopwatch, micro_batch: MicroBatch
    ) -> tuple[Mapping[str, Payload], Mapping[str, Payload]]:
        """Return the activations and gradients of a micro-batch."""
        sent = {}
        for party, base in self.bases.items():
            clock.time(party, "prepare", partial(base.prepare, micro_batch))
            sent[party] = clock.time(party, "forward", partial(base.forward, micro_batch))
        clock.time(LABEL, "prepare", partial(self.fuse.prepare, micro_batch))
        back = clock.time(LABEL, "fuse", partial(self.fuse.forward_backward, micro_batch, sent))
        for party, base in self.bases.items():
            clock.time(party, "backward", partial(base.backward, micro_batch, back[party]))
        return sent, back

    def commit_s(self, folder: Path) -> float:
        """Measure the slowest party's checkpoint on this machine's disk, in seconds."""
        seconds = []
        stages: list[TorchFuseStage | TorchBaseStage] = [self.fuse, *self.bases.values()]
        for number, stage in enumerate(stages):
            with Folder(folder / str(number), job_digest="", party="", fingerprint={}) as checkpoints:
                began = time.perf_counter()
                checkpoints.save(0, stage.state(), run="", generation=0, values={})
                seconds.append(time.perf_counter() - began)
        return max(seconds)

    def relu(self) -> Mapping[str, bool]:
        """Name the parties whose activations come out of a ReLU; the last thing that is asked of these stages."""
        found = {}
        for party, base in self.bases.items():
            base.cut.wire = Wire(compress="bitmap")
            found[party] = gradient_mask(base.forward(MicroBatch(4 * STEPS, 0))) is not None
        return found


# For the simulation -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Travel:
    """Cost of a message to those at its ends, and its bytes."""

    pack_s: float
    unpack_s: float
    size: int

    @classmethod
    def of(cls, wire: Wire, payload: Payload, relu: bool, wanted: Mask | None) -> "_Travel":
        header = Header("a" * 12, 0, Kind.ACTIVATION, "party", "party", MicroBatch(0, 0))
        clock = Stopwatch()
        body = b""
        for _ in range(STEPS):
            packed = clock.time("", "pack", lambda: wire.pack(payload, relu=relu, wanted=wanted))
            body = clock.time("", "encode", partial(encode, header, Activation(MicroBatch(0, 0), packed)))
            _, message = clock.time("", "decode", partial(decode, body))
            assert isinstance(message, Activation)
            clock.time("", "unpack", partial(wire.unpack, message.payload, wanted))
        pack_s, encode_s, decode_s, unpack_s = (clock.median("", w) for w in ("pack", "encode", "decode", "unpack"))
        return cls(pack_s + encode_s, decode_s + unpack_s, len(body))


_Travels = Mapping[tuple[str, int], _Travel]  # by party and place among the samples


def _travels(measured: Measured, wire: Wire) -> tuple[_Travels, _Travels]:
    """Measure what the activations and the gradients of each party and sample cost on their way."""
    there, back = {}, {}
    for place, sample in enumerate(measured.samples):
        for party, activation in sample.activations.items():
            relu = measured.relu[party]
            wanted = gradient_mask(wire.pack(activation, relu=relu))
            there[party, place] = _Travel.of(wire, activation, relu, None)
            back[party, place] = _Travel.of(wire, sample.gradients[party], relu=False, wanted=wanted)
    return there, back


def costs_of(job: Job, measured: Measured, wire: Wire, link: Link, handling: Handling = HANDLING) -> Costs:
    """Return what the simulation has to know."""
    there, back = _travels(measured, replace(wire, cast=cast))

    def line(travels: _Travels, party: str, value: Callable[[_Travel], float]) -> Affine:
        few, many = measured.samples
        return Affine.through((few.rows, value(travels[party, 0])), (many.rows, value(travels[party, 1])))

    features, fuse = {}, measured.line(lambda sample: sample.clock.median(LABEL, "fuse"))
    clock = measured.samples[0].clock
    for party in measured.relu:
        forward = measured.line(lambda sample, p=party: sample.clock.median(p, "forward"))  # type: ignore[misc]
        backward = measured.line(lambda sample, p=party: sample.clock.median(p, "backward"))  # type: ignore[misc]
        features[party] = FeatureCosts(
            forward + line(there, party, lambda t: t.pack_s),
            backward + line(back, party, lambda t: t.unpack_s),
            clock.median(party, "update"),
            line(there, party, lambda t: t.size),
            line(back, party, lambda t: t.size),
            measured.line(lambda sample, p=party: sample.clock.median(p, "prepare")),  # type: ignore[misc]
        )
        fuse = fuse + line(there, party, lambda t: t.unpack_s) + line(back, party, lambda t: t.pack_s)
    rtt_s = max(way.rtt_ms for way in (link, *link.own.values())) / 1e3
    commits = between_commits(job.pipeline) / job.pipeline.checkpoint_every  # one that is played stands for these
    return Costs(
        features,
        fuse,
        clock.median(LABEL, "update"),
        commit_s=(measured.commit_s + rtt_s) * commits,
        fuse_prepare=measured.line(lambda sample: sample.clock.median(LABEL, "prepare")),
        handling=handling.broker,
        driver=handling.driver,
        overhead=handling.overhead,
        cold_factor=measured.cold_factor,
        contention=measured.contention,
        way=link.way,
        ways={party: own.way for party, own in link.own.items()},
        cores=link.cores,
    )


def between_commits(order: JobPipeline) -> int:
    return min(order.checkpoint_every, PLAYED)

"""Which pipeline is fastest: a few steps measured here, every pipeline played with what they cost.

Each action is measured with other data in the caches, and some after a pause, as a worker meets it that has waited for
a message: that alone makes it up to twice as long. What cannot be measured on one machine is assumed: the way through
the broker, and the link that the user describes.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sl_queue.compute.base import TorchBaseStage, base_stage
from sl_queue.compute.fuse import TorchFuseStage, fuse_stage
from sl_queue.compute.models import limit_threads
from sl_queue.compute.tensors import cast
from sl_queue.data.table import read_table
from sl_queue.job import Job, JobPipeline, JobWire, PartyFile
from sl_queue.local.threads import require_all
from sl_queue.ports import Table
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import Activation, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.pipeline import Pipeline
from sl_queue.protocol.row_order import Batches
from sl_queue.protocol.simulation import COLD_S, LABEL, Affine, Costs, FeatureCosts, Prediction, simulate
from sl_queue.protocol.wire import Mask, Wire, asks_for_less
from sl_queue.storage.checkpoints import Folder


@dataclass(frozen=True, slots=True)
class Handling:
    """What a message costs in seconds, by bytes."""

    driver: Affine  # at each end
    broker: Affine
    beside: Affine  # CPU time beyond the way of the message: much is spent when it has arrived


# RabbitMQ 3.10 on two cores, as `python -m benchmarks plan` measures it.
HANDLING = Handling(driver=Affine(0.15e-3, 0.3e-9), broker=Affine(0.3e-3, 0.2e-9), beside=Affine(0.2e-3, 0.3e-9))
CACHES_BYTES = 8 * 1024 * 1024  # read before each measurement

T = TypeVar("T")

STEPS = 8  # measured, after as many to warm up
PARTS = 8  # of a batch, for the cost of small micro-batches
PLAYED = 50  # steps of a simulation between two commits, at most
WARM_UP = 6
MICRO_BATCHES = (1, 2, 4, 8)
STALENESS = (1, 2, 4)
WIRES = (Wire(), Wire(compress="bitmap"), Wire("bfloat16"), Wire("float16"), Wire("int8"), Wire("int8", "bitmap"))
SIMPLER = 1.03  # what comes earlier in the list is preferred unless something later is this much faster


@dataclass(frozen=True, slots=True)
class Link:
    """What lies between a feature party and the broker, and how many cores everybody shares (None: nobody shares)."""

    rtt_ms: float = 0.0
    mbit_s: float | None = None
    cores: int | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the job, and what it would come to."""

    pipeline: JobPipeline
    wire: Wire
    prediction: Prediction

    @property
    def exact(self) -> bool:
        """Whether it gives the weights of joined training."""
        return self.pipeline.staleness == 0 and self.wire.dtype == "float32"


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found, fastest first."""

    candidates: tuple[Candidate, ...]
    present: Candidate  # what the job says now

    @property
    def exact(self) -> Candidate:
        """The fastest that gives the weights of joined training."""
        return _simplest([c for c in self.candidates if c.exact])

    @property
    def fastest(self) -> Candidate:
        """The fastest of all."""
        return _simplest(self.candidates)


def plan_job(job: Job, files: Sequence[PartyFile], link: Link, handling: Handling = HANDLING) -> Plan:
    """Measure a few steps of all parties here, and rank the pipelines. Raises whatever building a stage raises."""
    require_all(job, files)
    limit_threads(next((file.threads for file in files if file.threads), None) or 1)
    tables = {file.party: read_table(job, file) for file in files}
    measured = measure(job, {file.party: file for file in files}, tables)
    found = []
    for wire in WIRES:
        costs = costs_of(job, measured, wire, link, handling)
        found += [Candidate(order, wire, played(job, costs, order)) for order in _orders(job)]
    costs = costs_of(job, measured, job.on_the_wire, link, handling)
    present = Candidate(job.pipeline, job.on_the_wire, played(job, costs, job.pipeline))
    return Plan(tuple(sorted(found, key=lambda candidate: candidate.prediction.step_s)), present)


def _orders(job: Job) -> Iterator[JobPipeline]:
    """The pipelines worth looking at, simple ones first."""
    every = job.pipeline.checkpoint_every
    for parts in (n for n in MICRO_BATCHES if n <= job.batch_size):
        for depth in sorted({1, 2, parts} if parts > 1 else {1}):
            yield JobPipeline(micro_batches=parts, depth=depth, staleness=0, checkpoint_every=every)
    for staleness in STALENESS:
        for parts in (n for n in MICRO_BATCHES[:3] if n <= job.batch_size):
            depth = parts * (staleness + 1)
            yield JobPipeline(micro_batches=parts, depth=depth, staleness=staleness, checkpoint_every=every)


def _simplest(candidates: Sequence[Candidate]) -> Candidate:
    """Of those that are about as fast as the fastest the one that asks for least."""
    limit = min(c.prediction.step_s for c in candidates) * SIMPLER

    def asks(candidate: Candidate) -> tuple[int, int, int, int]:
        order, wire = candidate.pipeline, candidate.wire
        return order.staleness, WIRES.index(wire), order.micro_batches, order.depth

    return min((c for c in candidates if c.prediction.step_s <= limit), key=asks)


# Measuring ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Clock:  # mutable: it collects
    """Times of named actions, each after a pause."""

    pause_s: float = 0.0
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    other: npt.NDArray[np.uint8] = field(default_factory=lambda: np.ones(CACHES_BYTES, np.uint8), repr=False)

    def time(self, party: str, what: str, action: Callable[[], T]) -> T:
        self.other.max()
        time.sleep(self.pause_s)
        began = time.perf_counter()
        found = action()
        self.seconds[party, what].append(time.perf_counter() - began)
        return found

    def median(self, party: str, what: str) -> float:
        return median(self.seconds[party, what])


@dataclass(frozen=True, slots=True)
class Sample:
    """What was measured with micro-batches of one size."""

    rows: int
    clock: _Clock = field(repr=False)
    activations: Mapping[str, Payload] = field(repr=False)  # of one micro-batch, as they were computed
    gradients: Mapping[str, Payload] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Measured:
    """A few steps, with a whole batch at once and in parts."""

    samples: tuple[Sample, Sample]
    chill: float  # how many times as long everything takes after a pause
    relu: Mapping[str, bool]  # whose zeros ask for no gradient
    commit_s: float

    def line(self, value: Callable[[Sample], float]) -> Affine:
        """A cost by the rows of a micro-batch."""
        one, other = self.samples
        return Affine.through((one.rows, value(one)), (other.rows, value(other)))


def measure(job: Job, files: Mapping[str, PartyFile], tables: Mapping[str, Table]) -> Measured:
    """Run a few steps of every stage in this thread."""
    n_rows = tables[job.label_holder].n_rows
    plain = {"wire": JobWire(), "holdout": 0.0, "early_stopping": None, "epochs": 1_000_000}
    samples, chills = [], []
    for parts in (1, min(PARTS, job.batch_size)):
        changed = job.model_copy(update={**plain, "pipeline": JobPipeline(micro_batches=parts)})
        stages = _Stages.build(changed, files, tables, changed.batches(n_rows))
        samples.append(stages.sample())
        chills.append(stages.chill(samples[-1]))
    with TemporaryDirectory(prefix="sl_queue-plan-") as folder:
        commit_s = stages.commit_s(Path(folder))
    return Measured((samples[0], samples[1]), chills[0], stages.relu(), commit_s)


@dataclass(frozen=True, slots=True)
class _Stages:
    """All parties' stages in one thread."""

    fuse: TorchFuseStage
    bases: Mapping[str, TorchBaseStage]
    batches: Batches

    @classmethod
    def build(
        cls, job: Job, files: Mapping[str, PartyFile], tables: Mapping[str, Table], batches: Batches
    ) -> "_Stages":
        fuse = fuse_stage(job, files[job.label_holder], tables[job.label_holder], batches)
        bases = {party: base_stage(job, files[party], tables[party], batches) for party in job.feature_parties}
        return cls(fuse, bases, batches)

    def sample(self) -> Sample:
        """A few steps, after as many to warm up."""
        self._steps(_Clock(), range(STEPS))
        clock = _Clock()
        sent, back = self._steps(clock, range(STEPS, 2 * STEPS))
        return Sample(len(self.batches.rows(MicroBatch(0, 0))), clock, sent, back)

    def chill(self, sample: Sample) -> float:
        """How many times as long a step takes whose every action comes after a pause."""
        clock = _Clock(COLD_S)
        self._steps(clock, range(2 * STEPS, 3 * STEPS))
        paused, straight = (sum(c.median(*action) for action in clock.seconds) for c in (clock, sample.clock))
        return max(1.0, paused / straight)

    def _steps(self, clock: _Clock, steps: range) -> tuple[Mapping[str, Payload], Mapping[str, Payload]]:
        """The activations and gradients of the last one's first micro-batch, which is as large as any."""
        for step in steps:
            for index in reversed(range(self.batches.parts(step))):
                sent, back = self._micro_batch(clock, MicroBatch(step, index))
            clock.time(LABEL, "update", self.fuse.update)
            for party, base in self.bases.items():
                clock.time(party, "update", base.update)
        return sent, back

    def _micro_batch(
        self, clock: _Clock, micro_batch: MicroBatch
    ) -> tuple[Mapping[str, Payload], Mapping[str, Payload]]:
        """Its activations and gradients."""
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
        """How long the slowest party's checkpoint takes on this machine's disk."""
        seconds = []
        stages: list[TorchFuseStage | TorchBaseStage] = [self.fuse, *self.bases.values()]
        for number, stage in enumerate(stages):
            with Folder(folder / str(number), job_digest="", party="", fingerprint={}) as checkpoints:
                began = time.perf_counter()
                checkpoints.save(0, stage.state(), run="", generation=0, values={})
                seconds.append(time.perf_counter() - began)
        return max(seconds)

    def relu(self) -> Mapping[str, bool]:
        """Whose activations come out of a ReLU; the last thing that is asked of these stages."""
        found = {}
        for party, base in self.bases.items():
            base.wire = Wire(compress="bitmap")
            found[party] = asks_for_less(base.forward(MicroBatch(3 * STEPS, 0))) is not None
        return found


# Playing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Travel:
    """What a message costs those at its ends, and its bytes."""

    pack_s: float
    unpack_s: float
    size: int

    @classmethod
    def of(cls, wire: Wire, payload: Payload, relu: bool, wanted: Mask | None) -> "_Travel":
        header = Header("a" * 12, 0, Kind.ACTIVATION, "party", "party", MicroBatch(0, 0))
        clock = _Clock()
        body = b""
        for _ in range(STEPS):
            packed = clock.time("", "pack", lambda: wire.pack(payload, relu=relu, wanted=wanted))
            body = clock.time("", "encode", partial(encode, header, Activation(MicroBatch(0, 0), packed)))
            _, message = clock.time("", "decode", partial(decode, body))
            assert isinstance(message, Activation)
            clock.time("", "unpack", partial(wire.unpack, message.payload, wanted))
        pack_s, encode_s, decode_s, unpack_s = (clock.median("", w) for w in ("pack", "encode", "decode", "unpack"))
        return cls(pack_s + encode_s, decode_s + unpack_s, len(body))


def costs_of(job: Job, measured: Measured, wire: Wire, link: Link, handling: Handling = HANDLING) -> Costs:
    """What the simulation has to know."""
    wire, there, back = replace(wire, cast=cast), {}, {}
    for place, sample in enumerate(measured.samples):
        for party, activation in sample.activations.items():
            relu = measured.relu[party]
            wanted = asks_for_less(wire.pack(activation, relu=relu))
            there[party, place] = _Travel.of(wire, activation, relu, None)
            back[party, place] = _Travel.of(wire, sample.gradients[party], relu=False, wanted=wanted)

    def line(travels: Mapping[tuple[str, int], _Travel], party: str, value: Callable[[_Travel], float]) -> Affine:
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
    rtt_s = link.rtt_ms / 1e3
    commits = _between_commits(job.pipeline) / job.pipeline.checkpoint_every  # one that is played stands for these
    return Costs(
        features,
        fuse,
        clock.median(LABEL, "update"),
        commit_s=(measured.commit_s + rtt_s) * commits,
        fuse_prepare=measured.line(lambda sample: sample.clock.median(LABEL, "prepare")),
        handling=handling.broker,
        driver=handling.driver,
        beside=handling.beside,
        chill=measured.chill,
        rtt_s=rtt_s,
        bytes_per_s=None if link.mbit_s is None else link.mbit_s * 1e6 / 8,
        cores=link.cores,
    )


def _between_commits(order: JobPipeline) -> int:
    return min(order.checkpoint_every, PLAYED)


def played(job: Job, costs: Costs, order: JobPipeline) -> Prediction:
    """What that pipeline would come to."""
    every = _between_commits(order)
    steps = every + max(every, 2 * WARM_UP)
    batches = Batches(job.batch_size * steps, job.seed, 1, job.batch_size, order.micro_batches)
    pipeline = Pipeline(batches, order.depth, order.staleness, every)
    return simulate(pipeline, costs, min(WARM_UP, every))


# What is printed ------------------------------------------------------------------------------------------------


def lines(plan: Plan, shown: int = 12) -> Iterator[str]:
    """The ranking, and the tables to paste."""
    yield f"{'ms a step':>10} {'bubble':>7}  {'micro_batches':>13} {'depth':>5} {'staleness':>9}  wire"
    rows = [*plan.candidates[:shown], *([plan.exact] if plan.exact not in plan.candidates[:shown] else [])]
    for candidate in rows:
        yield _line(candidate)
    yield f"{_line(plan.present)}   (the job as it is)"
    yield f"\nfastest with the weights of joined training:\n\n{_tables(plan.exact)}"
    if not plan.fastest.exact:
        yield "\nfastest of all (staleness and narrower numbers change what is learned: compare the holdout metrics):"
        yield f"\n{_tables(plan.fastest)}"


def _line(candidate: Candidate) -> str:
    order, wire, prediction = candidate.pipeline, candidate.wire, candidate.prediction
    told = f"{prediction.step_s * 1e3:10.2f} {prediction.bubble:7.0%}"
    return f"{told}  {order.micro_batches:13} {order.depth:5} {order.staleness:9}  {wire.dtype}, {wire.compress}"


def _tables(candidate: Candidate) -> str:
    order, wire = candidate.pipeline, candidate.wire
    pipeline = f"micro_batches = {order.micro_batches}\ndepth = {order.depth}\nstaleness = {order.staleness}"
    return f'[pipeline]\n{pipeline}\n\n[wire]\ndtype = "{wire.dtype}"\ncompress = "{wire.compress}"'

"""Choice of the fastest pipeline: every one is played with what its actions cost here; prints what to paste."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from sl_queue.checking.capacity import load_of, objections
from sl_queue.compute.threads import limit_threads
from sl_queue.config.job import Job, JobPipeline, JobWire, PartyFile
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.cut.packing import Wire
from sl_queue.data.aligning import ids_of, shared_rows
from sl_queue.data.table import read_table
from sl_queue.errors import JobError
from sl_queue.local.threads import require_all
from sl_queue.planning.costs import LABEL, Costs
from sl_queue.planning.measuring import HANDLING, Handling, Link, between_commits, costs_of, measure
from sl_queue.planning.simulation import Prediction, simulate
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches

WARM_UP = 6
MICRO_BATCHES = (1, 2, 4, 8)
HANDS = (1, 2, 4, 8)
STALENESS = (1, 2, 4)
WIRES = (Wire(), Wire(compress="bitmap"), Wire("bfloat16"), Wire("float16"), Wire("int8"), Wire("int8", "bitmap"))
_LINK = re.compile(r"(\d+(?:\.\d+)?)(?:,(\d+(?:\.\d+)?))?")
SIMPLER = 1.03  # what comes earlier in the list is preferred unless something later is this much faster


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the job, and what it would come to."""

    pipeline: JobPipeline
    wire: Wire
    prediction: Prediction

    @property
    def exact(self) -> bool:
        """Return True if it gives the weights of joined training."""
        return self.pipeline.staleness == 0 and self.wire.dtype == "float32"


@dataclass(frozen=True, slots=True)
class Plan:
    """Candidates that were found, fastest first."""

    candidates: tuple[Candidate, ...]
    present: Candidate  # what the job says now
    hands: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # seconds a step then, by party and number
    too_much: tuple[str, ...] = ()  # for one broker node

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
    importer = Importer()
    specs = {file.party: resolve(job, file, importer) for file in files}
    shared = shared_rows(ids_of([spec.table for spec in specs.values()])) if job.alignment.method == "psi" else {}
    tables = {party: read_table(spec.table, shared.get(party)) for party, spec in specs.items()}
    measured = measure(job, {party: spec.compute for party, spec in specs.items()}, tables)
    found = []
    for wire in WIRES:
        costs = costs_of(job, measured, wire, link, handling)
        found += [Candidate(order, wire, played(job, costs, order)) for order in _orders(job)]
    costs = costs_of(job, measured, job.on_the_wire, link, handling)
    present = Candidate(job.pipeline, job.on_the_wire, played(job, costs, job.pipeline))
    ranked = tuple(sorted(found, key=lambda candidate: candidate.prediction.step_s))
    plan = Plan(ranked, present, {file.party: _hands(job, costs, file.party) for file in files if file.hands})
    return replace(plan, too_much=tuple(_too_much(job, tables[job.label_holder].n_rows, plan)))


def _too_much(job: Job, rows: int, plan: Plan) -> Iterator[str]:
    """Yield what one broker node cannot carry, of the job as it is and as it could be, at the predicted pace."""
    for name, chosen in {"the job as it is": plan.present, "fastest": plan.fastest, "exact": plan.exact}.items():
        wire = JobWire(dtype=chosen.wire.dtype, compress=chosen.wire.compress)
        changed = job.model_copy(update={"pipeline": chosen.pipeline, "wire": wire})
        load = load_of(changed, changed.batches(rows), {})
        yield from (f"{name}: {each}" for each in objections(load, chosen.prediction.step_s))


def links_named(texts: Sequence[str], job: Job) -> dict[str, Link]:
    """Read NAME=MILLISECONDS or NAME=MILLISECONDS,MBIT, the own links of feature parties. Raises JobError."""
    found: dict[str, Link] = {}
    for text in texts:
        party, sign, numbers = text.partition("=")
        if party not in job.feature_parties:
            raise JobError(
                f"--link {text}: {party!r} is not one of the feature parties {', '.join(job.feature_parties)}"
            )
        match = _LINK.fullmatch(numbers) if sign else None
        if match is None or (match[2] and not float(match[2])):
            raise JobError(
                f"--link {text}: it must be {party}=MILLISECONDS or {party}=MILLISECONDS,MBIT, for instance "
                f"{party}=80 or {party}=80,100"
            )
        found[party] = Link(float(match[1]), float(match[2]) if match[2] else None)
    return found


def _hands(job: Job, costs: Costs, party: str) -> dict[int, float]:
    """Return the seconds that a step takes with so many hands at a party."""
    worker = LABEL if party == job.label_holder else party
    counts = [count for count in HANDS if count <= job.pipeline.micro_batches]
    return {count: played(job, costs, job.pipeline, {worker: count}).step_s for count in counts}


def _orders(job: Job) -> Iterator[JobPipeline]:
    """Return the pipelines worth looking at, simple ones first."""
    every = job.pipeline.checkpoint_every
    for parts in (n for n in MICRO_BATCHES if n <= job.batch_size):
        for depth in sorted({1, 2, parts} if parts > 1 else {1}):
            yield JobPipeline(micro_batches=parts, depth=depth, staleness=0, checkpoint_every=every)
    for staleness in STALENESS:
        for parts in (n for n in MICRO_BATCHES[:3] if n <= job.batch_size):
            depth = parts * (staleness + 1)
            yield JobPipeline(micro_batches=parts, depth=depth, staleness=staleness, checkpoint_every=every)


def _simplest(candidates: Sequence[Candidate]) -> Candidate:
    """Choose of those that are about as fast as the fastest the one that asks for least."""
    limit = min(c.prediction.step_s for c in candidates) * SIMPLER

    def asks(candidate: Candidate) -> tuple[int, int, int, int]:
        order, wire = candidate.pipeline, candidate.wire
        return order.staleness, WIRES.index(wire), order.micro_batches, order.depth

    return min((c for c in candidates if c.prediction.step_s <= limit), key=asks)


def played(job: Job, costs: Costs, order: JobPipeline, hands: Mapping[str, int] = MappingProxyType({})) -> Prediction:
    """Return what that pipeline would come to, with so many hands at a worker."""
    every = between_commits(order)
    steps = every + max(every, 2 * WARM_UP)
    batches = Batches(job.batch_size * steps, job.seed, 1, job.batch_size, order.micro_batches)
    pipeline = Pipeline(batches, order.depth, order.staleness, every)
    return simulate(pipeline, costs, min(WARM_UP, every), hands)


# What is printed ------------------------------------------------------------------------------------------------


def lines(plan: Plan, shown: int = 12) -> Iterator[str]:
    """Write the ranking, and the tables to paste."""
    yield f"{'ms a step':>10} {'bubble':>7}  {'micro_batches':>13} {'depth':>5} {'staleness':>9}  wire"
    rows = [*plan.candidates[:shown], *([plan.exact] if plan.exact not in plan.candidates[:shown] else [])]
    for candidate in rows:
        yield _line(candidate)
    yield f"{_line(plan.present)}   (the job as it is)"
    for party, found in plan.hands.items():
        each = ", ".join(f"{count}: {seconds * 1e3:.2f}" for count, seconds in found.items())
        yield f"with hands at {party}, ms a step by their number, without what they and it exchange: {each}"
    yield from (f"one broker node is too small for {each}" for each in plan.too_much)
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

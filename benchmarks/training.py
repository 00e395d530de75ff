"""Whole training runs side by side: all variants of a workload take turns, so that a busy minute hits them all."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import by_hand, c_client, joined, split
from benchmarks.link import Speed, slowed
from benchmarks.measure import Measurement, Summary, Trace, measured
from benchmarks.processes import together
from benchmarks.workloads import LABEL, WORKLOADS, Workload
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.transport.rabbitmq.names import QueueType

TIMEOUT_S = 240.0
_numbers = count()


@dataclass(frozen=True, slots=True)
class Order:
    """The two integers of a pipeline, and its name in the field."""

    name: str
    micro_batches: int
    depth: int
    staleness: int = 0

    @property
    def table(self) -> dict[str, int]:
        return {"micro_batches": self.micro_batches, "depth": self.depth, "staleness": self.staleness}


LOCK_STEP = Order("lock-step", 1, 1)
GPIPE = Order("gpipe 4", 4, 4)
ONE_F_ONE_B = Order("1f1b 2 of 4", 4, 2)
RUN_AHEAD = Order("run ahead 1", 1, 2, 1)
RUN_AHEAD_2 = Order("run ahead 2", 1, 3, 2)
FLOAT16 = {"wire": {"dtype": "float16"}}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train a workload."""

    how: str  # joined, gloo, c, memory, rabbitmq
    order: Order = LOCK_STEP
    threads: int = 1
    queue_type: QueueType = "classic"
    speed: Speed | None = None
    tables: Mapping[str, Any] = field(default_factory=dict, hash=False)  # of the job, besides the pipeline
    steps: int | None = None  # about how many to train, if not the epochs of the comparison

    def __str__(self) -> str:
        match self.how:
            case "joined":
                return f"joined, {self.threads} thread{'s' * (self.threads > 1)}"
            case "gloo":
                return "gloo by hand"
            case "c":
                return f"C client by hand, {self.order.name}"
            case "memory":
                return f"memory, {self.order.name}"
            case _:
                link = "" if self.speed is None else f", {self.speed}"
                wire = ", ".join(str(value) for value in dict(self.tables.get("wire", {})).values())
                return f"RabbitMQ {self.queue_type}, {self.order.name}{link}{', ' * bool(wire)}{wire}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A workload and the ways to train it."""

    workload: Workload
    variants: tuple[Variant, ...]
    epochs: int
    repeats: int = 1


def run(comparison: Comparison, private: PrivateBroker) -> dict[Variant, Summary]:
    """Every variant so many times, in turns."""
    repeats = comparison.repeats
    found: dict[Variant, list[Measurement]] = {variant: [] for variant in comparison.variants}
    for repeat in range(repeats):
        for variant in comparison.variants:
            measurement = _one(comparison, variant, private)
            found[variant].append(measurement)
            print(
                f"{comparison.workload.name} {repeat + 1}/{repeats}: {variant}: {measurement.step_ms:.2f} ms a step",
                flush=True,
            )
    return {variant: Summary(tuple(runs)) for variant, runs in found.items()}


def _one(comparison: Comparison, variant: Variant, private: PrivateBroker) -> Measurement:
    workload, epochs = comparison.workload, comparison.epochs
    if variant.steps is not None:
        workload, epochs = _shortened(workload, variant.steps)
    traces: list[Trace]
    match variant.how:
        case "joined":
            work = (joined.train, (workload, epochs, variant.threads))
            traces = together({"joined": work}, TIMEOUT_S)["joined"]
        case "gloo":
            traces = by_hand.over_sockets(workload, epochs, TIMEOUT_S)
        case "c":
            traces = _by_hand_over_broker(workload, epochs, variant.order, private)
        case "memory":
            traces = split.over_memory(_plan(workload, epochs, variant), TIMEOUT_S)
        case _:
            traces = _over_rabbitmq(_plan(workload, epochs, variant), variant.speed, private)
    leader = "joined" if variant.how == "joined" else LABEL
    return measured(traces, leader, workload.batch, one_process=variant.how == "memory")


def _plan(workload: Workload, epochs: int, variant: Variant) -> split.Plan:
    return split.Plan(workload, epochs, {"pipeline": variant.order.table, **variant.tables}, variant.queue_type)


def _shortened(workload: Workload, steps: int) -> tuple[Workload, int]:
    """About that many steps of a workload: fewer rows, or more epochs."""
    if workload.real or workload.rows < steps * workload.batch:
        return workload, -(-steps // workload.steps(1))
    return replace(workload, rows=steps * workload.batch), 1


def _over_rabbitmq(plan: split.Plan, speed: Speed | None, private: PrivateBroker) -> list[Trace]:
    """Train with the broker beside the label holder; feature parties reach it over a link of that speed."""
    vhost = f"bench{next(_numbers)}"
    url = private.url(vhost)
    urls = dict.fromkeys((LABEL, SCHEDULER), url)
    with ExitStack() as stack:
        stack.callback(private.delete_vhost, vhost)
        for party in plan.workload.feature_parties:
            urls[party] = url if speed is None else stack.enter_context(slowed(url, speed))
        return split.over_rabbitmq(plan, urls, TIMEOUT_S)


def _by_hand_over_broker(workload: Workload, epochs: int, order: Order, private: PrivateBroker) -> list[Trace]:
    vhost = f"bench{next(_numbers)}"
    with TemporaryDirectory(prefix="sl_queue-bench-") as folder, ExitStack() as stack:
        library = c_client.compiled(Path(folder), shared=True)
        if library is None:
            raise RuntimeError("a C compiler and librabbitmq-dev are needed for this")
        stack.callback(private.delete_vhost, vhost)
        how = by_hand.Schedule(order.micro_batches, order.staleness)
        return by_hand.over_broker(workload, epochs, how, private.url(vhost), library, TIMEOUT_S)


# The comparisons ------------------------------------------------------------------------------------------------


def side_by_side(quick: bool) -> list[Comparison]:
    """W1, W2 and the small job against the alternatives, on this machine's own speed."""
    by_hand_ahead = Variant("c", RUN_AHEAD_2)  # W2 has layers whose backward pass wants the weights of before
    variants = (
        Variant("joined"),
        Variant("joined", threads=2),
        Variant("gloo"),
        *((Variant("c"), Variant("c", GPIPE), by_hand_ahead) if c_client.is_here() else ()),
        Variant("memory", GPIPE),
        *(Variant("rabbitmq", order) for order in (LOCK_STEP, GPIPE, ONE_F_ONE_B, RUN_AHEAD, RUN_AHEAD_2)),
        Variant("rabbitmq", RUN_AHEAD_2, tables=FLOAT16),
        Variant("rabbitmq", GPIPE, queue_type="quorum"),
    )
    w1, w2, small = (WORKLOADS[name] for name in ("W1", "W2", "small"))
    w2 = replace(w2, rows=w2.batch * 6)  # a whole epoch would take as long as everything else
    workloads = [replace(w, rows=w.batch * 12) for w in (w1, w2, small)] if quick else [w1, w2, small]
    of_w2 = tuple(variant for variant in variants if variant != by_hand_ahead)
    chosen = [(w, of_w2 if w.name == "W2" else variants) for w in workloads]
    return [Comparison(workload, of_it, 1, repeats=1 if quick else 2) for workload, of_it in chosen]


def over_links(quick: bool) -> list[Comparison]:
    """Compare the small job over links with a delay, W1 over narrow ones."""
    small, w1 = WORKLOADS["small"], WORKLOADS["W1"]
    delays = (20.0,) if quick else (5.0, 20.0, 50.0)
    delayed = tuple(
        Variant("rabbitmq", order, speed=Speed(rtt_ms), steps=20 if quick else 70)
        for rtt_ms in delays
        for order in (LOCK_STEP, GPIPE, RUN_AHEAD_2)
    )
    narrow = tuple(
        Variant("rabbitmq", order, speed=Speed(20.0, mbit_s), steps=6 if quick else 12)
        for mbit_s in ((100.0,) if quick else (100.0, 20.0))
        for order in (LOCK_STEP, GPIPE, RUN_AHEAD_2)
    )
    return [Comparison(small, delayed, 1), Comparison(w1, narrow, 1)]

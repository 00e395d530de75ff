"""Links whose delays differ by party: the planner's simulation, fed with the law, beside what is measured."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count

from benchmarks.link import Speed, slowed
from benchmarks.scale_law import Law
from benchmarks.scale_runs import Case, measure
from benchmarks.training import GPIPE, LOCK_STEP, RUN_AHEAD_2, Order
from sl_queue.planning.costs import Affine, Costs, FeatureCosts, Way
from sl_queue.planning.simulation import simulate
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.testing.private_broker import PrivateBroker

ORDERS = (LOCK_STEP, GPIPE, RUN_AHEAD_2)
DELAYS_MS = (5.0, 10.0, 20.0, 40.0)  # of the parties that are measured, there and back
WARM_UP, PLAYED, PLAYED_MANY = 3, 24, 10  # steps of a simulation
_numbers = count()


@dataclass(frozen=True, slots=True)
class Laws:
    """Laws of a step's processor seconds."""

    broker: Law  # by messages, bytes and seconds of connections
    label: Law  # by messages, bytes and steps
    features: Law  # by the messages and bytes of all parties

    def costs(self, parties: Sequence[str], size: Affine, compute_s: float, cores: int | None) -> Costs:
        """Return what the simulation has to know; messages of `size` by rows, `compute_s` a pass of a whole batch."""
        driver = Affine(self.label.each["messages"], self.label.each["bytes"])
        own = max(0.0, self.features.each["messages"] - driver.fixed)  # beyond what the driver's line has
        pass_s = Affine(own + compute_s)
        each = FeatureCosts(pass_s, pass_s, 0.0, size, size)
        return Costs(
            dict.fromkeys(parties, each),
            fuse=Affine(0.0),
            fuse_update_s=self.label.each["steps"],
            commit_s=0.0,
            fuse_prepare=Affine(),
            handling=Affine(self.broker.each["messages"], self.broker.each["bytes"]),
            driver=driver,
            cores=cores,
        )


def played(order: Order, costs: Costs, batch: int, steps: int = PLAYED) -> float:
    """Return the simulated seconds of a step."""
    batches = Batches(batch * steps, 7, 1, batch, order.micro_batches)
    return simulate(Pipeline(batches, order.depth, order.staleness, steps), costs, WARM_UP).step_s


def with_delays(costs: Costs, delays_ms: Mapping[str, float]) -> Costs:
    """Return costs with a link of its own for each party."""
    return replace(costs, ways={party: Way(delay / 1e3) for party, delay in delays_ms.items()})


@dataclass(frozen=True, slots=True)
class Delayed:
    """A step over links with these delays, simulated and measured, in seconds."""

    order: str
    simulated: float
    measured: float


def compare(
    private: PrivateBroker, laws: Laws, cores: int, steps: int, orders: Sequence[Order] = ORDERS
) -> Iterator[Delayed]:
    """Measure as many parties as there are delays, and simulate them."""
    for order in orders:
        case = Case(len(DELAYS_MS), 64, steps, 64, order.micro_batches, order.depth, order.staleness)
        delays = dict(zip(case.names, DELAYS_MS, strict=True))
        with ExitStack() as stack:
            vhost = f"delays{next(_numbers)}"
            url = private.url(vhost)
            stack.callback(private.delete_vhost, vhost)
            urls = {name: stack.enter_context(slowed(url, Speed(delay))) for name, delay in delays.items()}
            found = measure(private, replace(case, urls=urls), vhost)
        size = Affine(found.bytes / case.messages - 4.0 * case.cut * case.batch / case.micro_batches, 4.0 * case.cut)
        costs = with_delays(laws.costs(case.names, size, 0.0, cores), delays)
        yield Delayed(order.name, played(order, costs, case.batch), found.step_s)


def of_many(laws: Laws, parties: int, batch: int, cut: int, compute_s: float) -> Iterator[tuple[str, list[float]]]:
    """Simulate that many parties, each with cores of its own, over links of equal and of different delays."""
    names = tuple(f"party{number}" for number in range(parties))
    costs = laws.costs(names, Affine(200.0, 4.0 * cut), compute_s, None)
    ladder = {name: 5.0 + 75.0 * number / (parties - 1) for number, name in enumerate(names)}
    ways = {
        "none": {},
        "20 ms for all": dict.fromkeys(names, 20.0),
        "5 to 80 ms, evenly": ladder,
        "20 ms, and one party 200 ms": {**dict.fromkeys(names, 20.0), names[-1]: 200.0},
    }
    for name, delays in ways.items():
        yield name, [played(order, with_delays(costs, delays), batch, PLAYED_MANY) for order in ORDERS]

"""Goals that the measurements are held against."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.measure import Summary
from benchmarks.training import GPIPE, LOCK_STEP, ONE_F_ONE_B, RUN_AHEAD_2, Comparison, Variant

Found = Sequence[tuple[Comparison, Mapping[Variant, Summary]]]


def line(what: str, got: float, wanted: float, *, at_least: bool = False, unit: str = "") -> str:
    """One goal: met, or missed by how much."""
    met = got >= wanted if at_least else got <= wanted
    by = f"{abs(got / wanted - 1):.0%}" if wanted else f"{got:g}"
    verdict = "met" if met else f"missed by {by}"
    return f"- {what}: {got:.2f}{unit}, wanted at {'least' if at_least else 'most'} {wanted:g}{unit}: **{verdict}**"


def listed(lines: Iterator[str]) -> str:
    return "### Goals\n\n" + "\n".join(lines) + "\n"


def _fastest(summaries: Mapping[Variant, Summary], wanted: Callable[[Variant], bool]) -> float:
    """Milliseconds a step."""
    return min(s.middle(lambda run: run.step_ms) for v, s in summaries.items() if wanted(v))


def training(found: Found) -> Iterator[str]:
    """Side by side on one machine, over classic queues, with the numbers that the models compute with."""

    def ours(variant: Variant) -> bool:
        return variant.how == "rabbitmq" and variant.queue_type == "classic" and not variant.tables

    for comparison, summaries in found:
        took = _fastest(summaries, ours)
        if comparison.workload.name == "small":
            yield line("small job over RabbitMQ, fastest pipeline", took, 6.0, unit=" ms a step")
            continue
        ratio = _fastest(summaries, lambda v: v == Variant("joined")) / took
        wanted = 0.6 if comparison.workload.name == "W1" else 1.2
        what = f"{comparison.workload.name} over RabbitMQ to joined on one thread, fastest pipeline"
        yield line(what, ratio, wanted, at_least=True)


def links(found: Found) -> Iterator[str]:
    """Judge the small job over links with a delay."""
    small = next(summaries for comparison, summaries in found if comparison.workload.name == "small")
    for rtt_ms, exact_ms, ahead_ms in ((20.0, 26.0, 10.0), (50.0, 56.0, 20.0)):
        over = {v: s for v, s in small.items() if v.speed is not None and v.speed.rtt_ms == rtt_ms}
        if over:
            exact = _fastest(over, lambda v: v.order in (LOCK_STEP, GPIPE, ONE_F_ONE_B))
            yield line(f"{rtt_ms:g} ms round trip, fastest synchronous pipeline", exact, exact_ms, unit=" ms a step")
            ahead = _fastest(over, lambda v: v.order == RUN_AHEAD_2)
            yield line(f"{rtt_ms:g} ms round trip, staleness 2", ahead, ahead_ms, unit=" ms a step")

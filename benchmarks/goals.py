"""Goals that the measurements are held against."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.measure import Summary
from benchmarks.training import FLOAT16, GPIPE, LOCK_STEP, ONE_F_ONE_B, RUN_AHEAD_2, Comparison, Variant

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
    """Side by side on one machine, over classic queues."""
    for comparison, summaries in found:
        name = comparison.workload.name

        def took(variant: Variant, of: Mapping[Variant, Summary] = summaries) -> float:
            return of[variant].middle(lambda run: run.step_ms)

        joined, lock_step, ahead = Variant("joined"), Variant("rabbitmq"), Variant("rabbitmq", RUN_AHEAD_2)
        narrow = Variant("rabbitmq", RUN_AHEAD_2, tables=FLOAT16)
        if name == "W1":
            yield line("W1 in lock-step, speed to gloo", took(Variant("gloo")) / took(lock_step), 0.6, at_least=True)
            yield line("W1 two ahead, speed to joined", took(joined) / took(ahead), 0.55, at_least=True)
            yield line("W1 two ahead with float16, to joined", took(joined) / took(narrow), 0.65, at_least=True)
            yield line("W1 two ahead, float16 to float32", took(ahead) / took(narrow), 1.25, at_least=True)
        elif name == "W2":
            fastest = _fastest(summaries, _is_exact)
            yield line("W2, fastest pipeline, speed to joined", took(joined) / fastest, 1.4, at_least=True)
        else:
            yield line("small job in lock-step", took(lock_step), 2.0, unit=" ms a step")
            yield line("small job two ahead", took(ahead), 1.7, unit=" ms a step")
            parts = took(Variant("rabbitmq", GPIPE)) / took(lock_step)
            yield line("small job, gpipe 4 to lock-step", parts, max(1.35, _parts_by_hand(summaries)))


def _parts_by_hand(summaries: Mapping[Variant, Summary]) -> float:
    """Return gpipe 4 to lock-step by hand over the C client: what torch takes for four times a quarter of the rows."""
    if Variant("c", GPIPE) not in summaries:
        return 0.0
    parts, whole = (summaries[Variant("c", order)].middle(lambda run: run.step_ms) for order in (GPIPE, LOCK_STEP))
    return parts / whole


def _is_exact(variant: Variant) -> bool:
    """Tell whether a variant goes over classic queues with the numbers that the models compute with."""
    return variant.how == "rabbitmq" and variant.queue_type == "classic" and not variant.tables


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

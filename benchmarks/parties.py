"""Effect of many parties on the label holder, and of a slow party on the others.

All models sleep, so that the cores do not decide it.
"""

from benchmarks import goals
from benchmarks.measure import Measurement
from benchmarks.report import table
from benchmarks.training import GPIPE, LOCK_STEP, ONE_F_ONE_B, RUN_AHEAD, Comparison, Variant, run
from benchmarks.workloads import Workload
from sl_queue.testing.private_broker import PrivateBroker

COUNTS = (2, 4, 8, 16)
SLEEP_S = 0.06
SHORT_S = 0.01  # beside a party that is five times slower
BATCH = 64


def workload(parties: int, steps: int) -> Workload:
    """So many feature parties of equal size."""
    columns = {f"party{number}": 8 for number in range(parties)}
    return Workload(f"{parties} parties", BATCH * steps, columns, (16,), (16,), BATCH, sleep_s=SLEEP_S)


def compare(private: PrivateBroker, quick: bool) -> list[str]:
    """Both tables."""
    return [_many(private, quick), _one_slow(private, quick)]


def _many(private: PrivateBroker, quick: bool) -> str:
    """Step times and the label holder's waiting, by the number of parties."""
    variant = Variant("rabbitmq", LOCK_STEP)
    steps = 12 if quick else 20
    found: dict[int, Measurement] = {}
    for count in COUNTS:
        found[count] = run(Comparison(workload(count, steps), (variant,), 1), private)[variant].runs[0]
    first = found[COUNTS[0]].step_ms
    rows = []
    for count, measured in found.items():
        cells = (f"{measured.step_ms:.1f}", f"{measured.step_ms / first - 1:+.0%}", f"{measured.cpu:.2f}")
        rows.append((count, *cells))
    slept = f"Every feature party sleeps {SLEEP_S * 1e3:.0f} ms forwards and {SLEEP_S * 1e3:.0f} ms backwards.\n\n"
    goal = goals.line("16 parties to 2, time a step", found[COUNTS[-1]].step_ms / first, 1.3)
    head = ("feature parties", "ms a step", "to two parties", "cores, all parties")
    return f"{slept}{table(head, rows)}\n{goal}\n"


def _one_slow(private: PrivateBroker, quick: bool) -> str:
    """Measure how busy the slowest party is: all that a pipeline can do is to let it never wait."""
    columns = {"slow": 8, "fast": 8}
    orders = (LOCK_STEP, GPIPE, ONE_F_ONE_B, RUN_AHEAD)
    steps = 12 if quick else 20
    whole = Workload("one slow", BATCH * steps, columns, (16,), (16,), BATCH, sleep_s=SHORT_S, slow="slow")
    comparison = Comparison(whole, tuple(Variant("rabbitmq", order) for order in orders), 1)
    rows, shares = [], []
    for variant, summary in run(comparison, private).items():
        busy = summary.middle(lambda run: 1 - run.waiting["slow"])
        shares.append(busy)
        rows.append((variant.order.name, f"{summary.middle(lambda run: run.step_ms):.1f}", f"{busy:.1%}"))
    slept = (
        f"One party sleeps {5 * SHORT_S * 1e3:.0f} ms forwards and backwards for each micro-batch, another a fifth.\n\n"
    )
    goal = goals.line("the slow party is busy, best pipeline", max(shares), 0.95, at_least=True)
    return f"{slept}{table(('pipeline', 'ms a step', 'the slow party is busy'), rows)}\n{goal}\n"

"""Does a label holder slow down with many parties? Each one's model sleeps, so that the cores do not decide it."""

from statistics import median

from benchmarks.measure import Measurement
from benchmarks.report import table
from benchmarks.training import LOCK_STEP, Comparison, Variant, run
from benchmarks.workloads import Workload
from sl_queue.local.private_broker import PrivateBroker

COUNTS = (2, 4, 8, 16)
SLEEP_S = 0.06
BATCH = 64


def workload(parties: int, steps: int) -> Workload:
    """So many feature parties of equal size."""
    columns = {f"party{number}": 8 for number in range(parties)}
    return Workload(f"{parties} parties", BATCH * steps, columns, (16,), (16,), BATCH, sleep_s=SLEEP_S)


def compare(private: PrivateBroker, quick: bool) -> str:
    """Step times and the label holder's waiting, by the number of parties."""
    variant = Variant("rabbitmq", LOCK_STEP)
    steps = 12 if quick else 40
    found: dict[int, list[Measurement]] = {count: [] for count in COUNTS}
    for _ in range(1 if quick else 2):
        for count in COUNTS:
            summaries = run(Comparison(workload(count, steps), (variant,), 1), 1, private)
            found[count] += summaries[variant].runs
    first = median(run.step_ms for run in found[COUNTS[0]])
    rows = []
    for count, runs in found.items():
        step_ms = median(run.step_ms for run in runs)
        rows.append((count, f"{step_ms:.1f}", f"{step_ms / first - 1:+.0%}", f"{median(r.cpu for r in runs):.2f}"))
    slept = f"Every feature party sleeps {SLEEP_S * 1e3:.0f} ms forwards and {SLEEP_S * 1e3:.0f} ms backwards.\n\n"
    return slept + table(("feature parties", "ms a step", "to two parties", "cores, all parties"), rows)

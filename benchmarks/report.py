"""Tables and plots in benchmarks/results, each with the machine and the moment it was measured on."""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks.measure import Summary
from benchmarks.processes import cores
from benchmarks.training import Comparison, Variant

RESULTS = Path(__file__).parent / "results"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def machine() -> str:
    """Describe the machine that was measured on."""
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "unknown CPU")
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    moment = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; load over the last five minutes {os.getloadavg()[1]:.1f}"
    return f"{cores()} cores ({model}), {system}, {moment}."


def training(
    comparison: Comparison,
    found: Mapping[Variant, Summary],
    ideal: Mapping[Variant, float],
    yardstick: Variant | None,
) -> str:
    """One workload: medians, ranges, and the ratio to the yardstick's samples a second; `ideal` bubbles."""
    base = None if yardstick is None else found[yardstick].middle(lambda run: run.samples_per_s)
    steps = comparison.workload.steps(1)
    rows = [(variant, *_cells(summary, base, steps, ideal.get(variant))) for variant, summary in found.items()]
    head = (
        "", "ms a step (range)", "samples/s", "to joined-1", "cores", "waiting, s an epoch", "in commits", "KB a step",
        "bubble", "ideal",
    )  # fmt: skip
    return f"### {comparison.workload.name}, {comparison.workload.rows:,} rows\n\n{table(head, rows)}"


def _cells(summary: Summary, base: float | None, steps: int, ideal: float | None) -> list[str]:
    """Format a line of the table after the name; waiting is for an epoch of so many steps."""
    low, high = summary.range(lambda run: run.step_ms)
    speed = summary.middle(lambda run: run.samples_per_s)
    cells = [
        f"{summary.middle(lambda run: run.step_ms):.2f} ({low:.2f} to {high:.2f})",
        f"{speed:,.0f}",
        "" if base is None else f"{speed / base:.2f}",
        f"{summary.middle(lambda run: run.cpu):.2f}",
    ]
    if ideal is None:
        return [*cells, "", "", "", "", ""]
    waiting = (
        f"{party} {median(run.waiting[party] * run.step_ms * steps / 1e3 for run in summary.runs):.2f}"
        for party in summary.runs[0].waiting
    )
    sent = summary.middle(lambda run: run.wire_bytes) / 1e3
    commits, bubble = summary.middle(lambda run: run.committing), summary.middle(lambda run: run.bubble)
    return [*cells, ", ".join(waiting), f"{commits:.1%}", f"{sent:,.1f}", f"{bubble:.0%}", f"{ideal:.0%}"]


def plot(path: Path, found: Sequence[tuple[Comparison, Mapping[Variant, Summary]]]) -> None:
    """Bars of the median time a step with the range, one panel a workload."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(6 * len(found), 5), squeeze=False, layout="constrained")
    for panel, (comparison, summaries) in zip(panels[0], found, strict=True):
        names = [str(variant) for variant in summaries]
        middles = [summary.middle(lambda run: run.step_ms) for summary in summaries.values()]
        ranges = [summary.range(lambda run: run.step_ms) for summary in summaries.values()]
        errors = [
            [middle - low for middle, (low, _) in zip(middles, ranges, strict=True)],
            [high - middle for middle, (_, high) in zip(middles, ranges, strict=True)],
        ]
        panel.barh(names[::-1], middles[::-1], xerr=[side[::-1] for side in errors], capsize=3)
        panel.set_title(comparison.workload.name)
        panel.set_xlabel("ms a step (median, range)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write the results file of a benchmark."""
    path.write_text("\n".join([f"# {title}\n", machine() + "\n", *parts]))
    print(path)

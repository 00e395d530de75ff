"""Report of `sl-queue chaos`: what went wrong, what it cost, and whether a bit differs."""

from collections import Counter
from collections.abc import Iterable, Iterator
from statistics import mean, median

from rich.console import Group
from rich.table import Table

from sl_queue.protocol.messages import SCHEDULER
from sl_queue.testing.chaos import Comparison, Run


def report(comparison: Comparison) -> Group:
    """Render the numbers, the digests and the verdict."""
    return Group(
        "", _summary(comparison), "", _losses(comparison), "", _weights(comparison), "", _last_word(comparison)
    )


def _summary(comparison: Comparison) -> Table:
    table = Table("", "in peace", "under faults", box=None)
    peace, faults = comparison.peace, comparison.faults
    table.add_row("seconds", f"{peace.seconds:.1f}", f"{faults.seconds:.1f}")
    table.add_row("faults injected", "0", f"{len(faults.injected)} of {len(comparison.planned)}")
    for what, name in (
        ("messages applied", "applied"),
        ("messages delivered again", "redelivered"),
        ("duplicates dropped", "duplicates"),
        ("messages rejected", "rejected"),
    ):
        table.add_row(what, str(peace.run_log.count(name)), str(faults.run_log.count(name)))
    table.add_row("messages sent again on request", str(peace.run_log.resent), str(faults.run_log.resent))
    for role in comparison.roles:
        if role != SCHEDULER:
            table.add_row(
                f"steps done again by {role}", _again(comparison.peace, role), _again(comparison.faults, role)
            )
    for text, times in _restarts(comparison):
        table.add_row(text, "", f"median {median(times):.1f} s, at most {max(times):.1f} s" if times else "")
    return table


def _again(run: Run, role: str) -> str:
    after_kills, without = run.run_log.recomputed(role)
    if not after_kills and not without:
        return "0"
    return f"{sum(after_kills) + without} (at most {max(after_kills, default=0)} a restart, {without} without)"


def _restarts(comparison: Comparison) -> Iterator[tuple[str, list[float]]]:
    parties = [role for role in comparison.roles if role != SCHEDULER]
    again = [process for role in parties for process in comparison.faults.run_log.processes(role)[1:]]
    loading = [process.loaded_s - process.started_s for process in again if process.loaded_s is not None]
    yield "restart to libraries loaded", loading
    yield "from there to the next step", [p.to_next_step_s for p in again if p.to_next_step_s is not None]


def _losses(comparison: Comparison) -> Table:
    """Return the seconds that each kind of fault cost."""
    parties = [role for role in comparison.roles if role != SCHEDULER]
    stalls: dict[str, list[float]] = {}
    for injected in comparison.faults.injected:
        stalled_s = comparison.faults.run_log.stalled_s(parties, injected.at_s)
        stalls.setdefault(str(injected.fault), []).append(stalled_s)
    table = Table("seconds until every party went on", "times", "mean", "longest", box=None)
    for fault, seconds in sorted(stalls.items()):
        table.add_row(fault, str(len(seconds)), f"{mean(seconds):.1f}", f"{max(seconds):.1f}")
    lost_s = comparison.faults.seconds - comparison.peace.seconds
    count = len(comparison.faults.injected)
    table.add_row("longer than in peace, per fault", str(count), f"{lost_s / count:.1f}" if count else "", "")
    return table


def _weights(comparison: Comparison) -> str:
    peace, faults = comparison.peace.weights, comparison.faults.weights
    lines = ["SHA-256 of the final weights"]
    for name in sorted({*peace, *faults}):
        one, other = peace.get(name, "missing"), faults.get(name, "missing")
        said = "equal" if one == other else "DIFFERENT"
        lines += [f"  {name}: {said}", f"    in peace      {one}", f"    under faults  {other}"]
    return "\n".join(lines)


def _last_word(comparison: Comparison) -> str:
    for name, run in (("in peace", comparison.peace), ("under faults", comparison.faults)):
        if run.failure is not None:
            return f"failed: the run {name} ended because of {run.failure.worker}: {run.failure.reason}"
    left = len(comparison.planned) - len(comparison.faults.injected)
    if left:
        return f"failed: the run ended before {left} of the faults came; a longer job leaves room for them"
    if not comparison.passed:
        what = "histories" if comparison.peace.weights == comparison.faults.weights else "weights"
        return f"failed: the {what} differ"
    return f"passed: {_listed(injected.fault.kind for injected in comparison.faults.injected)}, and not one bit differs"


def _listed(kinds: Iterable[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in Counter(kinds).items()) or "no fault"

"""Every hop of a lock-step step, over all processes: median time, and how much of it somebody computed."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from benchmarks.hops import WAY, Hop, Noted, NotingLink, last_to_arrive, way_of
from benchmarks.measure import WARM_UP
from benchmarks.processes import background
from benchmarks.report import table
from benchmarks.split import Plan, serve_watched, watched
from benchmarks.training import LOCK_STEP
from benchmarks.workloads import LABEL, WORKLOADS, Workload
from sl_queue.launch.connect import topology
from sl_queue.launch.workplace import Workplace
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.transport.link import Link
from sl_queue.transport.rabbitmq.link import RabbitLink

STEPS, QUICK = 600, 40
WIDTH = 960  # of the picture
_numbers = count()


@dataclass(frozen=True, slots=True)
class Traced:
    """The median hops of a workload, and the median time of a step."""

    workload: Workload
    beside: str
    hops: Sequence[Hop]
    step_ms: float
    steps: int

    def __str__(self) -> str:
        return f"{self.workload.name}{self.beside}"


def compare(private: PrivateBroker, quick: bool, folder: Path) -> list[str]:
    """Trace W1 and the small job, alone and beside a process that computes without end."""
    found = []
    for name in ("small", "W1"):
        for beside in ("", ", beside a busy process"):
            with ExitStack() as stack:
                if beside:
                    stack.enter_context(background(_busy))
                found.append(_traced(WORKLOADS[name], beside, private, QUICK if quick else STEPS))
    (folder / "trace.svg").write_text(_picture(found))
    return [*map(_table, found), "![hops of a step; pale: its thread waited](trace.svg)\n"]


def _busy(ready: Connection) -> None:
    ready.send(None)
    while True:
        pass


def _traced(workload: Workload, beside: str, private: PrivateBroker, steps: int) -> Traced:
    workload = replace(workload, rows=workload.batch * steps)
    plan = Plan(workload, 1, {"pipeline": LOCK_STEP.table})
    return _medians(workload, beside, watched(private, plan, f"trace{next(_numbers)}", _worker), steps)


def _worker(plan: Plan, role: str, url: str, state: Path) -> Noted | None:
    noted = Noted(role, 4 * plan.workload.batch * plan.workload.cut)

    def connect(party: str, prefetch: int, **_: bool) -> Link:
        return NotingLink(RabbitLink(url, party, topology(plan.job, url), prefetch), noted)

    is_party = serve_watched(plan, role, Workplace(connect, state, observe=noted), noted.guards)
    return noted if is_party else None


def _medians(workload: Workload, beside: str, noted: Mapping[str, Noted], steps: int) -> Traced:
    """Follow each step after the warm-up over the party that the label holder waited for."""
    label, features = noted[LABEL], [noted[party] for party in workload.feature_parties]
    ways = []
    for step in range(max(1, int(steps * WARM_UP)), steps):
        last = last_to_arrive(step, features, label)
        way = None if last is None else way_of(step, last, label)
        if way is not None:
            ways.append(way)
    hops = [
        Hop(hop[0].name, hop[0].who, int(median(h.wall_ns for h in hop)), int(median(h.cpu_ns for h in hop)))
        for hop in zip(*ways, strict=True)
    ]
    return Traced(workload, beside, hops, median(sum(hop.wall_ns for hop in way) for way in ways) / 1e6, len(ways))


def _table(traced: Traced) -> str:
    rows = [
        (hop.name, hop.who, f"{hop.wall_ns / 1e6:.3f}", f"{hop.cpu_ns / 1e6:.3f}", f"{_waited_ns(hop) / 1e6:.3f}")
        for hop in traced.hops
    ]
    sums = (sum(hop.wall_ns for hop in traced.hops), sum(hop.cpu_ns for hop in traced.hops))
    rows.append(("all hops", "", f"{sums[0] / 1e6:.3f}", f"{sums[1] / 1e6:.3f}", f"{(sums[0] - sums[1]) / 1e6:.3f}"))
    head = ("hop", "whose", "ms", "computed by its thread", "waited")
    said = f"Medians over {traced.steps} steps in lock-step; the median of their sums is {traced.step_ms:.2f} ms.\n"
    return f"### {traced}\n\n{said}\n{table(head, rows)}"


def _waited_ns(hop: Hop) -> int:
    return max(0, hop.wall_ns - hop.cpu_ns)


def _picture(found: Sequence[Traced]) -> str:
    """Draw the hops of each trace one after the other as SVG; what was waited is pale."""
    scale = WIDTH / max(hop_sum(traced.hops) for traced in found)
    names = list(dict.fromkeys(f"{name}, {who}" for name, _, who, _ in WAY[1:]))
    colours = {name: f"hsl({360 * number // len(names)},60%,50%)" for number, name in enumerate(names)}
    shapes = []
    for row, traced in enumerate(found):
        y, x = 40 * row, 0.0
        shapes.append(f'<text x="0" y="{y + 12}">{traced}, {hop_sum(traced.hops) / 1e6:.2f} ms</text>')
        for hop in traced.hops:
            for length_ns, opacity in ((hop.wall_ns - _waited_ns(hop), 1.0), (_waited_ns(hop), 0.35)):
                style = f'fill="{colours[f"{hop.name}, {hop.who}"]}" opacity="{opacity}"'
                shapes.append(f'<rect x="{x:.1f}" y="{y + 16}" width="{length_ns * scale:.1f}" height="16" {style}/>')
                x += length_ns * scale
    top = 40 * len(found) + 10
    for number, (name, colour) in enumerate(colours.items()):
        x, y = number % 3 * WIDTH / 3, top + 18 * (number // 3)
        shapes.append(f'<rect x="{x:.0f}" y="{y}" width="12" height="12" fill="{colour}"/>')
        shapes.append(f'<text x="{x + 16:.0f}" y="{y + 10}">{name}</text>')
    size = f'width="{WIDTH}" height="{top + 18 * (len(colours) // 3 + 1)}"'
    body = "\n".join(shapes)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'


def hop_sum(hops: Sequence[Hop]) -> int:
    """Return the wall time of all hops, in nanoseconds."""
    return sum(hop.wall_ns for hop in hops)

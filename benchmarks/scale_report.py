"""Tables and picture of how a run grows: what was measured, the law, and how far it is from that."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log10

from benchmarks.report import table
from benchmarks.scale_delays import DELAYS_MS, Delayed
from benchmarks.scale_law import Law
from benchmarks.scale_rows import Aligned, MaskCosts, OfRows
from benchmarks.scale_runs import BROKER, FEATURES, LABEL, Found
from sl_queue.checking.capacity import LABEL_BYTE_S, LABEL_MESSAGE_S, MEASURED

COLOURS = {BROKER: "#c0392b", LABEL: "#2563a8", FEATURES: "#2e8b57", "scheduler": "#8e6bbf"}
SIDE = 420  # of the picture
LOW, HIGH = -5.0, 0.5  # powers of ten of seconds in the picture
MARKS = ("<!-- written by `python -m benchmarks scale` -->", "<!-- end of what it wrote -->")


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of all kinds, and the laws."""

    found: Sequence[Found]
    laws: Mapping[str, Law]  # of a step's processor seconds, by role
    memory: Law  # of the broker, in bytes
    files: Law
    of_rows: Sequence[OfRows]
    masks: MaskCosts
    aligned: Sequence[Aligned]
    delayed: Sequence[Delayed]


def tables(measured: Measured) -> Iterator[str]:
    """Yield the parts of the report that were measured."""
    yield _busy()
    yield f"### Measured: parties, cuts and messages\n\n{_cases(measured)}"
    yield f"### The law, fitted to it\n\n{_laws(measured)}"
    yield f"### Measured: rows\n\n{_rows(measured)}"
    yield f"### Measured: alignment of rows\n\n{_alignment(measured)}"
    yield f"### Measured and simulated: links whose delays differ\n\n{_delays(measured)}"


def _busy() -> str:
    load, cores = os.getloadavg()[2], os.cpu_count() or 1
    if load <= cores:
        return f"The load over the last fifteen minutes was {load:.1f}, this benchmark's own among it.\n"
    return (
        f"**The machine was busy**: a load of {load:.1f} over fifteen minutes on {cores} cores, this benchmark's own "
        "among it. Times of a step are longer than on a quiet machine; processor seconds a little, by caches that "
        "others used; messages, bytes and files not at all.\n"
    )


def _cases(measured: Measured) -> str:
    head = (
        "feature parties", "cut", "rows a message", "messages a step", "MB a step", "ms a step", "steps/s",
        "broker, CPU ms", "by the law", "label holder", "by the law", "all feature parties", "scheduler", "broker MB",
        "window MB", "files", "sockets",
    )  # fmt: skip
    rows = []
    for each in measured.found:
        case, ms = each.case, {role: f"{1e3 * spent:.2f}" for role, spent in each.cpu_s.items()}
        by = {role: f"{1e3 * measured.laws[role](each.causes):.2f}" for role in (BROKER, LABEL)}
        rounded = "" if case.dtype == "float32" else f", {case.dtype}"
        slept = f" (of them {1e3 * case.sleep_s:.0f} asleep)" if case.sleep_s else ""
        rows.append(
            (
                case.parties, f"{case.cut}{rounded}", f"{case.batch // case.micro_batches:,}", case.messages,
                f"{each.bytes / 1e6:.3f}", f"{1e3 * each.step_s:.1f}{slept}", f"{1 / each.step_s:.1f}",
                ms[BROKER], by[BROKER], ms[LABEL], by[LABEL], ms[FEATURES], ms["scheduler"],
                f"{each.memory / 1e6:.0f}", f"{each.window / 1e6:.0f}", each.files, each.sockets,
            )
        )  # fmt: skip
    about = (
        "A message is an activation or a gradient, float32 unless it says otherwise; CPU milliseconds of a step by "
        "role. `broker MB`, files and sockets: what the broker had more than before when `window` lay there, all "
        "messages since the last commit.\n\n"
    )
    return f"{about}{table(head, rows)}"


def _laws(measured: Measured) -> str:
    """Write each law as a line, and what is left."""
    units = {
        "messages": (1e6, "µs a message"),
        "bytes": (1e9, "ns a byte"),
        "connection seconds": (1e3, "ms a second of each connection"),
        "seconds": (1e3, "ms a second by itself"),
        "steps": (1e3, "ms a step"),
    }
    rows = []
    for role, law in measured.laws.items():
        each = ", ".join(f"{cost * units[name][0]:.3g} {units[name][1]}" for name, cost in law.each.items())
        rows.append((f"CPU, {role}", each, f"{law.residual:.0%}", f"{law.worst:.0%}"))
    memory, files = measured.memory, measured.files
    each = (
        f"{memory.each['connections'] / 1e6:.2f} MB a connection, {memory.each['window']:.2f} times the window, "
        f"{memory.each['runs'] / 1e6:.1f} MB a run"
    )
    rows.append(("memory, broker", each, f"{memory.residual:.0%}", f"{memory.worst:.0%}"))
    each = f"{files.each['connections']:.2f} a connection, {files.each['runs']:.1f} a run"
    rows.append(("open files, broker", each, f"{files.residual:.0%}", f"{files.worst:.0%}"))
    head = ("of", "law", "median error", "largest error")
    about = "Least squares of relative errors over the cases in float32; no cost may be below zero.\n\n"
    return f"{about}{table(head, rows)}\n{_kept(measured)}"


def _kept(measured: Measured) -> str:
    """Compare what `sl-queue check` has with what was found here."""
    broker, label, memory = (law.each for law in (measured.laws[BROKER], measured.laws[LABEL], measured.memory))
    pairs = (
        ("a message at the broker, µs", MEASURED.message_s * 1e6, broker["messages"] * 1e6),
        ("a byte at the broker, ns", MEASURED.byte_s * 1e9, broker["bytes"] * 1e9),
        (
            "an idle connection at the broker, ms a second",
            MEASURED.connection_s * 1e3,
            broker["connection seconds"] * 1e3,
        ),
        ("memory of a connection at the broker, MB", MEASURED.connection_bytes / 1e6, memory["connections"] / 1e6),
        ("files of a party at the broker", MEASURED.files_of_party, measured.files.each["connections"]),
        ("a message at the label holder, µs", LABEL_MESSAGE_S * 1e6, label["messages"] * 1e6),
        ("a byte at the label holder, ns", LABEL_BYTE_S * 1e9, label["bytes"] * 1e9),
    )
    rows = [(name, f"{kept:.3g}", f"{here:.3g}", f"{here / kept:.2f}") for name, kept, here in pairs]
    about = "`sl-queue check` reckons with (sl_queue/checking/capacity.py):\n\n"
    return f"{about}{table(('', 'it has', 'this run', 'ratio'), rows)}"


def _rows(measured: Measured) -> str:
    """Write what rows cost a feature party; none of it is in a step."""
    rows = [
        (
            f"{each.rows:,}",
            f"{each.start_s:.2f}",
            f"{1e3 * each.step_s:.2f}",
            f"{each.order_s:.3f}",
            f"{each.peak / 1e6:.0f}",
        )
        for each in measured.of_rows
    ]
    head = ("rows", "start, CPU s", "forward of 4,096 rows, CPU ms", "an epoch's order, CPU s", "peak, MB")
    about = (
        "A feature party with one generated column, in memory. The steps above with a cut of 8 and large messages are "
        "of the same numbers of rows: their law is that of all others, so rows cost nothing in a step.\n\n"
    )
    return f"{about}{table(head, rows)}"


def _alignment(measured: Measured) -> str:
    masks = measured.masks
    about = (
        f"An id costs {1e6 * masks.own:.0f} µs to be hashed and masked, {1e6 * masks.masked:.0f} µs at "
        f"each other party, {1e6 * masks.finished:.0f} µs when it is back. Small alignments also pay their start.\n\n"
    )
    rows = [
        (
            each.parties, f"{each.ids:,}", f"{each.law_s:.2f}", f"{each.cpu_s:.2f}", f"{each.cpu_s / each.law_s:.2f}",
            f"{each.broker_s:.2f}", f"{each.memory:.0f}", f"{each.disk:.1f}",
        )
        for each in measured.aligned
    ]  # fmt: skip
    head = (
        "parties", "ids a side", "law, CPU s", "busiest party, CPU s", "ratio", "broker, CPU s",
        "bytes of memory an id", "bytes on disk an id",
    )  # fmt: skip
    return f"{about}{table(head, rows)}"


def _delays(measured: Measured) -> str:
    rows = [
        (
            each.order,
            f"{1e3 * each.simulated:.1f}",
            f"{1e3 * each.measured:.1f}",
            f"{each.simulated / each.measured - 1:+.0%}",
        )
        for each in measured.delayed
    ]
    parties = ", ".join(f"{delay:g}" for delay in DELAYS_MS)
    about = (
        f"{len(DELAYS_MS)} feature parties, {parties} ms from the broker and back; the planner's simulation with the "
        "law above. What else runs on this machine is in the measured times only.\n\n"
    )
    return f"{about}{table(('pipeline', 'simulated, ms a step', 'measured', 'off by'), rows)}"


def picture(found: Sequence[Found], laws: Mapping[str, Law]) -> str:
    """Draw the law over what was measured, both in seconds of a step, as SVG."""

    def place(seconds: float) -> float:
        return SIDE * (min(max(log10(max(seconds, 1e-9)), LOW), HIGH) - LOW) / (HIGH - LOW)

    shapes = [f'<line x1="40" y1="{SIDE}" x2="{SIDE + 40}" y2="0" stroke="#999"/>']
    for power in range(int(LOW), 1):
        at = place(10.0**power)
        shapes.append(f'<text x="{40 + at:.0f}" y="{SIDE + 16}" text-anchor="middle">1e{power}</text>')
        shapes.append(f'<text x="36" y="{SIDE - at:.0f}" text-anchor="end">1e{power}</text>')
    for number, (role, law) in enumerate(laws.items()):
        for each in found:
            x, y = 40 + place(each.cpu_s[role]), SIDE - place(law(each.causes))
            shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[role]}" opacity="0.7"/>')
        shapes.append(f'<circle cx="60" cy="{20 + 18 * number}" r="4" fill="{COLOURS[role]}"/>')
        shapes.append(f'<text x="70" y="{24 + 18 * number}">{role}</text>')
    shapes.append(f'<text x="{40 + SIDE / 2:.0f}" y="{SIDE + 34}" text-anchor="middle">measured, CPU s a step</text>')
    body, size = "\n".join(shapes), f'width="{SIDE + 60}" height="{SIDE + 44}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'


def with_tables(page: str, text: str) -> str:
    """Return the page with this text between its marks."""
    before, after = page.index(MARKS[0]) + len(MARKS[0]), page.index(MARKS[1])
    return f"{page[:before]}\n\n{text.strip()}\n\n{page[after:]}"

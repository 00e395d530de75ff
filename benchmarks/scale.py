"""Growth of a run: what parties, cuts and rows cost broker, label holder and the rest, the law, and what follows.

Models compute next to nothing, so all that is measured is the way of the messages; processor seconds, bytes and files
do not depend on how busy the machine is, times do.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import scale_delays, scale_rows
from benchmarks.processes import cores
from benchmarks.scale_delays import Laws
from benchmarks.scale_extrapolated import Whole, extrapolated
from benchmarks.scale_law import Law, fitted
from benchmarks.scale_report import Measured, picture, tables, with_tables
from benchmarks.scale_runs import BROKER, FEATURES, LABEL, Case, Found, measure
from sl_queue.testing.private_broker import PrivateBroker

DOCS = Path(__file__).parents[1] / "docs" / "scale.md"
CAUSES = {
    BROKER: ("messages", "bytes", "connection seconds", "seconds"),
    LABEL: ("messages", "bytes", "steps"),
    FEATURES: ("messages", "bytes"),
    "scheduler": ("connection seconds", "seconds"),
}
CASES = (
    *(Case(parties, 64, steps) for parties, steps in ((2, 300), (4, 200), (8, 120), (16, 60), (32, 30), (64, 20))),
    *(Case(8, cut, steps) for cut, steps in ((8, 120), (512, 80), (4096, 30))),
    Case(2, 4096, 80),
    Case(64, 512, 12),
    Case(16, 4096, 14),
    Case(8, 64, 40, batch=512, micro_batches=8, depth=8),
    Case(8, 512, 60, depth=3, staleness=2),
    Case(8, 512, 60, dtype="float16"),
    Case(8, 8, 12, sleep_s=0.5),
    Case(64, 8, 8, sleep_s=0.5),
)
QUICK = (Case(2, 64, 60), Case(4, 1024, 30), Case(2, 64, 20, 256, 4, 4), Case(4, 8, 6, sleep_s=0.2))
ROWS, QUICK_ROWS = (100_000, 1_000_000, 10_000_000), (10_000,)
PICTURE = "![the law beside what was measured](scale.svg)\n"
LEAST_S = 1e-4  # of a step: Linux counts in hundredths of a second
STEPS_OF_ROWS = 20  # so that a batch is a part of the rows
ALIGNED, QUICK_ALIGNED = ((2, 2000), (2, 8000), (4, 3000), (8, 1500)), ((2, 300), (2, 600))


def compare(private: PrivateBroker, quick: bool, folder: Path) -> list[str]:
    """Measure, fit, extrapolate; returns the parts of the report, and writes them into docs/scale.md unless `quick`."""
    rows = QUICK_ROWS if quick else ROWS
    cases = (*(QUICK if quick else CASES), *(Case(2, 8, STEPS_OF_ROWS, n // STEPS_OF_ROWS) for n in rows))
    found = [_told(measure(private, case)) for case in cases]
    plain = [each for each in found if each.case.dtype == "float32"]
    laws = {role: _law(role, plain) for role in CAUSES}
    together = Laws(laws[BROKER], laws[LABEL], laws[FEATURES])
    of_rows = [scale_rows.of_rows(n) for n in rows]
    masks = scale_rows.mask_costs()
    aligned = [scale_rows.align(private, *size, masks) for size in (QUICK_ALIGNED if quick else ALIGNED)]
    delays = (15, scale_delays.ORDERS[:1]) if quick else (40, scale_delays.ORDERS)
    delayed = list(scale_delays.compare(private, together, cores(), *delays))
    memory = fitted(("connections", "window", "runs"), [_holding(each) for each in found], _memories(found))
    files = fitted(("connections", "runs"), [_holding(each) for each in found], [float(each.files) for each in found])
    measured = Measured(found, laws, memory, files, of_rows, masks, aligned, delayed)
    whole = extrapolated(measured, together, Whole(12 if quick else 100, 10**6 if quick else 10**9))
    (folder / "scale.svg").write_text(picture(found, laws))
    parts = [*tables(measured), *whole]
    if not quick:
        DOCS.write_text(with_tables(DOCS.read_text(), "\n".join(parts)))
    return [*parts, PICTURE]


def _told(found: Found) -> Found:
    case, spent = found.case, ", ".join(f"{role} {1e3 * s:.1f}" for role, s in found.cpu_s.items())
    print(f"{case.parties} parties, cut {case.cut}: {1e3 * found.step_s:.1f} ms a step; CPU ms: {spent}", flush=True)
    return found


def _law(role: str, found: Sequence[Found]) -> Law:
    return fitted(CAUSES[role], [each.causes for each in found], [max(each.cpu_s[role], LEAST_S) for each in found])


def _holding(found: Found) -> Mapping[str, float]:
    return {"connections": found.case.connections, "window": found.window, "runs": 1.0}


def _memories(found: Sequence[Found]) -> list[float]:
    return [max(each.memory, 2e6) for each in found]

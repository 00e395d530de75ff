"""Costs and gains of fewer bytes: each [wire] on W1 and on a real table, over a link of 100 Mbit/s."""

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.link import Speed
from benchmarks.measure import Summary
from benchmarks.report import table
from benchmarks.training import GPIPE, LOCK_STEP, RUN_AHEAD_2, Comparison, Order, Variant, run
from benchmarks.workloads import REAL, W1
from sl_queue.testing.private_broker import PrivateBroker

WIRES = (
    {"dtype": "float32", "compress": "none"},
    {"dtype": "float32", "compress": "bitmap"},
    {"dtype": "float32", "compress": "zstd"},
    {"dtype": "bfloat16", "compress": "none"},
    {"dtype": "float16", "compress": "none"},
    {"dtype": "float16", "compress": "bitmap"},
    {"dtype": "int8", "compress": "none"},
    {"dtype": "int8", "compress": "bitmap"},
)
LINK = Speed(20.0, 100.0)


def _variant(wire: Mapping[str, str], order: Order, speed: Speed | None = None) -> Variant:
    return Variant("rabbitmq" if speed else "memory", order, speed=speed, tables={"wire": dict(wire), "holdout": 0.2})


def _rows(found: Mapping[Variant, Summary]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for variant, summary in found.items():
        last = summary.runs[-1].holdout or {}
        wire = variant.tables["wire"]
        rows.append(
            (
                f"{wire['dtype']}, {wire['compress']}",
                variant.order.name,
                f"{summary.middle(lambda run: run.wire_bytes) / 1e3:,.0f}",
                f"{summary.middle(lambda run: run.step_ms):.2f}",
                f"{last.get('auroc') or float('nan'):.4f}",
                f"{last.get('loss') or float('nan'):.4f}",
            )
        )
    return rows


def compare(private: PrivateBroker, quick: bool) -> str:
    """Bytes, time, and the last epoch's AUC and loss on held-out rows."""
    head = ("[wire]", "pipeline", "KB a step", "ms a step", "AUC", "loss")
    w1 = replace(W1, rows=W1.batch * 10) if quick else replace(W1, rows=W1.batch * 40)
    over_link = run(Comparison(w1, tuple(_variant(wire, GPIPE, LINK) for wire in WIRES), 1), private)
    orders = [(wire, LOCK_STEP) for wire in WIRES] + [(WIRES[0], RUN_AHEAD_2)]
    real = run(Comparison(REAL, tuple(_variant(*each) for each in orders), 3 if quick else 30), private)
    parts = (
        f"### W1, {w1.rows} rows, one epoch, {LINK}\n\n{table(head, _rows(over_link))}",
        f"### {REAL.name}, over memory\n\n{table(head, _rows(real))}",
    )
    return "\n".join(parts)

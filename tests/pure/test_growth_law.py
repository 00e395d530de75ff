"""The benchmark's law finds the costs that made the measurements; the product and the guide have what it found."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale_law import fitted
from sl_queue.checking.capacity import LABEL_BYTE_S, LABEL_MESSAGE_S, MEASURED

ROOT = Path(__file__).parents[2]
NAMES = ("messages", "bytes", "seconds")
costs = st.floats(1e-9, 1e-2)


def cases() -> list[dict[str, float]]:
    return [
        {"messages": 2.0 * parties, "bytes": 2.0 * parties * size, "seconds": parties * pace}
        for parties, size, pace in ((2, 100, 0.1), (8, 5e5, 0.02), (64, 3e3, 1.0), (16, 10, 5.0), (4, 1e6, 0.5))
    ]


@given(costs, costs, costs)
def test_costs_that_made_the_measurements_are_found_again(one: float, two: float, three: float) -> None:
    true = dict(zip(NAMES, (one, two, three), strict=True))
    measured = [sum(true[name] * case[name] for name in NAMES) for case in cases()]
    law = fitted(NAMES, cases(), measured)
    assert law.worst < 1e-4
    for case, value in zip(cases(), measured, strict=True):
        assert law(case) == pytest.approx(value, rel=1e-4)


def test_a_cause_that_would_cost_less_than_nothing_costs_nothing() -> None:
    falling = [10.0 * case["messages"] - 1e-6 * case["bytes"] for case in cases()]
    law = fitted(NAMES, cases(), falling)
    assert min(law.each.values()) == 0.0
    assert law.each["messages"] == pytest.approx(10.0, rel=0.2)


def test_the_residual_is_relative_to_what_was_measured() -> None:
    one: list[dict[str, Any]] = [{"messages": 1.0}, {"messages": 10.0}, {"messages": 100.0}]
    law = fitted(("messages",), one, [1.0, 10.0, 110.0])
    assert 0 < law.residual < law.worst < 0.1


def test_the_constants_are_those_that_the_benchmark_found() -> None:
    results = (ROOT / "benchmarks" / "results" / "scale.md").read_text()
    kept = {
        "a message at the broker, µs": MEASURED.message_s * 1e6,
        "a byte at the broker, ns": MEASURED.byte_s * 1e9,
        "files of a party at the broker": MEASURED.files_of_party,
        "a message at the label holder, µs": LABEL_MESSAGE_S * 1e6,
        "a byte at the label holder, ns": LABEL_BYTE_S * 1e9,
    }
    memory = re.search(r"^\| memory, broker \| (\S+) MB a connection", results, re.MULTILINE)
    assert memory is not None
    assert MEASURED.connection_bytes / 2e6 < float(memory[1]) < MEASURED.connection_bytes * 2e-6
    for name, value in kept.items():
        found = re.search(rf"^\| {re.escape(name)} \| \S+ \| (\S+) \|", results, re.MULTILINE)
        assert found is not None, name
        assert value / 2 < float(found[1]) < value * 2, name


def test_the_figures_of_the_guide_are_those_of_the_results() -> None:
    guide, results = ((ROOT / name).read_text() for name in ("docs/scale.md", "benchmarks/results/scale.md"))
    begin, end = "<!-- written by `python -m benchmarks scale` -->", "<!-- end of what it wrote -->"
    written = guide[guide.index(begin) + len(begin) : guide.index(end)].strip()
    assert written.count("### ") >= 5
    assert written in results

"""Measurements of a meter, as history and table hold them."""

import json
from io import StringIO
from pathlib import Path

from rich.console import Console

from sl_queue.observe.console import history_table
from sl_queue.observe.scalars import Scalars
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.scheduler.epochs import recorded
from sl_queue.protocol.scheduler.state import Plan, RunState, history_line, result_of, worst_reading
from sl_queue.protocol.scheduler.status import RunStatus

ROOT = Path(__file__).parents[2]
LEAK = {"bank": {"direction": 0.99, "norm": 0.7, "chance": 0.55, "probe": 0.999}}


def test_what_a_meter_measured_comes_back_from_its_line_and_is_not_there_without_one() -> None:
    measured = EpochResult(0, 3, 0.5, {"auroc": 0.9}, 1.0, LEAK)
    line = json.loads(json.dumps(history_line(measured)))
    assert line["leak"] == LEAK
    assert result_of(line) == measured
    assert "leak" not in history_line(EpochResult(0, 3, 0.5))
    assert worst_reading(LEAK["bank"]) == 0.99  # a probe on activations is a base line, as chance is
    assert worst_reading({"chance": 0.5}) is None


def test_the_table_of_a_run_says_how_well_labels_were_read() -> None:
    console = Console(width=120, file=StringIO())
    console.print(history_table([history_line(EpochResult(epoch, 3, 0.5, None, 1.0, LEAK)) for epoch in range(2)]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "read by bank" in text
    assert text.count("0.9900") == 2


def test_trackers_are_given_every_attack_by_party() -> None:
    status = RunStatus("running", "toy", "r1", step=3, loss=0.5, history=(EpochResult(0, 3, 0.5, None, 1.0, LEAK),))
    said = {each.name: (each.step, each.value) for each in Scalars().of(status, 1.0)}
    assert said["leak/bank/direction"] == (3, 0.99)
    assert said["leak/bank/chance"] == (3, 0.55)


def test_what_a_label_holder_makes_up_fills_no_history() -> None:
    """Parties that there are not, names that no terminal shows, and NaN."""
    plan = Plan({}, "label", ("bank",), 3, 10.0)
    made_up = {"bank": {"norm": 0.7, "a\x1b[2J": 0.5, "nothing": float("nan")}, **{f"x{i}": {} for i in range(1000)}}
    state, _ = recorded(plan, RunState(), (EpochResult(0, 3, 0.5, leak=made_up),), 1.0)
    (kept,) = state.history
    assert kept.leak is not None
    assert set(kept.leak) == {"bank"}
    assert sorted(kept.leak["bank"].values()) == [0.5, 0.7]
    assert all(name.isprintable() for name in kept.leak["bank"])


def test_the_figures_of_the_guide_are_those_that_the_benchmark_wrote() -> None:
    guide, results = ((ROOT / name).read_text() for name in ("docs/privacy.md", "benchmarks/results/privacy.md"))
    measured = guide[guide.index("### ") : guide.index("What to see:")].strip()
    assert measured.count("### ") == 4
    assert measured in results

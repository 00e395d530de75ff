"""Measurements of a meter, as history and table hold them."""

import json
from io import StringIO

from rich.console import Console

from sl_queue.observe.console import history_table
from sl_queue.protocol.control import EpochResult
from sl_queue.protocol.scheduler.state import history_line, result_of, worst_reading

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

"""A history on disk: appended to, repaired after a crash, read from where earlier versions kept it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.errors import CheckpointError
from sl_queue.protocol.history import History
from sl_queue.protocol.scheduler.state import Member, Phase, RunState, history_line
from sl_queue.storage.history_file import HistoryFile, Journal
from sl_queue.storage.run_file import RunFile
from tests.pure.test_history import JOB, epoch


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30), st.booleans()), max_size=8))
@settings(max_examples=40)  # it waits for the disk
def test_a_file_holds_what_was_written_last_however_it_was_torn_before(story: list[tuple[int, int, bool]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "history.jsonl"
        file, history = HistoryFile(path), History()
        for keep, cut, restarted in story:
            history = history.first(keep)
            for number in range(len(history), len(history) + 3):
                history = history.after(epoch(number))
            file.write(history)
            assert lines(path) == [history_line(result) for result in history]
            if restarted:
                path.write_bytes(path.read_bytes()[: -cut or None])
                file = HistoryFile(path)
                intact = file.load()
                assert list(intact) == list(history)[: len(intact)]
                assert len(history) - len(intact) <= cut // 60 + 1
                history = intact
        file.write(history)
        assert lines(path) == [history_line(result) for result in history]


@contextmanager
def opened(folder: Path) -> Iterator[RunFile]:
    ledger = RunFile(folder, JOB, "digest")
    try:
        yield ledger
    finally:
        ledger.close()


def test_one_more_epoch_writes_one_line_and_a_run_file_of_the_same_size(tmp_path: Path) -> None:
    state, sizes = RunState(run="r", phase=Phase.RUNNING), []
    with opened(tmp_path) as ledger:
        for number in range(3_000):
            state = replace(state, history=state.history.after(epoch(number)))
            if number in (10, 11, 2_998, 2_999):
                ledger.save(state)
                sizes.append([(tmp_path / name).stat().st_size for name in ("history.jsonl", "run.json")])
    line = len(json.dumps(history_line(epoch(10)))) + 1
    assert sizes[1][0] - sizes[0][0] == line
    assert sizes[3][0] - sizes[2][0] == line + 2 * len("99"), "two digits more for the epoch, and two for the step"
    assert len({run for _, run in sizes}) == 1
    with opened(tmp_path) as ledger:
        assert ledger.load() == state


def test_a_run_file_of_the_version_before_that_holds_the_history_is_read(tmp_path: Path) -> None:
    history, path = History.of(map(epoch, range(3))), tmp_path / "run.json"
    with opened(tmp_path) as ledger:
        ledger.save(RunState(run="r", phase=Phase.RUNNING, members={"a": Member("a1", True, 9, "d")}))
    saved = json.loads(path.read_text())
    saved["state"]["history"] = [history_line(result) for result in history]
    for new in ("agreed", "failed"):
        del saved["state"][new]
    path.write_text(json.dumps(saved))
    (tmp_path / "history.jsonl").write_text("torn")
    with opened(tmp_path) as ledger:
        state = ledger.load()
        assert state is not None
        assert state.history == history
        ledger.save(state)
    assert lines(tmp_path / "history.jsonl") == [history_line(result) for result in history]
    assert "history" not in json.loads(path.read_text())["state"]


def test_a_disk_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").mkdir()
    with opened(tmp_path) as ledger, pytest.raises(CheckpointError, match="cannot be used"):
        ledger.save(RunState(run="r", history=History.of([epoch(1)])))


def test_a_label_holder_whose_history_cannot_be_written_says_where_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    journal = Journal(path)
    journal.write(History.of([epoch(0)]))
    path.unlink()
    path.mkdir()
    for use in (lambda: journal.write(History.of([epoch(0), epoch(1)])), journal.load):
        with pytest.raises(CheckpointError, match=r"cannot be used: .*make room"):
            use()

"""Columns of a CSV file that is read a block at a time are what reading it as a whole makes of them."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sl_queue.data import csv_columns
from sl_queue.data.csv_file import COMMAS, read
from sl_queue.data.later import Later
from sl_queue.data.spec import CsvSpec

ROWS = 600
LATE: dict[str, tuple[str, str]] = {  # what a column holds at first, and in its last row
    "whole": ("7", "8"),
    "then_fraction": ("7", "0.5"),
    "then_text": ("0.5", "none"),
    "whole_then_text": ("7", "x1"),
    "empty_then_whole": ("", "3"),
    "empty_then_fraction": ("", "3.5"),
    "empty_then_text": ("", "b"),
    "empty": ("", ""),
    "bits_then_true": ("1", "true"),
    "date_then_time": ("2026-01-31", "2026-01-31 10:00:00"),
    "date_then_text": ("2026-01-31", "31.01.2026"),
    "time_then_finer": ("2026-01-31 10:00:00", "2026-01-31 10:00:00.123456789"),
    "beyond_64_bits": ("7", "18446744073709551615"),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_columns, "_BLOCK_BYTES", 2000)


def written(folder: Path, names: list[str]) -> Path:
    rows = [[LATE[name][0] for name in names] for _ in range(ROWS)] + [[LATE[name][1] for name in names]]
    lines = [",".join([str(number), *row]) for number, row in enumerate(rows)]
    (folder / "rows.csv").write_text("\n".join([",".join(["id", *names]), *lines]) + "\n")
    return folder / "rows.csv"


def compare(path: Path, names: list[str], dialect: CsvSpec = COMMAS) -> Later | None:
    whole, faults = read(path, ["id"], ["id", *names], dialect)
    found = csv_columns.later(path, ["id"], ["id", *names], dialect)
    assert not faults
    if found is not None:
        for name in ["id", *names]:
            assert found[name].type == whole[name].type, name
            assert found[name].combine_chunks() == whole[name].combine_chunks(), name
    return found


@pytest.mark.parametrize("name", LATE)
def test_a_column_has_the_type_that_all_its_rows_have(tmp_path: Path, name: str) -> None:
    assert compare(written(tmp_path, [name]), [name]) is not None


def test_many_columns_that_turn_out_to_be_something_else_are_what_they_are(tmp_path: Path) -> None:
    names = [name for name in LATE if not name.startswith(("date", "empty_then_text"))]
    compare(written(tmp_path, names), names)


def test_more_columns_than_files_are_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_columns, "_FILES", 3)
    draw = random.Random(1)
    names = [f"x{place}" for place in range(8)]
    lines = [",".join([str(i), *(f"{draw.random():.3f}" for _ in names)]) for i in range(ROWS)]
    (tmp_path / "rows.csv").write_text("\n".join([",".join(["id", *names]), *lines]) + "\n")
    found = compare(tmp_path / "rows.csv", names)
    assert found is not None and len(list(found.keeps.path.iterdir())) == 3


def test_files_go_with_the_last_who_reads_them(tmp_path: Path) -> None:
    found = compare(written(tmp_path, ["whole"]), ["whole"])
    assert found is not None
    folder: Any = found.keeps.path
    assert folder.exists()
    del found
    assert not folder.exists()


@pytest.mark.parametrize("text", ["id,x\n1,2\n2,3,4\n", "id,x\n" + f"1,{'9' * 5000}\n"])
def test_a_file_with_faults_or_a_row_longer_than_a_block_is_left_to_who_reads_it_whole(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "rows.csv").write_text(text)
    assert csv_columns.later(tmp_path / "rows.csv", ["id"], ["id", "x"], COMMAS) is None


def test_a_few_columns_in_another_order_are_told_apart(tmp_path: Path) -> None:
    names = ["then_text", "whole", "then_fraction", "empty"]
    path = written(tmp_path, names)
    found = csv_columns.later(path, ["id"], ["then_fraction", "id"], COMMAS)
    assert found is not None
    assert found["then_fraction"].type == pa.float64()


def test_who_asks_which_columns_there_are_reads_none() -> None:
    read: list[str] = []
    columns = Later(("age", "income"), read.append)
    assert "age" in columns and "region" not in columns and list(columns) == ["age", "income"]
    assert not read

"""`sl-queue check` reports on the tables at hand: what a data scientist looks at first, and no row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sl_queue.checking.check import check_job
from sl_queue.checking.data_report import report_data
from sl_queue.checking.findings import Check, Finding, Level
from sl_queue.cli.main import app
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table
from tests.support import raw_tables

PSI = raw_tables.JOB + '\n[alignment]\nmethod = "psi"\nat_least = 10\n'
FILES = ("bank.toml", "insurer.toml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    raw_tables.write_all(tmp_path, raw_tables.customers(60), raw_tables.customers(70, first=20), PSI)
    return tmp_path


def check(folder: Path, *files: str) -> tuple[int, str]:
    findings: list[Finding] = []
    code = check_job(folder / "job.toml", [folder / name for name in files or FILES], None, findings.append)
    return code, "\n".join(f"{found.level}: {found.text}" for found in findings)


def test_it_tells_shared_rows_labels_features_and_memory(folder: Path) -> None:
    code, said = check(folder)
    assert code == 0, said
    assert "ok: rows: 40 are shared by bank, insurer; an alignment will find them" in said
    assert "bank: 40 rows, ids are text, features (9,)" in said
    assert "insurer: label 0: " in said and "rows trained on (" in said and " held out (" in said
    assert "[features] income: number, " in said
    assert "KiB of memory as float32" in said
    assert "3 steps split and joined: all weights are equal bit for bit" in said
    assert "c-000" not in said


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (np.arange(40) / 2.0, "note: insurer: labels go from 0.5 to 19.5, mean "),
        (np.arange(40) % 2 * 1.0, "note: insurer: label 1: "),
    ],
    ids=["numbers", "classes"],
)
def test_labels_that_are_missing_are_counted_and_no_number_is_made_of_them(labels: Any, told: str) -> None:
    labels[:1] = np.nan
    findings: list[Finding] = []
    batches = Batches(len(labels), 7, 1, 8, 1, 0.25)
    table = Table(None, labels, np.arange(len(labels), dtype=np.uint64), "digest", "integer")
    report_data(Check(findings.append), "insurer", table, batches)
    said = "\n".join(f"{found.level}: {found.text}" for found in findings)
    assert "insurer: 1 label is missing, and counts for nothing" in said
    assert told in said and "nan" not in said, said


def test_a_party_alone_is_told_that_its_rows_are_not_aligned_yet(folder: Path) -> None:
    code, said = check(folder, "bank.toml")
    assert code == 0, said
    assert "rows are not aligned yet" in said
    assert "bank: 60 rows" in said


def test_too_few_shared_rows_and_none_are_errors(folder: Path) -> None:
    text = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(text.replace("at_least = 10", "at_least = 41"))
    code, said = check(folder)
    assert (code, "40 rows are shared by all, and alignment.at_least = 41" in said) == (3, True)
    raw_tables.write_bank(folder / "bank.csv", raw_tables.customers(15))
    code, said = check(folder)
    assert (code, "no row is shared by" in said) == (2, True)


@pytest.mark.parametrize("files", [FILES, ("bank.toml",)], ids=["all", "alone"])
def test_more_rows_than_a_party_may_bring_are_an_error(folder: Path, files: tuple[str, ...]) -> None:
    text = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(text.replace("at_least = 10", "at_most = 59"))
    code, said = check(folder, *files)
    assert code == 2, said
    assert "error: party 'bank': it has more rows than alignment.at_most = 59; leave some out" in said
    assert said.count("more rows than") == len(files), said
    (folder / "job.toml").write_text(text.replace("at_least = 10", "at_most = 70"))
    assert check(folder, *files)[0] == 0


@pytest.mark.parametrize("rows", [45, 300])
def test_models_are_tried_though_no_row_is_shared_and_tables_are_not_as_long(folder: Path, rows: int) -> None:
    raw_tables.write_bank(folder / "bank.csv", raw_tables.customers(rows, first=100))
    code, said = check(folder)
    assert code == 2 and said.count("error: ") == 1, said
    assert "insurer: fuse model and loss accept the cut layers bank [4], insurer [2]" in said


@pytest.mark.parametrize("rows", [45, 300])
def test_models_are_tried_though_tables_that_nothing_aligns_are_not_as_long(tmp_path: Path, rows: int) -> None:
    raw_tables.write_all(tmp_path, raw_tables.customers(rows), raw_tables.customers(70), raw_tables.JOB)
    code, said = check(tmp_path)
    assert code == 3 and said.count("error: ") == 1 and "the parties' ids differ" in said, said
    assert "insurer: fuse model and loss accept the cut layers bank [4], insurer [2]" in said


def test_rows_to_predict_that_nothing_says_how_to_read_are_refused(folder: Path) -> None:
    text = (folder / "bank.toml").read_text().replace('path = "bank.csv"', 'source = "rows:of_bank"')
    text = text.replace('id = "customer"\n', "")
    (folder / "bank.toml").write_text(text + '\n[predict]\npath = "bank.csv"\n')
    (folder / "rows.py").write_text(
        "import pandas\nimport sl_queue\n\ndef of_bank(folder):\n"
        '    frame = pandas.read_csv(folder / "bank.csv", sep=";", decimal=",")\n'
        '    return sl_queue.Rows(frame["customer"], frame.drop(columns="customer"))\n'
    )
    code, said = check(folder)
    assert (code, said.count("error: ")) == (2, 1), said
    assert "party 'bank': [predict] path is read as [data] path is, and its [data] names no file" in said


def test_what_is_wrong_with_a_table_that_is_to_be_aligned_is_told_once(folder: Path) -> None:
    rows = (folder / "bank.csv").read_text()
    (folder / "bank.csv").write_text(rows.replace("customer", "client", 1))
    code, said = check(folder)
    assert (code, said.count("there is no column 'customer'")) == (2, 1), said
    assert "error: party 'insurer'" not in said


def test_that_no_row_is_shared_is_told_beside_what_is_wrong_with_a_table(folder: Path) -> None:
    raw_tables.write_bank(folder / "bank.csv", raw_tables.customers(15))
    text = (folder / "bank.csv").read_text()
    (folder / "bank.csv").write_text(text.replace(",", " point "))
    _, said = check(folder)
    assert "no row is shared by" in said and "error: party 'bank'" in said, said


def test_constant_and_unscaled_columns_are_warned_of(tmp_path: Path) -> None:
    ids = raw_tables.customers(50)
    raw_tables.write_all(tmp_path, ids, ids, raw_tables.JOB)
    rows = "".join(f"{name};1;{number * 1000}\n" for number, name in enumerate(ids))
    (tmp_path / "bank.csv").write_text(f"customer;one;income\n{rows}")
    text = (tmp_path / "bank.toml").read_text().partition("[features]")[0].replace("width = 9", "width = 2")
    (tmp_path / "bank.toml").write_text(text)
    code, said = check(tmp_path)
    assert code == 0, said
    assert "warning: bank: constant among the training rows: column 'one'" in said
    assert "warning: bank: not scaled: column 'income'" in said


def test_names_of_queues_are_for_who_asks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folder / name) for name in ("job.toml", *FILES)]
    app(["check", *files], standalone_mode=False)
    assert "reads queues" not in capsys.readouterr().out
    app(["check", *files, "--verbose"], standalone_mode=False)
    assert "bank: writes to exchange x.bank, reads queues q.bank.scheduler" in capsys.readouterr().out
    assert Level.DETAIL == "detail"

"""A run on raw tables is the run on tables that were encoded by hand, and leaves what it fitted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

import sl_queue
from sl_queue.cli.main import app
from sl_queue.data.features import Fitted
from sl_queue.data.table import holdout_rows
from sl_queue.errors import CheckpointError, JobError
from tests.support import raw_tables
from tests.support.tables import read_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ids = raw_tables.customers(80)
    raw_tables.write_all(tmp_path, ids, ids[::-1])
    return tmp_path


def loaded(folder: Path) -> tuple[Any, list[Any]]:
    files = [sl_queue.PartyFile.load(folder / f"{name}.toml") for name in ("bank", "insurer")]
    return sl_queue.Job.load(folder / "job.toml"), files


def test_a_run_on_raw_tables_has_the_weights_of_a_run_on_encoded_ones(folder: Path) -> None:
    job, files = loaded(folder)
    raw = sl_queue.run_local(job, files, out=folder / "out")
    ids = sorted(raw_tables.customers(80))
    training = ~holdout_rows(ids, job.seed, job.holdout)
    rows = {row["customer"]: row for row in raw_tables.bank_rows(ids)}
    income = np.array([float(rows[i]["income"].replace(",", ".") or "nan") for i in ids])
    seen = income[training & ~np.isnan(income)]
    encoded = [(np.where(np.isnan(income), np.median(seen), income) - seen.mean()) / seen.std(), np.isnan(income)]
    regions = [rows[i]["region"] for i in ids]
    counts = {region: regions.count(region) for region in sorted(set(regions))}
    assert min(counts.values()) >= 4  # so that none is rare among the training rows
    known = ["eäst", "north", "south"]
    encoded += [[False] * 80, [r == "" for r in regions], *([r == name for r in regions] for name in known)]
    assert len(encoded) == 7
    bank = read_table(job, files[0])
    assert bank.columns == (
        *("income", "income missing", "region=other", "region missing", "region=eäst", "region=north", "region=south"),
        *("since.year", "since.age"),
    )
    assert bank.features is not None
    assert np.allclose(bank.features[:, :7], np.array(encoded, np.float64).T, atol=1e-6)
    given = files[0].model_copy(update={"data": sl_queue.Rows(ids, bank.features), "features": None})
    plain = sl_queue.run_local(job, [given, files[1]], out=folder / "plain")
    for one, other in zip(raw.fuse.parameters(), plain.fuse.parameters(), strict=True):
        assert torch.equal(one, other)
    left = Fitted.of_json((folder / "out/bank/final/features.json").read_text())
    assert left.as_json() == bank.fitted
    assert left.rows == int(training.sum())


def test_a_table_or_a_declaration_that_changed_is_refused_at_a_restart(folder: Path) -> None:
    job, files = loaded(folder)
    sl_queue.run_local(job, files, out=folder / "out")
    text = (folder / "bank.toml").read_text()
    (folder / "bank.toml").write_text(text.replace('missing = "median"', 'missing = "mean"'))
    run = json.loads((folder / "out/bank/final/run.json").read_text())
    (folder / "out/bank/final/run.json").write_text(json.dumps({**run, "told": False}))
    with pytest.raises(CheckpointError, match=r"what \[features\] learned from the training rows differs"):
        sl_queue.run_local(job, loaded(folder)[1], out=folder / "out")


def test_the_command_tells_what_comes_out_and_no_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["features", str(folder / "job.toml"), str(folder / "bank.toml")], standalone_mode=False)
    said = capsys.readouterr().out
    assert "9 columns come out of 3, fitted on 60 training rows" in said
    assert "income: number, " in said and "gaps (filled with median " in said
    assert "region: category (one-hot), " in said and "north " in said
    assert not any(name in said for name in raw_tables.customers(80))


def test_a_proposal_is_a_features_table_that_a_run_accepts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "bank.toml").read_text()
    (folder / "bank.toml").write_text(text.partition("[features]")[0])
    with pytest.raises(JobError, match="columns must be numbers"):
        read_table(*_bank(folder))
    app(["features", str(folder / "job.toml"), str(folder / "bank.toml"), "--write"], standalone_mode=False)
    assert "a proposal" in capsys.readouterr().out
    table = read_table(*_bank(folder))
    assert table.columns is not None
    assert {"income", "region=north", "since.year"} <= set(table.columns)


def to_predict(folder: Path, unknown: int, policy: str = "") -> list[str]:
    """Name new rows in both party files, some of them with a region that training had not seen."""
    ids = raw_tables.customers(50, first=200)
    raw_tables.write_bank(folder / "bank_new.csv", ids)
    head, *rows = (folder / "bank_new.csv").read_text().splitlines()
    for place in range(unknown):
        fields = rows[place].split(";")
        rows[place] = ";".join([*fields[:2], "overseas", *fields[3:]])
    (folder / "bank_new.csv").write_text("\n".join([head, *rows, ""]))
    pyarrow.parquet.write_table(raw_tables.insurer_table(ids).drop(["claim"]), folder / "insurer_new.parquet")
    for name, suffix, more in (("bank", "csv", policy), ("insurer", "parquet", "")):
        text = (folder / f"{name}.toml").read_text().partition("\n[predict]")[0]
        (folder / f"{name}.toml").write_text(f'{text}\n[predict]\npath = "{name}_new.{suffix}"\n{more}')
    return [str(folder / name) for name in ("job.toml", "bank.toml", "insurer.toml")]


def test_categories_that_training_had_not_seen_are_counted_for_their_party(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sl_queue.run_local(*loaded(folder), out=folder / "state")
    app(["predict", *to_predict(folder, unknown=4)], standalone_mode=False)
    told = "bank: [features] region: 4 of 50 new rows hold a category that training had not seen: they count as"
    assert any(message.startswith(told) for message in caplog.messages)
    assert not any("overseas" in message for message in caplog.messages)
    with pytest.raises(SystemExit, match="2"):
        app(["predict", *to_predict(folder, unknown=6)])
    app(["predict", *to_predict(folder, unknown=6, policy='unseen = "other"\n')], standalone_mode=False)
    assert any("6 of 50 new rows hold a category" in message for message in caplog.messages)


def _bank(folder: Path) -> tuple[Any, Any]:
    job, files = loaded(folder)
    return job, files[0]

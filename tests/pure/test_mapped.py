"""A table whose numbers are mapped from a file is the same table, and leaves nothing behind."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import table_spec
from sl_queue.config.user_code import Importer
from sl_queue.data import mapped
from sl_queue.data.spec import TableSpec
from sl_queue.data.table import read_table
from sl_queue.errors import JobError

JOB = Job(
    name="j", seed=7, epochs=1, batch_size=8, holdout=0.25,
    parties={"bank": {"role": "feature", "cut": [1]}, "insurer": {"role": "label"}},
)  # fmt: skip
FEATURES = {"kind": {"kind": "category"}, "*": {"kind": "number", "missing": "mean", "indicator": True}}


def spec_of(folder: Path, **data: object) -> TableSpec:
    rng = np.random.default_rng(3)
    rows = 1000
    columns = {"id": rng.permutation(rows), "x": rng.normal(size=rows), "kind": rng.choice(["a", "b", "c"], rows)}
    table = pa.table({**columns, "y": [None if number % 9 == 0 else number for number in range(rows)]})
    pa.parquet.write_table(table, folder / "bank.parquet")
    file = PartyFile(party="bank", data={"path": folder / "bank.parquet", "id": "id", **data}, features=FEATURES)
    (folder / "state").mkdir(exist_ok=True)
    return replace(table_spec(JOB, file, Importer()), scratch=folder / "state")


def test_it_holds_the_same_numbers_and_has_no_file_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_PART_BYTES", 3000)  # so that rows are turned in many parts
    in_memory, in_file = read_table(spec_of(tmp_path)), read_table(spec_of(tmp_path, mapped=True))
    assert in_memory.features is not None and in_file.features is not None
    assert np.array_equal(in_memory.features, in_file.features)
    assert (in_memory.columns, in_memory.fitted) == (in_file.columns, in_file.fitted)
    assert in_file.features.flags.c_contiguous, "a row is read in one piece"
    assert os.listdir(tmp_path / "state") == []
    maps = Path("/proc/self/maps").read_text()
    assert f"{tmp_path}/state/" in maps, "the numbers lie in a file"
    del in_file
    assert f"{tmp_path}/state/" not in Path("/proc/self/maps").read_text()


def test_only_what_features_makes_can_be_mapped(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"data.mapped needs a table \[features\]"):
        PartyFile(party="bank", data={"path": tmp_path / "bank.csv", "id": "id", "mapped": True})

"""A worker keeps the numbers of a file as float32, and nothing else can tell: no model, warning or state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from torch import Tensor, nn

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.fingerprint import fingerprint
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.table import read_table
from sl_queue.errors import JobError
from sl_queue.protocol.fingerprints import ONE_BY_ONE
from sl_queue.protocol.table import Table
from tests.support.resolved import base_stage

JOB = Job(
    name="t", seed=1, epochs=1, batch_size=4,
    parties={"bank": {"role": "feature", "cut": [2]}, "insurer": {"role": "label"}},
)  # fmt: skip
IDS = [30, -4, 200, 7, 12]
NUMBERS: dict[str, Any] = {
    "fraction": [0.1, 1 / 3, -2.5, 1e-30, 12345.678],
    "code": [2**24 + 1, 2**24, 3, 2**30 + 1, 5],
    "big": [2.0**25 + 1, 4.0, 5.0, 2.0**26 + 1, 2.0**27],
    "narrow": pa.array([0.1, 0.2, 0.3, 0.4, 0.5], pa.float32()),
    "flag": [True, False, True, True, False],
    "constant": [1.5] * 5,
}
WHOLE = {"a": [1, 2, 3, 2**24, -5], "b": [0, 0, 0, 0, 0], "flag": [True, False, True, True, False]}


def wide(columns: dict[str, Any]) -> dict[str, Any]:
    """Return more columns than have a digest each, of the same kinds."""
    times = range(ONE_BY_ONE // len(columns) + 1)
    return {f"{name} {number}": values for number in times for name, values in columns.items()}


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 2)

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.embedding(rows[:, 0] % 7)
        return found


def party(path: Path, columns: dict[str, Any], model: nn.Module | None = None, inputs: str = "tensor") -> PartyFile:
    table = pa.table({"id": IDS, **columns})
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        pa.parquet.write_table(table, path)
    base = {"model": model or nn.Linear(len(columns), 2), "optimizer": {"name": "sgd", "lr": 0.1}, "inputs": inputs}
    return PartyFile(party="bank", data={"path": path, "id": "id"}, base=base)


def both(file: PartyFile, aligned: list[int] | None = None) -> tuple[Table, Table]:
    """Read a table as it is, and as a worker keeps it."""
    spec = resolve(JOB, file, Importer()).table
    positions = None if aligned is None else np.array(aligned)
    return read_table(spec, positions), read_table(spec, positions, narrow=True)


def stages(file: PartyFile) -> tuple[TorchBaseStage, TorchBaseStage]:
    exact, narrow = both(file)
    return tuple(base_stage(JOB, file, table, JOB.batches(5)) for table in (exact, narrow))  # type: ignore[return-value]


def of_stage(stage: TorchBaseStage) -> Any:
    found = stage.inputs(np.arange(5))
    return list(found.values()) if isinstance(found, dict) else found if isinstance(found, list) else [found]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("columns", [NUMBERS, WHOLE, {"code": NUMBERS["code"]}, wide(NUMBERS), wide(WHOLE)])
@pytest.mark.parametrize("aligned", [None, [0, 3, 4]])
def test_the_fingerprint_is_that_of_the_table_as_it_is(
    tmp_path: Path, suffix: str, columns: dict[str, Any], aligned: list[int] | None
) -> None:
    file = party(tmp_path / f"rows{suffix}", columns)
    exact, narrow = both(file, aligned)
    compute = resolve(JOB, file, Importer()).compute
    assert fingerprint(compute, exact) == fingerprint(compute, narrow)
    assert exact.features is not None and narrow.features is not None
    assert exact.features_dtype == narrow.features_dtype == exact.features.dtype
    assert narrow.features.dtype == (np.int64 if columns.keys() == {"code"} else np.float32)
    np.testing.assert_array_equal(narrow.features, exact.features.astype(narrow.features.dtype))
    assert narrow.narrowed is None or np.array_equal(narrow.narrowed.exact(), exact.features)


@pytest.mark.parametrize("columns", [NUMBERS, WHOLE, {"code": NUMBERS["code"]}, wide(WHOLE)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inputs", ["tensor", "list"])
def test_a_model_of_any_dtype_gets_the_numbers_that_it_got_from_the_table_as_it_is(
    tmp_path: Path, columns: dict[str, Any], dtype: torch.dtype, inputs: str
) -> None:
    class Listed(nn.Linear):
        def forward(self, rows: Any) -> Tensor:  # type: ignore[override]
            return super().forward(rows if inputs == "tensor" else torch.stack(rows, 1).to(dtype))

    file = party(tmp_path / "rows.parquet", columns, Listed(len(columns), 2).to(dtype), inputs)
    exact, narrow = stages(file)
    for one, other in zip(of_stage(exact), of_stage(narrow), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert exact.remark == narrow.remark
    if dtype == torch.float32 and inputs == "tensor" and columns is NUMBERS:
        assert narrow.remark is not None and "'code' in 2 of 5 rows, column 'big' in 2 of 5 rows" in narrow.remark


def test_whole_numbers_reach_an_embedding_whole(tmp_path: Path) -> None:
    exact, narrow = stages(party(tmp_path / "rows.parquet", WHOLE, Embedded()))
    assert exact.features.dtype == narrow.features.dtype == np.int64
    np.testing.assert_array_equal(exact.features, narrow.features)


def test_numbers_beyond_float32_are_refused_as_before(tmp_path: Path) -> None:
    file = party(tmp_path / "rows.parquet", {"x": [1e39, 0.1, 0.2, 0.3, 0.4]})
    for table in both(file):
        with pytest.raises(JobError, match=r"column 'x' in 1 of 5 rows; scale them"):
            base_stage(JOB, file, table, JOB.batches(5))


def test_a_table_that_changes_before_it_is_read_again_is_refused(tmp_path: Path) -> None:
    file = party(tmp_path / "rows.parquet", NUMBERS)
    _, narrow = both(file)
    pa.parquet.write_table(pa.table({"id": [1, 2, 3, 4, 5], **NUMBERS}), tmp_path / "rows.parquet")
    assert narrow.narrowed is not None
    with pytest.raises(JobError, match="has changed while it was read"):
        narrow.narrowed.exact()


def test_a_wide_table_takes_no_more_than_its_numbers_where_there_is_no_room_for_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = resolve(JOB, party(tmp_path / "rows.parquet", wide(NUMBERS)), Importer()).table
    nowhere = replace(spec, scratch=tmp_path / "nowhere")
    exact, found = read_table(spec), read_table(nowhere, narrow=True)
    assert found.narrowed is None
    np.testing.assert_array_equal(exact.features, found.features)  # type: ignore[arg-type]
    assert "takes twice its memory: No such file" in caplog.text

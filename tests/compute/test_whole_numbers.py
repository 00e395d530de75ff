"""Whole numbers of a table stay whole, and a base model gets them in the form that it takes, exactly or with a word."""

import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sl_queue
from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.config.job import Job, PartyFile
from sl_queue.errors import JobError, ShapeError
from sl_queue.protocol.exactness import rounded
from sl_queue.protocol.table import Table
from tests.support.resolved import base_stage, fuse_stage, read_table, train_joined

JOB = Job(
    name="t",
    seed=1,
    epochs=2,
    batch_size=2,
    parties={"bank": {"role": "feature", "cut": [2]}, "insurer": {"role": "label"}},
)
SGD = {"name": "sgd", "lr": 0.1}
CODES = [16_777_216, 16_777_217, 20_240_131]  # float32 holds the first of them only


class Codes(nn.Module):
    """An embedding of a table's first column, which it takes as it comes or as whole numbers."""

    def __init__(self, cast: bool = False) -> None:
        super().__init__()
        self.embedding, self.cast = nn.Embedding(101, 2), cast

    def forward(self, rows: Tensor) -> Tensor:
        codes = rows[:, 0].long() if self.cast else rows[:, 0]
        found: Tensor = self.embedding(codes % 101)
        return found


def party(data: Any, model: nn.Module | None = None) -> PartyFile:
    return PartyFile(party="bank", data=data, base={"model": model or nn.Identity(), "optimizer": SGD})


def parquet(folder: Path, **columns: Any) -> dict[str, Any]:
    pa.parquet.write_table(pa.table({"id": [1, 2, 3], **columns}), folder / "rows.parquet")
    return {"path": folder / "rows.parquet", "id": "id"}


def csv(folder: Path, text: str) -> dict[str, Any]:
    (folder / "rows.csv").write_text(text)
    return {"path": folder / "rows.csv", "id": "id"}


def table(data: Any) -> Table:
    return read_table(JOB, party(data))


def features(data: Any) -> Any:
    return table(data).features


def stage(data: Any, model: nn.Module) -> TorchBaseStage:
    file, read = party(data, model), table(data)
    return base_stage(JOB, file, read, JOB.batches(read.n_rows))


def complaint(data: Any, model: nn.Module | None = None) -> str:
    with pytest.raises(JobError) as raised:
        table(data) if model is None else stage(data, model)
    return str(raised.value)


# The table ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1), st.sampled_from(["float16", "float32", "float64"]))
def test_a_whole_number_is_rounded_if_the_cast_there_and_back_gives_another(values: list[int], dtype: str) -> None:
    kept = [v for v in values if abs(v) < float(np.finfo(dtype).max)]
    there = [int(float(np.dtype(dtype).type(v))) for v in kept]
    assert rounded(np.array(kept, np.int64), dtype).tolist() == [v != w for v, w in zip(kept, there, strict=True)]


def test_a_table_of_whole_numbers_stays_whole(tmp_path: Path) -> None:
    lines = "".join(f"{i},{code}\n" for i, code in enumerate(CODES))
    for data in (csv(tmp_path, f"id,m\n{lines}"), parquet(tmp_path, m=CODES), parquet(tmp_path, m=pa.array(CODES))):
        assert features(data).dtype == np.int64
        assert features(data)[:, 0].tolist() == CODES


def test_decimals_without_a_fraction_are_whole_numbers(tmp_path: Path) -> None:
    read = features(parquet(tmp_path, m=pa.array([2**53 + 1, 5, 7]).cast(pa.decimal128(19, 0))))
    assert read.dtype == np.int64
    assert read[:, 0].tolist() == [2**53 + 1, 5, 7]


BEYOND = pa.array([Decimal(2**64 + number) for number in range(3)], pa.decimal128(20, 0))


@pytest.mark.parametrize("kind", [pa.decimal128(20, 0), pa.decimal256(50, 0), pa.decimal128(38, 4)])
def test_decimals_that_float64_rounds_are_refused_as_numbers_and_exact_as_categories(
    tmp_path: Path, kind: pa.DataType
) -> None:
    data = parquet(tmp_path, m=BEYOND.cast(kind))
    said = complaint(data)
    assert "whole numbers beyond 2**53 are decimals in column 'm' in 2 rows" in said
    assert "2**53" in complaint(sl_queue.Rows([1, 2, 3], pa.table({"m": BEYOND.cast(kind)})))
    read = read_table(JOB, party(data).replace(features={"m": {"kind": "category"}}))
    assert read.columns == ("m=other", "m missing", *(f"m={2**64 + number}" for number in range(3)))
    assert read.features is not None and read.features.argmax(axis=1).tolist() == [2, 3, 4]


def test_decimals_that_float64_holds_and_those_that_are_declared_to_be_numbers_are_floating(tmp_path: Path) -> None:
    exact = pa.array([2**70, 5, -(2**60)], pa.decimal128(30, 0))
    for kind in (pa.decimal128(30, 0), pa.decimal128(30, 2)):
        read = features(parquet(tmp_path, m=exact.cast(kind)))
        assert (read.dtype, read[:, 0].tolist()) == (np.float64, [2.0**70, 5.0, -(2.0**60)])
    mixed = pa.array([Decimal("9007199254740993.00"), Decimal("0.25"), Decimal(1)], pa.decimal128(30, 2))
    assert features(parquet(tmp_path, m=mixed))[:, 0].tolist() == [2.0**53, 0.25, 1.0]
    file = party(parquet(tmp_path, m=BEYOND)).replace(features={"m": {"kind": "number", "scale": "minmax"}})
    read = read_table(JOB, file).features
    assert read is not None and read[:, 0].tolist() == [0.0, 0.0, 0.0]


def test_numbers_that_features_leaves_as_they_are_are_noted_where_float32_rounds_them(tmp_path: Path) -> None:
    number = {"kind": "number", "scale": "none", "missing": "zero"}
    columns = {"m": [2**24 + 1, None, 20_240_131], "k": [1, 2**30, 2], "x": [0.5, 2e9, 1.0]}
    file = party(parquet(tmp_path, **columns)).replace(features={"*": number})
    (note,) = read_table(JOB, file).notes
    assert note.startswith("[features] m: whole numbers beyond 2**24 are rounded in float32 in 2 of 3 rows; if they ")
    scaled = file.replace(features={"m": {"kind": "number", "missing": "zero"}, "*": number})
    assert read_table(JOB, scaled).notes == ()


def test_labels_that_are_decimals_beyond_float64_are_refused(tmp_path: Path) -> None:
    data = {**parquet(tmp_path, x=[0.5, 1.5, 2.5], y=BEYOND), "label": "y"}
    fuse = {"model": nn.Linear(2, 1), "optimizer": SGD, "loss": "mse"}
    file = PartyFile(party="insurer", data={**data, "features": []}, fuse=fuse)
    with pytest.raises(JobError, match=r"label column 'y' holds 2 whole numbers beyond 2\*\*53, and float64 rounds"):
        read_table(JOB, file)


def test_what_a_column_holds_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    for kind in (pa.float32(), pa.float64()):
        read = features(parquet(tmp_path, m=CODES, amount=pa.array([0.5, 1.5, 2.5], kind)))
        assert read.dtype == np.float64
        assert read[:, 0].tolist() == CODES
    narrow = features(parquet(tmp_path, m=[1, 2**24, 2**30], amount=pa.array([0.5, 1.5, 2.5], pa.float32())))
    assert narrow.dtype == np.float32
    assert narrow[:, 0].tolist() == [1, 2**24, 2**30]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"m": [2**53 + 1, 5, 2**60 + 1], "x": [0.5, 1.5, 2.5]}, ["'m' in 2 rows", "2**53"]),
        ({"m": pa.array([2**63, 5, 7], pa.uint64())}, ["'m' in 1 row", "2**63"]),
    ],
)
def test_whole_numbers_that_no_dtype_holds_are_named(tmp_path: Path, columns: Any, expected: list[str]) -> None:
    said = complaint(parquet(tmp_path, **columns))
    for words in expected:
        assert words in said
    assert "number them 0, 1, 2" in said


@pytest.mark.parametrize("values", [["18446744073709551615", "18446744073709551614"], ["9007199254740993", "0.5"]])
def test_whole_numbers_of_a_csv_file_that_were_read_as_fractions_are_named(tmp_path: Path, values: list[str]) -> None:
    said = complaint(csv(tmp_path, "id,m\n" + "".join(f"{i},{v}\n" for i, v in enumerate(values))))
    assert "'m' in" in said and "rounded" in said
    assert features(csv(tmp_path, "id,m\n1,0.5\n2,1e300\n3,123450000000000000000\n")).dtype == np.float64


def test_unsigned_numbers_given_in_code_do_not_become_negative() -> None:
    assert "features go up to 18446744073709551615" in complaint(
        sl_queue.Rows([1, 2], np.array([[2**64 - 1], [1]], np.uint64))
    )


# The model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (nn.Linear(1, 2), np.float32),
        (nn.LazyLinear(2), np.float32),
        (nn.Linear(1, 2).double(), np.float64),
        (Codes(cast=True), np.float32),
        (Codes(), np.int64),
    ],
)
def test_a_model_gets_the_whole_numbers_of_a_file_as_floating_ones_unless_it_refuses(
    tmp_path: Path, model: nn.Module, dtype: Any
) -> None:
    built = stage(parquet(tmp_path, m=[7, 8, 9]), model)
    assert (built.features.dtype, built.remark) == (dtype, None)
    assert built.features[:, 0].tolist() == [7, 8, 9]


def test_codes_that_would_be_rounded_reach_a_model_that_takes_them_whole(tmp_path: Path) -> None:
    for model in (Codes(), Codes(cast=True)):
        built = stage(parquet(tmp_path, m=CODES), model)
        assert built.features.dtype == np.int64
        assert built.inputs(np.arange(3))[:, 0].tolist() == CODES
        assert built.remark is None


def test_numbers_that_the_models_dtype_rounds_are_noted_with_column_and_count(tmp_path: Path) -> None:
    fractions = {"m": CODES, "x": [0.5, 1.5, 2.5]}
    for columns, model in (({"m": CODES}, nn.Linear(1, 2)), (fractions, nn.Linear(2, 2))):
        remark = stage(parquet(tmp_path, **columns), model).remark
        assert remark is not None
        assert "beyond 2**24 are rounded in float32" in remark
        assert "column 'm' in 2 of 3 rows" in remark and "'x'" not in remark
    assert stage(parquet(tmp_path, **fractions), nn.Linear(2, 2).double()).remark is None


def test_integers_given_in_code_stay_so_for_a_model_that_takes_them_and_float_for_another() -> None:
    rows = sl_queue.Rows([1, 2, 3], np.array([[7], [8], [9]], np.uint8))
    assert stage(rows, nn.Linear(1, 2)).features.dtype == np.float32
    given = sl_queue.Rows([1, 2, 3], np.array([[7], [8], [9]]))
    assert stage(given, Codes(cast=True)).features.dtype == np.int64


@pytest.mark.parametrize(
    ("value", "model"),
    [(1e39, nn.Linear(2, 2)), (70_000.5, nn.Linear(2, 2).half()), (-70_000.0, nn.Linear(2, 2).half())],
)
def test_numbers_that_are_infinite_in_the_models_dtype_are_refused(
    tmp_path: Path, value: float, model: nn.Module
) -> None:
    said = complaint(parquet(tmp_path, x=[value, 1.5, 2.5], z=[0.5, 0.5, 0.5]), model)
    assert "column 'x' in 1 of 3 rows" in said and "infinite" in said and "'z'" not in said
    stage(parquet(tmp_path, x=[value, 1.5, 2.5], z=[0.5, 0.5, 0.5]), nn.Linear(2, 2).double())


def test_narrow_features_are_exact_in_a_wider_model() -> None:
    rows = sl_queue.Rows([1, 2], np.array([[2.0**25], [3.4e38]], np.float32))
    assert stage(rows, nn.Linear(1, 2).double()).remark is None
    assert stage(rows, nn.Linear(1, 2)).remark is None
    assert "infinite in float16" in complaint(rows, nn.Linear(1, 2).half())


def test_whole_numbers_that_are_infinite_in_the_models_dtype_are_refused_too(tmp_path: Path) -> None:
    assert "column 'm' in 1 of 3 rows" in complaint(parquet(tmp_path, m=[70_000, 1, 2]), nn.Linear(1, 2).half())
    assert stage(parquet(tmp_path, m=[70_000, 1, 2]), Codes().half()).features.dtype == np.int64


def test_a_model_that_takes_neither_form_is_told_why_in_both(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"cannot be multiplied.*in another form.*dtype"):
        stage(parquet(tmp_path, m=[7, 8, 9]), nn.Linear(3, 2))


# The run --------------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        return inputs[0].sum(1)


def files(data: Any, model: nn.Module) -> list[PartyFile]:
    labels = sl_queue.Rows([1, 2, 3], labels=[0.5, 1.5, 2.5])
    fuse = {"model": Sum(), "loss": "mse"}
    return [party(data, model), PartyFile(party="insurer", data=labels, fuse=fuse)]


@pytest.mark.parametrize("model", [nn.Linear(1, 2), Codes()])
def test_a_run_on_whole_numbers_equals_joined_training(
    tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    parties = files(parquet(tmp_path, m=CODES if isinstance(model, Codes) else [1, 2, 3]), model)
    result = sl_queue.run_local(JOB, parties)
    tables = {file.party: read_table(JOB, file) for file in parties}
    joined = train_joined(JOB, parties, tables, JOB.batches(3))
    for name, weight in result.base("bank").state_dict().items():
        assert torch.equal(weight, joined.bases["bank"].state_dict()[name])


def test_a_table_of_whole_numbers_trains_a_linear_model_to_the_bits_of_the_same_floating_numbers(
    tmp_path: Path,
) -> None:
    model = nn.Linear(1, 2)
    whole = sl_queue.run_local(JOB, files(parquet(tmp_path, m=[3, 1, 2]), model))
    floating = sl_queue.run_local(JOB, files(sl_queue.Rows([1, 2, 3], np.array([[3.0], [1], [2]], np.float32)), model))
    for name, weight in whole.base("bank").state_dict().items():
        assert torch.equal(weight, floating.base("bank").state_dict()[name])


def test_a_worker_warns_of_numbers_that_are_rounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = parquet(tmp_path, m=[1000.0, 2e7 + 1, 3.0], x=[0.5, 1.5, 2.5])
    job = JOB.model_copy(update={"epochs": 1})
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
    with caplog.at_level(logging.WARNING):
        sl_queue.run_local(job, files(data, model))
    assert [record.message for record in caplog.records if "column 'm' in 1 of 3 rows" in record.message]


def test_the_label_holders_own_base_model_is_looked_at_as_well(tmp_path: Path) -> None:
    job = Job(
        name="t",
        seed=1,
        epochs=1,
        batch_size=2,
        parties={"bank": JOB.parties["bank"], "insurer": {"role": "label", "cut": [2]}},
    )
    data = {**parquet(tmp_path, m=CODES, y=[0.5, 1.5, 2.5]), "label": "y"}
    base = {"model": nn.Linear(1, 2), "optimizer": SGD}
    file = PartyFile(party="insurer", data=data, base=base, fuse={"model": Sum(), "loss": "mse"})
    read = read_table(job, file)
    own = fuse_stage(job, file, read, job.batches(3)).own
    assert own is not None
    assert own.remark is not None and "column 'm'" in own.remark

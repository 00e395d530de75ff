"""Rows given in code are taken as data where they are numbers without gaps, whatever library they come from."""

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from sl_queue.config.job import Job, PartyFile
from sl_queue.data.rows import Rows
from sl_queue.errors import JobError
from sl_queue.protocol.table import Table
from tests.support.resolved import read_table

JOB = Job(
    name="t",
    seed=1,
    epochs=1,
    batch_size=2,
    parties={"bank": {"role": "feature", "cut": [1]}, "insurer": {"role": "label", "cut": [1]}},
)
IDS = [1, 2, 3]


@dataclass
class Series:
    """A column of another library, which knows how to become Arrow."""

    values: Any
    dtype: str = "its own"

    def __arrow_array__(self, type: Any = None) -> Any:
        return self.values if isinstance(self.values, pa.Array) else pa.array(self.values, type)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.values.to_pylist() if isinstance(self.values, pa.Array) else self.values, object)

    def to_numpy(self) -> Any:
        return self.__array__()

    def __len__(self) -> int:
        return len(self.values)


class Frame:
    """A table of another library, with columns of different types."""

    def __init__(self, **columns: Any) -> None:
        self._columns = columns
        self.columns, self.dtypes = list(columns), ["its own"] * len(columns)

    def __getitem__(self, name: str) -> Series:
        return Series(self._columns[name])


def table(features: Any, labels: Any = (0, 1, 1), ids: Any = IDS) -> Table:
    rows = Rows(ids, features, list(labels) if isinstance(labels, tuple) else labels)
    return read_table(JOB, PartyFile(party="insurer", data=rows))


def features(given: Any) -> Any:
    return table(given).features


def complaint(given: Any, labels: Any = (0, 1, 1), ids: Any = IDS) -> str:
    with pytest.raises(JobError) as raised:
        table(given, labels, ids)
    return str(raised.value)


GOOD = np.zeros((3, 1))
NULLS = pa.array([1, None, 3])


def masked(values: Any, dtype: Any = float) -> Any:
    return np.ma.masked_array(np.array(values, dtype), mask=np.array(values) == 9)


# Taken as data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "dtype", "expected"),
    [
        (Frame(age=[1.5, 2.5, 3.5], a=[True, False, True]), np.float64, [[1.5, 1], [2.5, 0], [3.5, 1]]),
        (Frame(n=pa.array([1, 2, 3], pa.int8()), a=[True, False, True]), np.int64, [[1, 1], [2, 0], [3, 1]]),
        (Frame(a=[True, False, True]), np.float32, [[1], [0], [1]]),
        (Frame(n=pa.array([1, 2, 3], pa.uint8())), np.uint8, [[1], [2], [3]]),
        (Frame(n=pa.array([5, 6, 5]).dictionary_encode(), x=[0.5, 1, 2]), np.float64, [[5, 0.5], [6, 1], [5, 2]]),
        (pa.table({"n": [1, 2, 3], "x": [0.5, 1.5, 2.5]}), np.float64, [[1, 0.5], [2, 1.5], [3, 2.5]]),
        (np.array([[1.5, True], [2, False], [3, True]], object), np.float64, [[1.5, 1], [2, 0], [3, 1]]),
        (np.array([[2**60, True], [2, False], [3, True]], object), np.int64, [[2**60, 1], [2, 0], [3, 1]]),
        ([[Decimal("0.5")], [Decimal(2)], [Decimal(3)]], np.float64, [[0.5], [2], [3]]),
        (np.ma.masked_array([[1.0], [2], [3]]), np.float64, [[1], [2], [3]]),
        (torch.tensor([[1.0], [2], [3]], requires_grad=True), np.float32, [[1], [2], [3]]),
        (torch.tensor([[1.0], [2], [3]], dtype=torch.bfloat16), np.float32, [[1], [2], [3]]),
        (torch.tensor([[1.0], [2], [3]]).to(torch.float8_e4m3fn), np.float32, [[1], [2], [3]]),
        (torch.tensor([[1.0], [0], [3]]).to_sparse(), np.float32, [[1], [0], [3]]),
        (pa.array([1, 2, 3]), np.int64, [1, 2, 3]),
        (Series(pa.array([True, False, True])), np.float32, [1, 0, 1]),
    ],
)
def test_numbers_without_gaps_are_taken_as_what_they_are(given: Any, dtype: Any, expected: list[Any]) -> None:
    read = features(given)
    assert read.dtype == dtype
    assert read.tolist() == expected


@pytest.mark.parametrize(
    "labels", [Series(pa.array([1, 0, 1])), Series(pa.array([True, False, True])), pa.array([1, 0, 1])]
)
def test_labels_of_other_libraries_are_whole_numbers(labels: Any) -> None:
    read = table(GOOD, labels).labels
    assert read is not None
    assert read.dtype == np.int64
    assert read.tolist() == [1, 0, 1]


@pytest.mark.parametrize("ids", [Series(pa.array([3, 1, 2])), pa.array([3, 1, 2]), np.ma.masked_array([3, 1, 2])])
def test_ids_of_other_libraries_are_read(ids: Any) -> None:
    read = table(np.array([[3.0], [1], [2]]), ids=ids)
    assert read.features is not None
    assert read.features.tolist() == [[1], [2], [3]]
    assert read.digest == table(GOOD).digest


def test_columns_keep_their_names() -> None:
    assert table(Frame(age=[1.5, 2, 3], a=[True, False, True])).columns == ("age", "a")


# Refused with the right reason ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (masked([[1], [9], [3]]), ["features: values are masked in 1 of 3 rows"]),
        (masked([[1], [9], [3]], int), ["features: values are masked in 1 of 3 rows"]),
        ([masked([1, 2]), masked([9, 2]), masked([1, 9])], ["values are masked in 2 of 3 rows"]),
        ([[masked([1, 2])], [masked([9, 2])], [masked([1, 2])]], ["values are masked in 1 of 3 rows"]),
        ([[1, 2.5], [np.ma.masked, 1], [1, 2]], ["values are masked in 1 of 3 rows"]),
        (Frame(x=[0.5, 1, 2], n=NULLS), ["values are missing in column 'n' in 1 of 3 rows"]),
        (Frame(a=pa.array([True, None, None]), x=NULLS), ["'a' in 2 of 3 rows, 'x' in 1 of 3 rows"]),
        (Frame(x=[0.5, float("inf"), 2], a=[True] * 3), ["infinity in column 'x' in 1 row"]),
        (Frame(x=[0.5, 1, 2], city=["a", "b", "c"]), ["these are not: 'city' (text)", "leave them out"]),
        (Frame(day=pa.array([1, 2, 3], pa.timestamp("ns"))), ["'day' (timestamp[ns])"]),
        (Frame(x=[0.5, 1, 2], key=pa.array([2**53 + 1, 1, 2])), ["beyond 2**53", "'key' in 1 row"]),
        (Frame(), ["there are no columns"]),
        (pa.table([[1, 2, 3], [1, 2, 3]], names=["x", "x"]), ["2 columns are called 'x'"]),
        (NULLS, ["values are missing in 1 of 3 rows"]),
        (np.array([[1.5], [None], [3]], object), ["values are missing in 1 of 3 rows"]),
        (np.array([[1.5], ["a"], [3]], object), ["1 of type str", "encode"]),
        (np.array([[2**64], [1], [3]], object), ["more than 64 bits"]),
        (np.array([[2**53 + 1], [0.5], [3]], object), ["beyond 2**53"]),
        (np.array([[np.int64(2**53 + 1)], [0.5], [3]], object), ["features: 1 whole numbers beyond 2**53"]),
        (np.array([[Decimal(2**53 + 1)], [Decimal(2**53)], [3]], object), ["features: 1 whole numbers beyond 2**53"]),
        (np.array([[Fraction(2**53 + 1)], [Fraction(1, 2)], [3]], object), ["features: 1 whole numbers beyond 2**53"]),
        ([[2**53 + 1, 0.5], [2**53, 0.5], [-(2**60) - 1, 0.5]], ["features: 2 whole numbers beyond 2**53"]),
        (np.array([["2024-01-01"]] * 3, "M8[D]"), ["encode dates as numbers"]),
        (np.zeros((3, 1), complex), ["complex"]),
        (np.zeros(3, [("a", float)]), ["records with fields"]),
        (np.array([[np.longdouble("1e400")], [1], [2]]), ["NaN or infinity in 1 of 3 rows"]),
        (torch.tensor([[1.0], [float("nan")], [3]]), ["NaN or infinity in 1 of 3 rows"]),
    ],
)
def test_what_is_no_number_is_refused_with_column_and_count(given: Any, expected: list[str]) -> None:
    said = complaint(given)
    for words in expected:
        assert words in said


def test_objects_that_float64_holds_or_that_are_fractions_are_taken() -> None:
    held = np.array([[2**60, Decimal("0.5")], [np.int64(2**53), Fraction(1, 4)], [Decimal(2**70), 1]], object)
    assert features(held).tolist() == [[2.0**60, 0.5], [2.0**53, 0.25], [2.0**70, 1.0]]
    money = np.array([[Decimal("9007199254740993.25")], [Decimal("0.25")], [Decimal("9007199254740993.00")]], object)
    assert features(money).tolist() == [[9007199254740993.25], [0.25], [2.0**53]]
    assert features([[2**60, 0.5], [1e300, 1], [2, 3]]).tolist() == [[2.0**60, 0.5], [1e300, 1.0], [2.0, 3.0]]


def test_ids_end_at_no_nul_whatever_holds_them() -> None:
    ids = ["a\0b", "a\0c", "d"]
    assert table(GOOD, ids=np.array(ids)).digest == table(GOOD, ids=ids).digest


def test_faults_of_ids_features_and_labels_are_told_at_once() -> None:
    said = complaint(masked([[1], [9], [3]]), [0, float("nan"), 1], masked([1, 9, 3], int))
    for words in (
        "3 things are wrong",
        "features: values are masked",
        "labels: NaN or infinity",
        "1 of 3 rows have no id",
    ):
        assert words in said


@pytest.mark.parametrize("ids", [Series([1, "a", 3]), [1, "a", 3], np.array([1, "a", 3], object)])
def test_ids_of_several_types_are_refused(ids: Any) -> None:
    assert "ids must be whole numbers of 64 bits, or all be text" in complaint(GOOD, ids=ids)


@pytest.mark.parametrize("ids", [None, 5, {3, 1, 2}, {3: "c", 1: "a", 2: "b"}])
def test_ids_that_are_no_list_are_refused(ids: Any) -> None:
    assert "they must be a list or an array" in complaint(GOOD, ids=ids)


def test_masked_labels_and_labels_with_gaps_are_refused() -> None:
    assert "labels: values are masked in 1 of 3 rows" in complaint(GOOD, masked([0, 9, 1], int))
    assert "labels: values are missing in 1 of 3 rows" in complaint(GOOD, Series(NULLS))


# Libraries ----------------------------------------------------------------------------------------------------


def test_frames_of_pandas_are_taken() -> None:
    frame = pd.DataFrame({"age": [1.5, 2, 3], "n": [1, 2, 3], "a": [True, False, True]}, index=[7, 8, 9])
    expected = [[1.5, 1, 1], [2, 2, 0], [3, 3, 1]]
    for given in (frame, frame.convert_dtypes(), frame.convert_dtypes(dtype_backend="pyarrow"), frame.astype(object)):
        assert features(given).tolist() == expected
    sparse = pd.get_dummies(pd.Series(["u", "v", "u"]), sparse=True)
    assert features(sparse).tolist() == [[1, 0], [0, 1], [1, 0]]
    assert "'p' (extension" in complaint(pd.DataFrame({"p": pd.period_range("2024-01", periods=3, freq="M")}))
    gap = pd.DataFrame({"n": pd.array([1, None, 3], "Int64"), "c": pd.Categorical(["u", "v", "u"])})
    assert "'n' in 1 of 3 rows" in complaint(gap) and "'c' (text)" in complaint(gap)
    assert (
        table(GOOD, pd.Series([1, 0, 1], dtype="Int64"), pd.Series(["c", "a", "b"], dtype="category")).id_type == "text"
    )
    assert "1 of 3 rows have no id" in complaint(GOOD, ids=pd.Series([1, None, 3]))
    assert table(GOOD, ids=pd.Index([3, 1, 2])).digest == table(GOOD).digest


def test_frames_of_polars_are_taken() -> None:
    frame = pl.DataFrame({"age": [1.5, 2, 3], "a": [True, False, True]})
    assert features(frame).tolist() == [[1.5, 1], [2, 0], [3, 1]]
    assert "give .collect()" in complaint(frame.lazy())
    assert "'x' in 1 of 3 rows" in complaint(pl.DataFrame({"x": [1, None, 3]}))
    assert table(GOOD, pl.Series([1, 0, 1]), pl.Series([3, 1, 2])).digest == table(GOOD).digest


@pytest.mark.parametrize("kind", [pa.table, pd.DataFrame, pl.DataFrame])
@pytest.mark.parametrize("holdout", [{"column": "month", "from": "2026-01"}, {"column": "age", "from": 2}])
def test_a_column_of_text_that_chooses_rows_is_no_feature_of_a_frame(kind: Any, holdout: Any) -> None:
    frame = kind({"month": ["2025-11", "2026-01", "2025-12"], "age": [1.0, 2.0, 1.0]})
    frame = frame if holdout["column"] == "month" else frame[["age"]] if kind is not pa.table else frame.select(["age"])
    job = JOB.replace(holdout=holdout)
    file = PartyFile(party=job.label_holder, data=Rows(IDS, frame, [0, 1, 0]))
    read = read_table(job, file)
    assert read.chosen is not None and read.chosen.held_out.tolist() == [1]
    assert read.features.tolist() == [[1.0], [2.0], [1.0]]


# A source and the folder of its file ----------------------------------------------------------------------------

SOURCE = """
import numpy as np
import sl_queue

def in_folder(folder):
    return sl_queue.Rows(ids=[1, 2], features=np.load(folder / "rows.npy"))

def beside_the_process():
    return sl_queue.Rows(ids=[1, 2], features=np.load("rows.npy"))
"""


def from_source(folder: Path, name: str) -> Table:
    np.save(folder / "rows.npy", np.array([[0.5], [1.5]]))
    (folder / "folder_rows.py").write_text(SOURCE)
    (folder / "bank.toml").write_text(f'party = "bank"\n[data]\nsource = "folder_rows:{name}"\n')
    return read_table(JOB, PartyFile.load(folder / "bank.toml"))


def test_a_source_with_a_parameter_folder_gets_the_folder_of_the_party_file(tmp_path: Path) -> None:
    read = from_source(tmp_path, "in_folder")
    assert read.features is not None
    assert read.features.tolist() == [[0.5], [1.5]]


def test_a_source_that_looks_beside_the_process_is_told_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(JobError) as raised:
        from_source(tmp_path, "beside_the_process")
    assert f"it was looked for in {Path.cwd()}" in str(raised.value)
    assert "parameter `folder`" in str(raised.value)


def test_a_source_built_in_code_gets_the_folder_of_the_process() -> None:
    found = []

    def rows(folder: Path) -> Rows:
        found.append(folder)
        return Rows([1], [[0.5]])

    read_table(JOB, PartyFile(party="bank", data={"source": rows}))
    assert found == [Path.cwd()]

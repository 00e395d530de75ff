"""Labels that are not known are NaN where they may be missing, in whatever form they are given."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest

from sl_queue.config.user_code import Importer
from sl_queue.data.given import labels_of
from sl_queue.data.spec import Choices, FileSpec, Stratified, TableSpec
from sl_queue.data.table import read_table
from sl_queue.protocol.table import Table

NAN = float("nan")
ONE, TWO = [1.0, NAN, 0.0, 1.0], [[1.0, 5.0], [NAN, 6.0], [0.0, NAN], [1.0, 8.0]]
FRAME = {"p": [True, None, False, True], "q": [5, 6, None, 8]}
GIVEN: dict[str, tuple[Any, Any]] = {
    "booleans of pandas": (pd.Series([True, None, False, True], dtype="boolean"), ONE),
    "whole numbers of pandas": (pd.Series([1, None, 0, 1], dtype="Int64"), ONE),
    "objects of pandas": (pd.Series([True, None, 0.0, Decimal(1)]), ONE),
    "booleans of polars": (pl.Series([True, None, False, True]), ONE),
    "booleans of Arrow": (pa.chunked_array([[True, None], [False, True]]), ONE),
    "a list with None": ([1, None, 0, 1], ONE),
    "objects with NA": (np.array([True, pd.NA, False, 1], dtype=object), ONE),
    "a masked array": (np.ma.array([1, 7, 0, 1], mask=[0, 1, 0, 0]), ONE),
    "booleans, masked": (np.ma.array([True, True, False, True], mask=[0, 1, 0, 0]), ONE),
    "a list of masked arrays": ([np.ma.array([1, 5]), np.ma.array([1, 6], mask=[1, 0]), [0, NAN], [1, 8]], TWO),
    "rows with None": ([[True, 5], [None, 6], [False, None], [True, 8]], TWO),
    "a frame of pandas": (pd.DataFrame(FRAME), TWO),
    "a frame of pandas with NaN": (pd.DataFrame({"p": ONE, "q": [5.0, 6.0, NAN, 8.0]}), TWO),
    "a frame of polars": (pl.DataFrame(FRAME), TWO),
    "a frame of polars with NaN": (pl.DataFrame({"p": ONE, "q": [5.0, 6.0, NAN, 8.0]}), TWO),
    "a table of Arrow": (pa.table(FRAME), TWO),
    "nothing but gaps": ([None, None], [NAN, NAN]),
    "a column of nothing": (pa.nulls(2), [NAN, NAN]),
}


@pytest.mark.parametrize("name", GIVEN)
def test_gaps_are_nan_where_labels_may_be_missing_and_refused_elsewhere(name: str) -> None:
    values, wanted = GIVEN[name]
    found = labels_of(values, missing=True)
    assert found.faults == ()
    assert found.array is not None
    np.testing.assert_array_equal(found.array, np.array(wanted))
    (fault,) = labels_of(values).faults
    assert fault.startswith("labels: ")


@pytest.mark.parametrize("values", [pd.Series([1, 0], dtype="int8"), pl.DataFrame({"p": [1, 0]}), [True, False]])
def test_labels_without_gaps_are_what_they_were(values: Any) -> None:
    as_ever, found = labels_of(values), labels_of(values, missing=True)
    assert as_ever.array is not None
    assert found.array is not None
    assert found.array.dtype == as_ever.array.dtype == np.int64
    np.testing.assert_array_equal(found.array, as_ever.array)


@pytest.mark.parametrize("values", [["yes", None], pd.Series(["yes", None]), pd.DataFrame({"y": ["yes", None]})])
def test_text_with_gaps_is_refused_as_text(values: Any) -> None:
    (fault,) = labels_of(values, missing=True).faults
    assert "encode text as numbers" in fault or "columns must be numbers, these are not: 'y'" in fault


def read(data: FileSpec, **more: Any) -> Table:
    code = Importer()
    spec = TableSpec("shop", data, features=True, labels=True, holdout_seed=1, code=code, missing_labels=True, **more)
    return read_table(spec)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_booleans_of_a_file_may_have_gaps(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"shop{suffix}"
    if suffix == ".csv":
        path.write_text("id,x,p,q\n1,1,true,5\n2,1,,6\n3,2,false,\n4,1,true,8\n")
    else:
        pa.parquet.write_table(pa.table({"id": [1, 2, 3, 4], "x": [1, 1, 2, 1], **FRAME}), path)
    one = read(FileSpec(path, ("id",), features=("x",), label="p")).labels
    two = read(FileSpec(path, ("id",), features=("x",), label=("p", "q"))).labels
    assert one is not None
    assert two is not None
    np.testing.assert_array_equal(one, np.array(ONE))
    np.testing.assert_array_equal(two, np.array(TWO))


def test_the_same_share_is_held_out_of_the_rows_without_a_label(tmp_path: Path) -> None:
    labels = [None, 0, 1, 1] * 10
    pa.parquet.write_table(pa.table({"id": range(40), "x": [0.5] * 40, "y": labels}), tmp_path / "shop.parquet")
    data = FileSpec(tmp_path / "shop.parquet", ("id",), label="y")
    chosen = read(data, choices=Choices(Stratified(0.2), 0.0)).chosen
    assert chosen is not None
    held_out = [labels[row] for row in chosen.held_out]
    assert (held_out.count(None), held_out.count(0), held_out.count(1)) == (2, 2, 4)

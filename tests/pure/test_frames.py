"""Columns of data frames, and arrays, whatever they are made of."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from sl_queue.config.user_code import Importer
from sl_queue.data.feature_specs import Category, Number
from sl_queue.data.spec import ByColumn, Choices, Rows, TableSpec
from sl_queue.data.table import holdout_rows, read_table
from sl_queue.errors import JobError
from sl_queue.protocol.table import Table


def read(rows: Rows, **more: Any) -> Table:
    return read_table(TableSpec("shop", rows, features=True, labels=True, holdout_seed=1, code=Importer(), **more))


@pytest.mark.parametrize("kind", ["i8", "i4", "u8", "u2"])
@pytest.mark.parametrize("form", [np.array, pd.Series, np.ma.array])
def test_ids_of_another_byte_order_are_the_same_ids(kind: str, form: Any) -> None:
    there, here = (form(np.arange(300, 304).astype(order + kind)) for order in "><")
    assert (
        read(Rows(there, np.ones((4, 1)), [0, 1, 0, 1])).digest
        == read(Rows(here, np.ones((4, 1)), [0, 1, 0, 1])).digest
    )
    np.testing.assert_array_equal(holdout_rows(there, 1, 0.5), holdout_rows(here, 1, 0.5))


@pytest.mark.parametrize("declared", [None, {"a": Number(scale="none")}])
def test_features_and_labels_of_another_byte_order_are_the_same_numbers(declared: Any) -> None:
    values, labels = np.arange(300, 304).astype(">f8"), np.arange(4).astype(">i4")
    table = read(Rows([1, 2, 3, 4], pd.DataFrame({"a": values}), labels), declared=declared)
    assert table.features is not None
    assert table.labels is not None
    assert table.features.dtype.isnative
    assert table.features.ravel().tolist() == [300, 301, 302, 303]
    assert table.labels.tolist() == [0, 1, 2, 3]


MIXED = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0], "g": [7, "north", 7, None]})


@pytest.mark.parametrize("declared", [None, {"x": Number()}, {"*": Category()}])
@pytest.mark.parametrize("choice", [ByColumn("g", values=(7, "north")), ByColumn("g", 5)])
def test_a_column_of_several_types_that_chooses_rows_is_refused_by_name(declared: Any, choice: ByColumn) -> None:
    with pytest.raises(JobError) as caught:
        read(Rows([1, 2, 3, 4], MIXED, [0, 1, 0, 1]), declared=declared, choices=Choices(choice, 0.0))
    told = "party 'shop', data: column 'g' holds objects of 3 types (int, str, NoneType); make it a column "
    assert str(caught.value) == told + "of numbers, or of text"


def test_each_column_that_features_cannot_take_is_named() -> None:
    frame = pd.DataFrame({"s": pd.arrays.SparseArray([0.0, 1.0]), "c": [1j, 2j], "m": [1, "a"], "x": [1.0, 2.0]})
    with pytest.raises(JobError) as caught:
        read(Rows([1, 2], frame, [0, 1]), declared={"*": Number()})
    first, *faults = str(caught.value).splitlines()
    assert first == "party 'shop', data: 3 things are wrong"
    assert [fault.split(";")[0] for fault in faults] == [
        "  column 's' holds values of type Sparse[float64, nan]",
        "  column 'c' holds values of type complex128",
        "  column 'm' holds objects of 2 types (int, str)",
    ]


INTERVALS = pd.DataFrame({"x": [1.0, 2.0], "g": pd.cut([1.0, 2.0], [0, 1.5, 3])})


@pytest.mark.parametrize("declared", [None, {"x": Number(), "g": Category()}])
@pytest.mark.parametrize("form", [lambda frame: frame, pa.Table.from_pandas])
def test_a_column_of_intervals_is_refused_by_name(form: Any, declared: Any) -> None:
    with pytest.raises(JobError, match="'g'"):
        read(Rows([1, 2], form(INTERVALS), [0, 1]), declared=declared)


def test_a_column_may_be_called_as_a_method_of_another_kind_of_table() -> None:
    frame = pd.DataFrame({"collect": [1.0, 2.0]})
    assert read(Rows([1, 2], frame, [0, 1]), declared={"collect": Number()}).columns == ("collect",)


def test_columns_that_choose_rows_are_set_aside_where_rows_are_chosen_already() -> None:
    frame = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0], "d": ["a", "b", "a", "b"]})
    choices = Choices(ByColumn("d", values=("a",)), 0.0)
    rows = Rows([1, 2, 3, 4], frame, [0, 1, 0, 1])
    spec = TableSpec("shop", rows, features=True, labels=True, holdout_seed=1, code=Importer(), choices=choices)
    first = read_table(spec)
    assert first.chosen is not None
    again = read_table(spec, chosen=first.chosen)
    assert (again.columns, again.digest) == (("x",), first.digest)

"""Columns of data frames, and arrays, whatever they are made of."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from sl_queue.config.user_code import Importer
from sl_queue.data.feature_specs import Number
from sl_queue.data.spec import Rows, TableSpec
from sl_queue.data.table import holdout_rows, read_table
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

"""Tables of a notebook, split by party: columns by their names, whatever type a name has, and clear words otherwise."""

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from sl_queue.errors import JobError
from sl_queue.local.given_rows import Given, by_party

PARTIES = {"bank": None, "shop": None}
BANK = pd.DataFrame({0: [1.0, 2.0], 1: [3.0, 4.0]})
JOINED = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0], "w": [5.0, 6.0]})
WHOSE = {"bank": ["a", "b"], "shop": ["w"]}


def split(features: Any, labels: Any, columns: Any = None, id: str | None = None) -> dict[str, Given]:
    return by_party(features, PARTIES, columns, "shop", labels, id)


@pytest.mark.parametrize(("label", "id"), [("1", "0"), (1, "0"), ("1", None)])
def test_columns_whose_names_are_numbers_are_found(label: Any, id: str | None) -> None:
    shop = pd.DataFrame({0: [7, 8], 1: [1, 0], 2: [5.0, 6.0]})
    found = split({"bank": BANK, "shop": shop}, label, id=id)["shop"]
    assert list(found.labels) == [1, 0]
    assert list(found.ids) == ([0, 1] if id is None else [7, 8])
    assert list(found.features.columns) == ([0, 2] if id is None else [2])


def test_a_name_is_taken_as_it_is_where_the_table_has_it() -> None:
    shop = pd.DataFrame([[1, 10, 5.0], [0, 11, 6.0]], columns=[1, "1", "w"])
    assert list(split({"bank": BANK, "shop": shop}, "1")["shop"].labels) == [10, 11]
    assert list(split({"bank": BANK, "shop": shop}, 1)["shop"].labels) == [1, 0]


def test_an_id_that_is_a_number_is_no_feature_of_a_joined_table() -> None:
    joined = pd.DataFrame({0: [7, 8], 1: [1.0, 2.0], 2: [5.0, 6.0]})
    found = split(joined, [1, 0], {"bank": ["0", "1"], "shop": [2]}, id="0")
    assert list(found["bank"].features.columns) == [1]
    assert list(found["shop"].ids) == [7, 8]


@pytest.mark.parametrize("table", [JOINED, pl.from_pandas(JOINED), pa.table(JOINED)], ids=["pandas", "polars", "arrow"])
def test_a_column_that_is_not_there_is_named_with_its_party(table: Any) -> None:
    assert split(table, [1, 0], WHOSE)["bank"].n_rows == 2
    with pytest.raises(JobError, match=r"^columns of 'bank': there is no column 'q'; the table's are a, b, w$"):
        split(table, [1, 0], {**WHOSE, "bank": ["a", "q"]})


@pytest.mark.parametrize("table", [JOINED.to_numpy(), torch.tensor(JOINED.to_numpy())], ids=["numpy", "torch"])
@pytest.mark.parametrize("wrong", [[0, 3], ["a"]])
def test_a_place_that_an_array_does_not_have_is_named_with_its_party(table: Any, wrong: list[Any]) -> None:
    assert split(table, [1, 0], {"bank": [0, 1], "shop": [2]})["bank"].features.shape == (2, 2)
    with pytest.raises(JobError, match=r"columns of 'bank': the table, a \w+ of the shape \(2, 3\), does not"):
        split(table, [1, 0], {"bank": wrong, "shop": [2]})


def test_what_is_not_computed_yet_is_refused_wherever_it_is_given() -> None:
    lazy, told = pl.from_pandas(JOINED).lazy(), "a LazyFrame is not computed yet; give .collect()"
    for features, labels, where in (
        ({"bank": lazy, "shop": JOINED}, [1, 0], "the table of 'bank'"),
        ({"bank": JOINED, "shop": JOINED}, lazy, "labels"),
        (lazy, [1, 0], "the table"),
    ):
        with pytest.raises(JobError) as caught:
            split(features, labels, WHOSE)
        assert str(caught.value) == f"{where}: {told}"
    named = JOINED.rename(columns={"a": "collect"})
    assert split({"bank": named, "shop": JOINED}, [1, 0])["bank"].n_rows == 2


def test_labels_that_are_one_number_name_a_column_and_others_are_refused() -> None:
    with pytest.raises(JobError, match="1 names a column, and the table is a ndarray without names"):
        split({"bank": np.ones((2, 1)), "shop": np.ones((2, 1))}, 1)
    with pytest.raises(JobError, match="labels: a float has no rows; give an array, or a data frame"):
        split({"bank": BANK, "shop": BANK}, 0.5)

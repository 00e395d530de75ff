"""Rows to predict: the columns that a model was trained on, and no others, whatever else the table has."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest

from sl_queue.config.user_code import Importer
from sl_queue.data.feature_specs import Category, Number
from sl_queue.data.spec import FileSpec, Rows, TableSpec
from sl_queue.data.table import read_table
from sl_queue.data.to_predict import ToPredict, read_to_predict
from sl_queue.errors import JobError

IDS, CODES, AMOUNTS = [3, 1, 2], [70, 10, 20], [5, 6, 7]
OWN = {"id": IDS, "code": CODES, "amount": AMOUNTS}
FURTHER: dict[str, list[Any]] = {
    "text": ["a", "b", "c"],
    "gaps": [None, 1, None],
    "fractions": [0.5, 0.25, 0.125],
    "large": [2**60 + 1, 2, 3],
}
Form = Callable[[Path, Mapping[str, Sequence[Any]]], FileSpec | Rows]


def as_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> FileSpec:
    pd.DataFrame(columns).convert_dtypes().to_csv(path / "t.csv", index=False)
    return FileSpec(path / "t.csv", ("id",))


def as_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> FileSpec:
    pa.parquet.write_table(pa.table(dict(columns)), path / "t.parquet")
    return FileSpec(path / "t.parquet", ("id",))


def as_rows(frame: Callable[[Any], Any]) -> Form:
    return lambda _, columns: Rows(columns["id"], frame({n: list(c) for n, c in columns.items() if n != "id"}))


FORMS = (as_csv, as_parquet, as_rows(pd.DataFrame), as_rows(pl.DataFrame), as_rows(pa.table))
each_form = pytest.mark.parametrize("form", FORMS, ids=["csv", "parquet", "pandas", "polars", "arrow"])


def trained(data: FileSpec | Rows, declared: Any) -> Callable[[FileSpec | Rows], ToPredict]:
    """Return a reader of other rows, for a model that was trained on these."""
    about: dict[str, Any] = {"features": True, "labels": False, "holdout_seed": 1, "code": Importer()}
    table = read_table(TableSpec("bank", data, declared=declared, **about))
    return lambda other: read_to_predict(
        TableSpec("bank", other, declared=declared, **about), None, table.fitted, table.columns
    )


@each_form
@pytest.mark.parametrize("declared", [None, {"code": Category(), "amount": Number()}, {"*": Number()}])
def test_further_columns_change_no_bit_of_what_is_read(tmp_path: Path, form: Form, declared: Any) -> None:
    predict = trained(form(tmp_path, OWN), declared)
    plain = predict(form(tmp_path, OWN)).table
    assert plain.features is not None
    for name in FURTHER:
        found = predict(form(tmp_path, {"id": IDS, name: FURTHER[name], "amount": AMOUNTS, "code": CODES})).table
        assert found.features is not None
        assert found.features.dtype == plain.features.dtype
        assert found.features.tobytes() == plain.features.tobytes()
        assert (found.columns, found.digest) == (plain.columns, plain.digest)


@each_form
@pytest.mark.parametrize("declared", [None, {"code": Number(), "amount": Number()}, {"*": Number()}])
def test_a_column_that_was_trained_on_and_is_not_there_is_named(tmp_path: Path, form: Form, declared: Any) -> None:
    predict = trained(form(tmp_path, OWN), declared)
    with pytest.raises(JobError) as caught:
        predict(form(tmp_path, {"id": IDS, "amount": AMOUNTS, **FURTHER}))
    assert str(caught.value).endswith(": the model was trained with the column 'code', which is not there")
    with pytest.raises(JobError) as caught:
        predict(form(tmp_path, {"id": IDS, **FURTHER}))
    assert str(caught.value).count("\n") == 2
    assert "the model was trained with the column 'amount', which is not there" in str(caught.value)


@pytest.mark.parametrize("declared", [None, {"*": Number(scale="none")}])
@pytest.mark.parametrize(
    ("kind", "text", "other"),
    [
        ("svmlight", "1 0 3:5 4:1\n2 1 3:2\n", "1 0 4:7 9:1\n2 1 5:1\n"),
        ("tag:value", "1,3:5,4:1\n2,3:2\n", "1,4:7\n2\n"),
    ],
)
def test_a_column_that_is_zero_in_every_row_is_left_out_of_such_files(
    tmp_path: Path, kind: Any, text: str, other: str, declared: Any
) -> None:
    (tmp_path / "rows.txt").write_text(text)
    (tmp_path / "new.txt").write_text(other)
    label: Any = {"exclude": ("label",)} if kind == "svmlight" else {}
    data, new = (FileSpec(tmp_path / name, ("id",), format=kind, **label) for name in ("rows.txt", "new.txt"))
    found = trained(data, declared)(new).table
    assert found.columns == ("3", "4")
    np.testing.assert_array_equal(found.features, [[0, 7], [0, 0]])

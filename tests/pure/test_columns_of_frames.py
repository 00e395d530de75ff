"""Columns of a data frame that a source returns: none is lost to another of its name, none stays that is excluded."""

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import table_spec
from sl_queue.config.user_code import Importer
from sl_queue.data.rows import Rows, read_raw
from sl_queue.errors import JobError
from sl_queue.protocol.table import Table
from tests.support.tables import read_table

PARTIES = {"bank": {"role": "feature", "cut": [1]}, "insurer": {"role": "label", "cut": [1]}}
NUMBERS = {"*": {"kind": "number", "scale": "none"}}
VALUES = {"a": [1.0, 2.0], "leak": [0.0, 9.0], "leak_too": [5.0, 6.0]}
TWO_ROWS = [[1.0, 10.0], [2.0, 20.0]]


def job(**more: Any) -> Job:
    return Job(name="t", seed=1, epochs=1, batch_size=2, parties=PARTIES, **more)


def read(features: Any, declared: dict[str, Any] | None = None, **data: Any) -> Table:
    about = {} if declared is None else {"features": declared}
    source = {"source": lambda: Rows([1, 2], features), **data}
    return read_table(job(), PartyFile(party="bank", data=source, **about))


def complaint(features: Any, declared: dict[str, Any] | None = None, **data: Any) -> str:
    with pytest.raises(JobError) as raised:
        read(features, declared, **data)
    return str(raised.value)


@pytest.mark.parametrize("declared", [None, NUMBERS])
@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (pd.DataFrame(TWO_ROWS, columns=["a", "a"]), "features: 2 columns are called 'a'; rename them"),
        (pd.DataFrame(TWO_ROWS, columns=[1, "1"]), "features: 2 columns are called '1'; rename them"),
        (pa.table([[1.0, 2.0], [3.0, 4.0]], names=["a", "a"]), "features: 2 columns are called 'a'; rename them"),
    ],
)
def test_columns_of_one_name_are_refused_with_it(frame: Any, told: str, declared: Any) -> None:
    assert complaint(frame, declared).endswith(told)


def test_arrays_of_one_name_are_refused_with_it() -> None:
    told = complaint({1: np.ones(2), "1": np.zeros(2)})
    assert told.endswith("features: 2 arrays are called '1'; rename them")


def test_columns_of_one_name_choose_no_rows() -> None:
    frame = pd.DataFrame([[1.0, "2025", "2026"], [2.0, "2026", "2025"]], columns=["a", "when", "when"])
    told = job(holdout={"column": "when", "from": "2026"})
    data = {"source": lambda: Rows([1, 2], frame, [0, 1])}
    model = {"model": "m:f", "optimizer": {"name": "sgd", "lr": 0.1}}
    holder = PartyFile(party="insurer", data=data, base=model, fuse=model | {"loss": "mse"})
    with pytest.raises(JobError, match="2 columns are called 'when'; rename them"):
        read_table(told, holder)


@pytest.mark.parametrize("declared", [None, NUMBERS])
@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame, pa.table, lambda v: pa.RecordBatch.from_pydict(v)])
def test_what_is_excluded_of_a_sources_frame_is_no_feature(frame: Any, declared: Any) -> None:
    table = read(frame(VALUES), declared, exclude=["leak*"])
    assert table.features is not None
    assert (table.columns, table.features.tolist()) == (("a",), [[1.0], [2.0]])
    data = {"source": lambda: Rows([1, 2], frame(VALUES)), "exclude": ["leak*"]}
    assert [*read_raw(table_spec(job(), PartyFile(party="bank", data=data), Importer()), {})] == ["a"]
    assert "there are no columns" in complaint(frame(VALUES), declared, exclude=["*"])


def test_what_is_excluded_of_several_arrays_is_no_feature() -> None:
    table = read({name: np.array(values) for name, values in VALUES.items()}, exclude=["leak*"])
    assert table.features is not None and table.features.dtype.names == ("a",)


def test_a_frame_with_columns_of_one_name_of_which_one_is_excluded_can_be_read() -> None:
    frame = pd.DataFrame([[1.0, 2.0, 3.0]] * 2, columns=["leak", "a", "leak"])
    assert read(frame, exclude=["leak"]).columns == ("a",)


@pytest.mark.parametrize("features", [np.ones((2, 3)), [np.ones((2, 1)), np.ones((2, 2)), np.ones((2, 3))]])
def test_exclude_is_refused_where_columns_have_no_names(features: Any) -> None:
    assert "data.exclude names columns, and these features have no names" in complaint(features, exclude=["leak"])

"""Columns of a prediction file, from outputs of every task and meaning, in the order of the label holder's file."""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from sl_queue.compute.predicted import columns_of
from sl_queue.data.predictions import write_predictions
from sl_queue.errors import ComputeError, JobError
from sl_queue.privacy.response import Response, undone

LOGITS = np.array([[-1.0, 2.0, 0.5], [3.0, 0.0, -2.0]], np.float32)


def test_one_logit_becomes_the_probability_that_torch_computes() -> None:
    found = columns_of(LOGITS[:, :1], "binary", "logits")
    assert list(found) == ["probability"]
    assert np.array_equal(found["probability"], torch.sigmoid(torch.from_numpy(LOGITS[:, 0])).numpy())


def test_classes_are_the_largest_and_their_probabilities_stand_beside() -> None:
    found = columns_of(LOGITS, "multiclass", "logits")
    assert found["class"].tolist() == [1, 0]
    assert np.allclose(sum(found[f"probability_{k}"] for k in range(3)), 1.0)
    already = columns_of(np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True), "multiclass", "probabilities")
    assert np.allclose(found["probability_2"], already["probability_2"])
    logs = torch.from_numpy(LOGITS).log_softmax(1).numpy()
    assert np.allclose(found["probability_2"], columns_of(logs, "multiclass", "log_probabilities")["probability_2"])


def test_a_response_is_undone_on_probabilities_and_keeps_the_class() -> None:
    two, three = Response(1.0, (0.0, 1.0)), Response(1.0, (0.0, 1.0, 2.0))
    plain = columns_of(LOGITS[:, :1], "binary", "logits")["probability"]
    found = columns_of(LOGITS[:, :1], "binary", "logits", partial(undone, response=two))["probability"]
    flip = 1 / (1 + np.e)  # p = (p' - q) / (1 - 2q), clipped
    assert np.allclose(found, np.clip((plain - flip) / (1 - 2 * flip), 0, 1), atol=1e-6)
    assert found.dtype == plain.dtype
    many = columns_of(LOGITS, "multiclass", "logits", partial(undone, response=three))
    assert many["class"].tolist() == [1, 0]
    assert np.allclose(sum(many[f"probability_{k}"] for k in range(3)), 1.0)
    assert many["probability_1"][0] > columns_of(LOGITS, "multiclass", "logits")["probability_1"][0]


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_what_is_no_chance_of_a_class_is_left_as_it_is(task: str) -> None:
    undo = partial(undone, response=Response(1.0, (0.0, 1.0)))
    found, plain = columns_of(LOGITS, task, "logits", undo), columns_of(LOGITS, task, "logits")
    assert all(np.array_equal(found[name], plain[name]) for name in plain)


def test_numbers_stay_what_they_are() -> None:
    assert np.array_equal(columns_of(LOGITS[:, 0], "regression", "logits")["value"], LOGITS[:, 0])
    assert list(columns_of(LOGITS, "regression", "logits")) == ["value_0", "value_1", "value_2"]
    with pytest.raises(ComputeError, match="one per class"):
        columns_of(LOGITS[:, :1], "multiclass", "logits")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_file_has_the_order_of_the_ids_and_no_row_for_those_without_a_prediction(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / "deep" / f"predictions{suffix}"
    ids, positions = pa.array(["c", "a", "b"]), np.array([1, -1, 0])
    assert write_predictions(path, {"id": ids}, positions, {"value": np.array([10.0, 20.0])}) == 2
    table = pa.csv.read_csv(path) if suffix == ".csv" else pa.parquet.read_table(path)
    assert table.to_pydict() == {"id": ["c", "b"], "value": [20.0, 10.0]}
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_name_that_says_no_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"ends in \.parquet or \.csv"):
        write_predictions(tmp_path / "out.xlsx", {"id": pa.array([1])}, np.array([0]), {})


@pytest.mark.parametrize("name", ["out.parquet", "out.csv"])
def test_a_column_of_the_id_is_not_written_over_by_a_prediction_of_its_name(tmp_path: Path, name: str) -> None:
    ids = {
        "class": pa.array(["4b", "4c"]),
        "probability_0": pa.array([7, 8]),
        "predicted_probability_0": pa.array([5, 6]),
    }
    columns = columns_of(np.array([[0.0, 0.0], [0.0, 999.0]], np.float32), "multiclass", "logits")
    write_predictions(tmp_path / name, ids, np.array([0, 1]), columns)
    read = pa.csv.read_csv if name == "out.csv" else pa.parquet.read_table
    assert read(tmp_path / name).to_pydict() == {
        **{column: values.to_pylist() for column, values in ids.items()},
        "predicted_class": [0, 1],
        "predicted_predicted_probability_0": [0.5, 0.0],
        "probability_1": [0.5, 1.0],
    }

"""Metrics of training rows, and the tables in the last line of the history."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve
from torch import nn

from sl_queue import run_local
from sl_queue.compute.epoch_tables import tables_of
from sl_queue.compute.other_metrics import Task
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import agree
from sl_queue.data.spec import Rows
from sl_queue.errors import JobError
from sl_queue.protocol.messages import MicroBatch
from tests.support.split import Parties, table_of

ROWS = 40


def run_of(loss: Any = "bce_with_logits", outputs: int = 1, job: Any = None, **fuse: Any) -> Parties:
    torch.manual_seed(1)
    draw = np.random.default_rng(1)
    features = draw.normal(size=(ROWS, 3)).astype(np.float32)
    labels = draw.integers(0, max(2, outputs), ROWS) if loss != "mse" else draw.normal(size=ROWS)
    given = {"bank": nn.Linear(3, 4), "fuse": nn.Linear(4, outputs)}
    sgd = {"name": "sgd", "lr": 0.5}
    settings: dict[str, Any] = {
        "name": "t",
        "seed": 7,
        "epochs": 3,
        "batch_size": 10,
        "holdout": 0.25,
        "parties": {"bank": {"role": "feature", "cut": [4]}, "holder": {"role": "label"}},
        "fuse": {"aggregation": "sum"},
        "pipeline": {"micro_batches": 2, "checkpoint_every": 1},
    }
    files = {
        "bank": PartyFile(
            party="bank", data=Rows(np.arange(ROWS), features), base={"model": given["bank"], "optimizer": sgd}
        ),
        "holder": PartyFile(
            party="holder",
            data=Rows(np.arange(ROWS), None, labels),
            fuse={"model": given["fuse"], "optimizer": sgd, "loss": loss, **fuse},
        ),
    }
    tables = {"bank": table_of(features), "holder": table_of(None, labels)}
    return Parties(Job(**settings | (job or {})), files, tables, given)


def test_the_last_line_of_the_history_holds_the_tables(tmp_path: Any) -> None:
    run = run_of(metrics=["accuracy"])
    result = run_local(run.job, list(run.files.values()), out=tmp_path)
    assert ["tables" in line for line in result.history] == [False, False, True]
    for folder in ("scheduler", "holder"):
        lines = [json.loads(line) for line in (tmp_path / folder / "history.jsonl").read_text().splitlines()]
        assert lines[-1]["tables"] == result.history[-1]["tables"]
    tables = result.history[-1]["tables"]
    assert set(tables) == {"confusion", "calibration", "thresholds"}
    right = tables["confusion"][0][0] + tables["confusion"][1][1]
    assert right / 10 == pytest.approx(result.history[-1]["holdout"]["accuracy"])
    assert run_local(run.job, list(run.files.values()), out=tmp_path).history == result.history


def test_where_a_run_may_end_early_each_line_may_be_the_last() -> None:
    run = run_of(metrics=["accuracy"], job={"early_stopping": {"metric": "accuracy", "patience": 1}, "epochs": 20})
    history = run_local(run.job, list(run.files.values())).history
    assert len(history) < 20
    assert all("tables" in line for line in history)


@pytest.mark.parametrize(("loss", "fuse"), [("mse", {"metrics": ["rmse"]}), ("bce_with_logits", {})])
def test_numbers_have_no_tables_and_neither_has_a_run_without_metrics(loss: str, fuse: dict[str, Any]) -> None:
    run = run_of(loss, **fuse)
    assert all("tables" not in line for line in run_local(run.job, list(run.files.values())).history)


def test_tables_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(2)
    scores, y, w = draw.random(300), draw.integers(0, 2, 300), draw.integers(1, 4, 300).astype(float)
    found = tables_of(Task.BINARY, *map(torch.from_numpy, (scores, y, w)))
    assert found is not None
    assert found["confusion"] == sklearn.confusion_matrix(y, scores > 0.5, sample_weight=w).tolist()
    plain = tables_of(Task.BINARY, torch.from_numpy(scores), torch.from_numpy(y))
    assert plain is not None
    share, mean = calibration_curve(y, scores, n_bins=10)
    assert np.allclose([row[3] for row in plain["calibration"]], mean)
    assert np.allclose([row[4] for row in plain["calibration"]], share)
    for threshold, precision, recall, f1, accuracy in found["thresholds"]:
        guessed = scores > threshold
        assert precision == pytest.approx(sklearn.precision_score(y, guessed, sample_weight=w))
        assert recall == pytest.approx(sklearn.recall_score(y, guessed, sample_weight=w))
        assert f1 == pytest.approx(sklearn.f1_score(y, guessed, sample_weight=w))
        assert accuracy == pytest.approx(sklearn.accuracy_score(y, guessed, sample_weight=w))


def test_of_many_classes_there_is_no_confusion_that_nobody_reads() -> None:
    scores = torch.softmax(torch.randn(100, 60, generator=torch.Generator().manual_seed(0)), 1)
    found = tables_of(Task.MULTICLASS, scores, torch.arange(100) % 60)
    assert found is not None
    assert set(found) == {"calibration"}
    few = tables_of(Task.MULTICLASS, scores[:, :3], torch.arange(100) % 3)
    assert few is not None
    guessed = scores[:, :3].argmax(1)
    assert few["confusion"] == sklearn.confusion_matrix(np.arange(100) % 3, guessed).tolist()


# Training rows ----------------------------------------------------------------------------------------------------


def test_metrics_of_training_rows_are_those_of_the_training_passes() -> None:
    run = run_of(metrics=["accuracy"], train_metrics=True)
    whole = run.stages().train(run.pipeline, stop_after=2)
    stages, batches = run.stages(), run.job.batches(ROWS)
    right = seen = 0
    for step in range(3):
        modules = stages.modules()
        for index in range(batches.parts(step)):
            rows = batches.rows(MicroBatch(step, index))
            with torch.no_grad():
                out = modules["fuse"](modules["bank"](torch.from_numpy(run.tables["bank"].features[rows])))
            right += int(((out[:, 0] > 0).numpy() == run.tables["holder"].labels[rows]).sum())
            seen += len(rows)
        if step < 2:
            stages = run.stages().train(run.pipeline, stop_after=step)
    assert whole.fuse.training_metrics() == {"accuracy": pytest.approx(right / seen)}
    history = run_local(run.job, list(run.files.values())).history
    assert all(set(line["train"]) == {"accuracy"} for line in history)


def test_a_checkpoint_in_the_middle_of_an_epoch_carries_what_was_put_out() -> None:
    run = run_of(metrics=["accuracy", "auroc"], train_metrics=True)
    whole = run.stages().train(run.pipeline, stop_after=1)
    other = run.stages()
    other.fuse.load(whole.fuse.state())
    assert other.fuse.training_metrics() == whole.fuse.training_metrics()
    assert other.fuse.training_metrics() is None
    assert run_of(metrics=["accuracy"]).stages().train(run.pipeline, stop_after=1).fuse.training_metrics() is None


def test_a_run_may_stop_on_its_training_rows_and_needs_no_others_then() -> None:
    rule = {"metric": "train_accuracy", "patience": 1}
    run = run_of(metrics=["accuracy"], train_metrics=True, job={"early_stopping": rule, "holdout": 0.0, "epochs": 50})
    history = run_local(run.job, list(run.files.values())).history
    assert len(history) < 50
    values = [line["train"]["accuracy"] for line in history]
    assert values[-1] <= max(values[:-1])
    loss = {"metric": "train_loss", "patience": 1}
    run = run_of(job={"early_stopping": loss, "holdout": 0.0, "epochs": 3})
    assert len(run_local(run.job, list(run.files.values())).history) <= 3
    run = run_of(metrics=["accuracy"], job={"early_stopping": rule})
    with pytest.raises(JobError, match=r"early_stopping.metric = 'train_accuracy' is not measured"):
        agree(run.job, run.files["holder"])

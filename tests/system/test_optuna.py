"""A search with Optuna itself: trials of SplitModel and run_local, pruned from a callback; nothing is left behind."""

import gc
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

from sl_queue import SplitModel, run_local
from tests.support.split import Concatenated

ROWS, TRIALS = 40, 20


def data() -> tuple[dict[str, Any], Any]:
    draw = np.random.default_rng(1)
    x = {"bank": draw.normal(size=(ROWS, 3)).astype(np.float32), "insurer": draw.normal(size=(ROWS, 2))}
    x["insurer"] = x["insurer"].astype(np.float32)
    return x, (x["bank"][:, 0] + x["insurer"][:, 1] > 0).astype(np.int64)


def model_of(trial: optuna.Trial) -> SplitModel:
    torch.manual_seed(0)
    width = trial.suggest_int("width", 2, 8)
    bases = {
        "bank": nn.Sequential(nn.Linear(3, width), nn.ReLU()),
        "insurer": nn.Sequential(nn.Linear(2, width), nn.ReLU()),
    }
    rate = trial.suggest_float("rate", 1e-5, 0.1, log=True)
    return SplitModel(
        bases,
        Concatenated(2 * width, 1),
        label_holder="insurer",
        loss="bce_with_logits",
        optimizer={"name": "adam", "lr": rate},
        epochs=3,
        batch_size=20,
        validation=0.25,
        progress=False,
    )


def pruning(trial: optuna.Trial) -> Any:
    """Return a callback that reports each epoch, and raises where the trial has no prospects."""

    def on_epoch(epoch: dict[str, Any]) -> None:
        trial.report(epoch["holdout"]["loss"], epoch["epoch"])
        if trial.should_prune():
            raise optuna.TrialPruned

    return on_epoch


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def study() -> optuna.Study:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3), pruner=pruner)


def test_twenty_trials_are_searched_and_pruned_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x, y = data()
    search, threads_before = study(), set(threading.enumerate())

    def objective(trial: optuna.Trial) -> float:
        history = model_of(trial).fit(x, y, on_epoch=pruning(trial))
        found = history.held_out("loss")[-1]
        assert found is not None
        return found

    search.optimize(objective, n_trials=TRIALS)
    states = [trial.state for trial in search.trials]
    assert len(states) == TRIALS
    assert set(states) == {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    assert set(threading.enumerate()) <= threads_before, "threads of a run are left"
    assert list(tmp_path.glob("sl_queue*")) == [], "folders of a run are left"
    gc.collect()
    parts = [each for each in gc.get_objects() if type(each) is Concatenated]
    assert len(parts) <= 2, "models of trials are kept"


def test_run_local_is_pruned_in_the_same_way(tmp_path: Path) -> None:
    x, y = data()

    def objective(trial: optuna.Trial) -> float:
        job, files = model_of(trial).job(x, y)
        result = run_local(job, files, on_epoch=pruning(trial))
        return float(result.history[-1]["holdout"]["loss"])

    search = study()
    search.optimize(objective, n_trials=5)
    assert optuna.trial.TrialState.COMPLETE in {trial.state for trial in search.trials}
    again = study()
    again.optimize(objective, n_trials=5)
    assert [trial.value for trial in again.trials] == [trial.value for trial in search.trials]

"""SplitModel: a front over run_local for notebooks; the same weights, and a folder that can be deployed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import cross_val_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sl_queue
from sl_queue import Job, JobError, PartyFile, SplitModel, run_local
from tests.support.split import Concatenated, equal_weights

ROWS = 60


def data() -> tuple[dict[str, Any], Any]:
    draw = np.random.default_rng(1)
    x1, x2 = draw.normal(size=(ROWS, 3)).astype(np.float32), draw.normal(size=(ROWS, 2)).astype(np.float32)
    return {"bank": x1, "insurer": x2}, (x1[:, 0] + x2[:, 1] > 0).astype(np.int64)


def modules(outputs: int = 1) -> tuple[dict[str, nn.Module], nn.Module]:
    torch.manual_seed(0)
    bank, insurer = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Sequential(nn.Linear(2, 5), nn.Tanh())
    return {"bank": bank, "insurer": insurer}, Concatenated(9, outputs)


def model_of(**changes: Any) -> SplitModel:
    bases, fuse = modules()
    settings: dict[str, Any] = {"label_holder": "insurer", "loss": "bce_with_logits", "progress": False}
    settings |= {"optimizer": lambda p: torch.optim.AdamW(p, 0.05), "epochs": 4, "batch_size": 20}
    return SplitModel(changes.pop("bases", bases), changes.pop("fuse", fuse), **settings | changes)


# The same weights as a job -----------------------------------------------------------------------------------------


def test_fit_gives_the_weights_of_the_job_that_it_builds() -> None:
    x, y = data()
    model = model_of(metrics=["auroc"], validation=0.2)
    history = model.fit(x, y)
    bases, fuse = modules()
    adamw = {"name": "adamw", "lr": 0.05}
    job = Job(
        name="model",
        seed=0,
        epochs=4,
        batch_size=20,
        holdout=0.2,
        parties={"bank": {"role": "feature", "cut": [4]}, "insurer": {"role": "label", "cut": [5]}},
    )
    ids = np.arange(ROWS)
    result = run_local(
        job,
        {
            "bank": PartyFile(
                party="bank", data=sl_queue.Rows(ids, x["bank"]), base={"model": bases["bank"], "optimizer": adamw}
            ),
            "insurer": PartyFile(
                party="insurer",
                data=sl_queue.Rows(ids, x["insurer"], y),
                base={"model": bases["insurer"], "optimizer": adamw},
                fuse={"model": fuse, "optimizer": adamw, "loss": "bce_with_logits", "metrics": ["auroc"]},
            ),
        },
    )
    assert model.job_ == job
    assert history.loss == [line["loss"] for line in result.history]
    assert history.held_out("auroc") == [line["holdout"]["auroc"] for line in result.history]
    assert equal_weights(model.fuse_, result.fuse)
    assert all(equal_weights(model.bases_[party], result.base(party)) for party in bases)
    assert equal_weights(model.bases["bank"], modules()[0]["bank"]), "the modules given are what they were"


def test_predictions_and_measures_are_those_of_the_joined_layers() -> None:
    x, y = data()
    model = model_of(metrics=["auroc", "accuracy"])
    model.fit(x, y)
    with torch.no_grad():
        logits = model.fuse_([model.bases_[p](torch.from_numpy(x[p])) for p in ("bank", "insurer")])[:, 0]
    assert np.allclose(model.decision_function(x), logits, atol=1e-6)
    assert (model.predict(x) == (logits > 0).long().numpy()).all()
    chances = model.predict_proba(x)
    assert chances.shape == (ROWS, 2)
    assert np.allclose(chances[:, 1], logits.sigmoid(), atol=1e-6)
    found = model.evaluate(x, y)
    assert found["loss"] == pytest.approx(
        nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(y).float())
    )
    assert found["auroc"] == pytest.approx(roc_auc_score(y, logits))
    assert found["accuracy"] == pytest.approx(accuracy_score(y, logits > 0))
    assert model.score(x, y) == pytest.approx(accuracy_score(y, logits > 0))


def test_several_classes_and_numbers_are_predicted() -> None:
    x, y = data()
    model = model_of(fuse=modules(3)[1], loss="cross_entropy")
    model.fit(x, y + (x["bank"][:, 1] > 0))
    assert model.predict_proba(x).shape == (ROWS, 3)
    assert np.allclose(model.predict_proba(x).sum(1), 1)
    assert (model.predict(x) == model.decision_function(x).argmax(1)).all()
    numbers = model_of(loss="mse", epochs=60)
    numbers.fit(x, x["bank"][:, 0] * 2)
    assert numbers.predict(x).shape == (ROWS,)
    assert numbers.score(x, x["bank"][:, 0] * 2) > 0.5
    with pytest.raises(JobError, match="predicts numbers"):
        numbers.predict_proba(x)
    counts = model_of(loss="poisson", metrics=["mae"])
    counts.fit(x, y * 3)
    assert np.allclose(counts.predict(x), np.exp(counts.decision_function(x)))
    assert counts.evaluate(x, y * 3)["mae"] == pytest.approx(np.abs(counts.predict(x) - y * 3).mean())


# Whatever a notebook holds ----------------------------------------------------------------------------------------


def test_tables_of_any_kind_give_the_same_weights() -> None:
    x, y = data()
    model = model_of(epochs=2)
    model.fit(x, y)
    whole = model.bases_["bank"]
    bank = pd.DataFrame(x["bank"], columns=["a", "b", "c"])
    insurer = pl.DataFrame({"d": x["insurer"][:, 0], "e": x["insurer"][:, 1], "risk": y})
    for tables, labels in (
        ({party: torch.from_numpy(array) for party, array in x.items()}, torch.from_numpy(y)),
        ({"bank": bank, "insurer": insurer}, "risk"),
        ({"bank": TensorDataset(torch.from_numpy(x["bank"])), "insurer": x["insurer"]}, y.tolist()),
    ):
        model.fit(tables, labels)
        assert equal_weights(model.bases_["bank"], whole)


def test_with_ids_rows_may_stand_in_any_order_and_predictions_come_in_that_of_the_label_holder() -> None:
    x, y = data()
    ids = np.array([f"c{i:03}" for i in range(ROWS)])
    frames = {p: pd.DataFrame(a, columns=[f"{p}{i}" for i in range(a.shape[1])]).assign(id=ids) for p, a in x.items()}
    model = model_of(epochs=2)
    model.fit(frames, y, id="id")
    straight = model.predict_proba(frames, id="id")
    turned = {"bank": frames["bank"].sample(frac=1, random_state=1), "insurer": frames["insurer"].iloc[::-1]}
    assert np.array_equal(model.predict_proba(turned, id="id"), straight[::-1])
    before = model.bases_["bank"]
    model.fit(turned, y[::-1], id="id")
    assert equal_weights(model.bases_["bank"], before)


@pytest.mark.parametrize("kind", [pd.DataFrame, pl.DataFrame, pa.table, pa.RecordBatch.from_pydict])
def test_columns_are_known_by_their_names_after_training(kind: Any, tmp_path: Path) -> None:
    x, y = data()
    columns = {"bank": {name: x["bank"][:, n] for n, name in enumerate("abc")}}
    columns["insurer"] = {name: x["insurer"][:, n] for n, name in enumerate("de")}
    tables = {party: kind(each) for party, each in columns.items()}
    model = model_of()
    model.fit(tables, y)
    expected = model.predict_proba(tables)
    model.save(tmp_path / "saved")
    other = dict(reversed({**columns["bank"], "more": y}.items()))
    for each in (model, SplitModel.load(tmp_path / "saved")):
        assert np.array_equal(each.predict_proba({**tables, "bank": kind(other)}), expected)
        with pytest.raises(JobError, match="party 'bank': there is no column 'b'; the model was trained on a, b, c"):
            each.predict({**tables, "bank": kind({"a": y, "c": y})})


def test_a_label_holder_without_a_base_model_brings_the_labels_alone() -> None:
    x, y = data()
    bases, fuse = modules()
    ids = np.arange(ROWS) * 3
    frames = {p: pd.DataFrame(a).rename(columns=str).assign(id=ids) for p, a in x.items()}
    model = model_of(bases=bases, fuse=fuse, label_holder="court")
    model.fit(frames, pd.DataFrame({"id": ids[::-1], "guilty": y[::-1]}), id="id")
    assert model.job_.label_holder == "court"
    assert model.predict(frames, id="id").shape == (ROWS,)
    assert model.evaluate(frames, pd.DataFrame({"id": ids, "guilty": y}), id="id")["loss"] is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: ({"bank": x["bank"]}, y), "there are no rows for party 'insurer'"),
        (lambda x, y: ({**x, "bnak": y}, y), "rows for 'bnak', which is not a party of this model"),
        (lambda x, y: (x, y[:-1]), "different numbers of rows: bank 60, insurer 60, labels 59"),
        (lambda x, y: ({**x, "bank": x["bank"][:, :2]}, y), "party 'bank': the base model fails on two rows"),
        (lambda x, y: (x["bank"], y), "features are one table; give a dict"),
        (lambda x, y: (x, None), "there are no labels to train on"),
        (lambda x, y: (x, "risk"), "'risk' names a column, and the table is a ndarray without names"),
        (lambda x, y: ({p: a[:0] for p, a in x.items()}, y[:0]), "there are no rows"),
    ],
)
def test_what_cannot_be_fitted_is_said_in_words_of_the_caller(change: Any, words: str) -> None:
    with pytest.raises(JobError) as caught:
        model_of().fit(*change(*data()))
    assert words in str(caught.value)


def test_an_optimizer_may_be_a_name_and_not_one_of_other_parameters() -> None:
    x, y = data()
    named, table = model_of(optimizer="sgd"), model_of(optimizer={"name": "sgd"})
    named.fit(x, y)
    table.fit(x, y)
    assert equal_weights(named.fuse_, table.fuse_)
    with pytest.raises(JobError, match="optimizer is SGD, made for other parameters; give a table"):
        model_of(optimizer=torch.optim.SGD([torch.zeros(1)])).fit(x, y)


def test_what_is_not_trained_says_so() -> None:
    with pytest.raises(JobError, match="has not been trained; call fit"):
        model_of().predict(data()[0])


# scikit-learn ------------------------------------------------------------------------------------------------------


def test_it_can_be_cloned_and_cross_validated() -> None:
    x, y = data()
    joined = pd.DataFrame(np.hstack([x["bank"], x["insurer"]]), columns=list("abcde"))
    model = model_of(columns={"bank": ["a", "b", "c"], "insurer": ["d", "e"]}, epochs=15)
    assert cross_val_score(model, joined, pd.Series(y), cv=3).mean() > 0.6
    assert cross_val_score(model, joined, y, cv=2, scoring="roc_auc").mean() > 0.6
    assert (
        cross_val_score(model_of(columns={"bank": [0, 1, 2], "insurer": [3, 4]}), joined.to_numpy(), y, cv=2).size == 2
    )
    copied = clone(model).set_params(epochs=1)
    assert copied.get_params()["columns"] == model.columns
    assert copied.epochs == 1
    assert len(copied.fit(joined, y)) == 1
    with pytest.raises(JobError, match="'epoch' is not an argument of SplitModel"):
        copied.set_params(epoch=1)


def test_nothing_of_scikit_learn_is_loaded_by_using_it() -> None:
    program = (
        "import sys, numpy as np, torch; from torch import nn; import sl_queue\n"
        "m = sl_queue.SplitModel({'a': nn.Linear(2, 3), 'b': nn.Linear(1, 3)}, nn.Linear(3, 1), label_holder='b',\n"
        "    loss='bce_with_logits', aggregation='sum', epochs=1, progress=False)\n"
        "m.fit({'a': np.ones((8, 2), 'f4'), 'b': np.ones((8, 1), 'f4')}, np.arange(8) % 2)\n"
        "m.predict({'a': np.ones((8, 2), 'f4'), 'b': np.ones((8, 1), 'f4')})\n"
        "print('sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Callbacks and progress ---------------------------------------------------------------------------------------------


class Pruned(Exception):
    """Exception that a search raises to stop a run."""


def test_each_epoch_is_told_once_and_in_order_and_what_is_raised_comes_back(tmp_path: Path) -> None:
    x, y = data()
    told: list[dict[str, Any]] = []
    model = model_of(epochs=60, batch_size=60)
    history = model.fit(x, y, on_epoch=told.append)
    assert told == list(history)
    assert [line["epoch"] for line in told] == list(range(60))

    def prune(line: dict[str, Any]) -> None:
        if line["epoch"] == 2:
            raise Pruned

    with pytest.raises(Pruned):
        model.fit(x, y, on_epoch=prune, epochs=100_000)


def test_progress_is_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = data()
    model_of(epochs=2).fit(x, y, progress=True)
    shown = capsys.readouterr().err
    assert "epoch 2/2 [========================] loss 0." in shown
    model_of(epochs=1).fit(x, y)
    assert capsys.readouterr().err == ""


# Findings and jobs as values ----------------------------------------------------------------------------------------


def test_the_findings_of_check_are_values() -> None:
    x, y = data()
    job, files = model_of().job(x, y)
    found = sl_queue.check(job, files)
    assert "error" not in {finding.level for finding in found}
    assert any("split" in finding.text for finding in found)
    wrong = sl_queue.check(
        job, {"bank": files[0].replace(base={"model": nn.Linear(3, 9), "optimizer": {"name": "sgd"}})}
    )
    errors = [finding for finding in wrong if finding.level == "error"]
    assert len(errors) == 1
    assert "the cut layer is" in errors[0].text


def test_a_job_is_replaced_key_by_key_and_checked() -> None:
    job, _ = model_of().job(*data())
    assert job.replace(epochs=20).epochs == 20
    assert job.replace(epochs=20).replace(epochs=job.epochs).digest == job.digest
    assert job.replace(pipeline={"micro_batches": 2}).pipeline.depth == 2
    with pytest.raises(JobError, match="epochs = 0"):
        job.replace(epochs=0)
    with pytest.raises(JobError, match="epoch is unknown; did you mean 'epochs'"):
        job.replace(epoch=1)
    assert {"SplitModel", "check", "run_local"} <= set(dir(sl_queue))


# Folders ------------------------------------------------------------------------------------------------------------


def test_a_saved_model_predicts_the_same_and_can_be_trained_again(tmp_path: Path) -> None:
    x, y = data()
    model = model_of(
        metrics=["auroc"], validation=0.2, settings={"pipeline": {"micro_batches": 2}}, learning={"ema": 0.9}
    )
    history = model.fit(x, y)
    loaded = SplitModel.load(model.save(tmp_path / "saved"))
    assert np.array_equal(loaded.predict_proba(x), model.predict_proba(x))
    assert loaded.evaluate(x, y) == model.evaluate(x, y)
    assert loaded.history_ == history
    assert not list(tmp_path.rglob("*.parquet"))
    assert not list(tmp_path.rglob("*.npz"))
    loaded.progress = False
    assert loaded.fit(x, y).loss == history.loss


def test_a_written_folder_is_a_job_that_gives_the_same_weights(tmp_path: Path) -> None:
    x, y = data()
    frames = {"bank": pd.DataFrame(x["bank"], columns=["age", "id", "x"]), "insurer": x["insurer"]}
    model = model_of(
        validation=0.25, metrics=["auroc", {"name": "fbeta", "beta": 2.0}], learning={"schedule": {"name": "cosine"}}
    )
    model.fit(frames, y)
    folder = model.write(tmp_path / "deployed")
    job = Job.load(folder / "job.toml")
    assert job.digest == model.job_.digest
    files = [PartyFile.load(folder / party / f"{party}.toml") for party in job.parties]
    result = run_local(job, files)
    assert equal_weights(result.fuse, model.fuse_)
    assert equal_weights(result.base("bank"), model.bases_["bank"])
    assert 'optimizer = { name = "adamw", lr = 0.05 }' in (folder / "bank" / "bank.toml").read_text()


def test_images_are_written_beside_a_source(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(20, 1, 6, 6)).astype(np.float32)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(4))
    base(torch.zeros(2, 1, 6, 6))
    model = model_of(bases={"bank": base}, fuse=nn.Linear(4, 1), aggregation="sum", label_holder="court")
    model.fit({"bank": images}, np.arange(20) % 2)
    folder = model.write(tmp_path)
    files = [PartyFile.load(folder / party / f"{party}.toml") for party in ("bank", "court")]
    assert equal_weights(run_local(Job.load(folder / "job.toml"), files).base("bank"), model.bases_["bank"])


class Keeps(nn.Module):
    """A module with an attribute that no file can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lock = nn.Linear(3, 4), object()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    x, y = data()
    bases, _ = modules()
    model = model_of(bases={"bank": Keeps(), "insurer": bases["insurer"]}, epochs=1)
    model.fit(x, y)
    with pytest.raises(JobError, match=r"party 'bank': \[base\] model: 'lock' is a object, which cannot be written"):
        model.write(tmp_path / "a")
    model = model_of(loss=lambda o, t: nn.functional.mse_loss(o[:, 0], t.float()), epochs=1)
    model.fit(x, y)
    with pytest.raises(JobError, match=r"\[fuse\] loss is .*<lambda>, which no file can name"):
        model.write(tmp_path / "b")


STRANGER = """
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from sl_queue import SplitModel

HIDDEN = 6


class Tower(nn.Module):
    def __init__(self, columns):
        super().__init__()
        self.layer, self.activation = nn.Linear(columns, HIDDEN), F.relu

    def forward(self, x):
        return self.activation(self.layer(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2 * HIDDEN, 1)

    def forward(self, inputs):
        return self.out(torch.cat(inputs, dim=1))


bank, insurer = pd.read_csv("bank.csv"), pd.read_csv("insurer.csv")
model = SplitModel({"bank": Tower(2), "insurer": Tower(1)}, Head(), label_holder="insurer", loss="bce_with_logits")
model.fit({"bank": bank, "insurer": insurer}, "defaulted", id="customer", epochs=3, validation=0.25, progress=False)
print(model.predict({"bank": bank, "insurer": insurer.drop(columns="defaulted")}, id="customer").sum() >= 0)
model.write("deployed")
model.save("saved")
print(len(SplitModel.load("saved").predict({"bank": bank, "insurer": insurer[["customer", "claims"]]}, id="customer")))
"""


def test_a_script_of_a_stranger_leaves_a_folder_that_the_command_trains(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    ids = np.arange(100, 140)
    bank = pd.DataFrame({"customer": ids, "age": draw.normal(size=40), "income": draw.normal(size=40)})
    insurer = pd.DataFrame(
        {"customer": ids[::-1], "claims": draw.normal(size=40), "defaulted": draw.integers(0, 2, 40)}
    )
    bank.to_csv(tmp_path / "bank.csv", index=False)
    insurer.to_csv(tmp_path / "insurer.csv", index=False)
    (tmp_path / "script.py").write_text(STRANGER)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n40\n"
    folder = tmp_path / "deployed"
    command = [sys.executable, "-m", "sl_queue.cli", "local", "job.toml", "bank/bank.toml", "insurer/insurer.toml"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "bank" / "final" / "base.safetensors").exists()
    assert "customer" not in (folder / "job.toml").read_text()

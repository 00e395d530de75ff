"""Predictions of a trained run equal its modules' on the same rows, whatever the order of each party's table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from torch import Tensor, nn

import sl_queue
from sl_queue.compute.predicted import columns_of
from sl_queue.data.spec import FileSpec
from sl_queue.errors import AlignmentError, CheckpointError, JobError, ShapeError
from sl_queue.launch.asked import Asked, folder_of, schedule_of
from sl_queue.launch.outcome import write_evaluation, write_outcome
from sl_queue.local.prediction import predict_threads
from sl_queue.storage.versions import versions_in

N, NEW = 200, 90


class Base(nn.Module):
    """A base model whose training and evaluation modes differ."""

    def __init__(self, inputs: int, cut: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, cut), nn.BatchNorm1d(cut), nn.ReLU(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return output


class Fuse(nn.Module):
    """A logit of all activations."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 1)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        output: Tensor = self.linear(torch.cat(inputs, dim=1))
        return output


def job(**changes: Any) -> sl_queue.Job:
    values: dict[str, Any] = {
        "name": "credit",
        "seed": 7,
        "epochs": 2,
        "batch_size": 32,
        "holdout": 0.2,
        "parties": {"bank": {"role": "feature", "cut": [8]}, "insurer": {"role": "label", "cut": [4]}},
        "pipeline": {"micro_batches": 2},
    }
    return sl_queue.Job(**(values | changes))


ADAM = {"name": "adam", "lr": 0.01}


def files(
    rows: Mapping[str, sl_queue.Rows], model: type[nn.Module] = Base, joint: type[nn.Module] = Fuse
) -> list[sl_queue.PartyFile]:
    base = {"bank": {"inputs": 3, "cut": 8}, "insurer": {"inputs": 2, "cut": 4}}
    fuse = {"model": joint, "args": {"inputs": 12}, "optimizer": ADAM, "loss": "bce_with_logits", "metrics": ["auroc"]}
    return [
        sl_queue.PartyFile(
            party=party,
            data=rows[party],
            threads=1,
            base={"model": model, "args": args, "optimizer": ADAM},
            **({"fuse": fuse} if party == "insurer" else {}),
        )
        for party, args in base.items()
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[sl_queue.PartyFile], sl_queue.Result]:
    root = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    ids, bank, insurer = np.arange(N), rng.standard_normal((N, 3)), rng.standard_normal((N, 2))
    labels = (bank[:, 0] - insurer[:, 1] > 0).astype(int)
    parties = files({"bank": sl_queue.Rows(ids, bank), "insurer": sl_queue.Rows(ids, insurer, labels)})
    return root, parties, sl_queue.run_local(job(), parties, out=root)


def states(root: Path) -> dict[str, Path]:
    return {role: root / role for role in ("bank", "insurer")}


def new_rows(seed: int = 1) -> tuple[dict[str, sl_queue.Rows], np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """Return rows in an order of each party's own; the label holder's ids; features by party in the label holder's."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(5000, 5000 + NEW))
    columns = {"bank": rng.standard_normal((NEW, 3)), "insurer": rng.standard_normal((NEW, 2))}
    other = rng.permutation(NEW)
    rows = {
        "bank": sl_queue.Rows(ids[other], columns["bank"][other]),
        "insurer": sl_queue.Rows(
            ids, columns["insurer"], (columns["bank"][:, 0] > columns["insurer"][:, 1]).astype(int)
        ),
    }
    return rows, ids, columns


def joined(result: sl_queue.Result, columns: Mapping[str, Any], order: Any, size: int) -> Tensor:
    """Run the trained modules on the same rows in parts of the same size."""
    parts = []
    with torch.no_grad():
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            inputs = [result.base(party)(torch.tensor(columns[party][rows]).float()) for party in ("bank", "insurer")]
            parts.append(result.fuse(inputs))
    return torch.cat(parts)


def test_a_finished_run_leaves_a_version_with_a_card_at_each_party(trained: Any) -> None:
    root, _, result = trained
    for party in ("bank", "insurer"):
        (version,) = versions_in(root / party)
        assert {path.name for path in version.path.iterdir()} >= {"card.md", "run.json", "base.safetensors"}
    assert version.metrics == result.history[-1]["holdout"]
    assert (version.about["task"], version.about["outputs"], version.about["shape"]) == ("binary", "logits", [1])
    card = (version.path / "card.md").read_text()
    assert "| auroc |" in card and "160 rows" not in card and f"{N} rows, of which 40 were held out" in card


def test_predictions_are_those_of_the_modules_bit_for_bit(trained: Any) -> None:
    root, parties, result = trained
    rows, ids, columns = new_rows()
    found = predict_threads(job(), parties, states(root), Asked(), rows=rows)
    order = np.argsort(ids)
    wanted = joined(result, columns, order, schedule_of(job(), NEW).batches.batch_size)
    assert np.array_equal(found.outputs, wanted.numpy())
    chances = columns_of(found.outputs, "binary", "logits")["probability"][found.rows.positions]
    assert np.array_equal(chances, wanted[:, 0].sigmoid().numpy()[np.argsort(order)])
    assert found.rows.ids["id"].to_numpy().tolist() == ids.tolist()


def test_a_model_that_learnt_from_responses_predicts_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, bank, insurer = np.arange(N), rng.standard_normal((N, 3)), rng.standard_normal((N, 2))
    parties = files({"bank": sl_queue.Rows(ids, bank), "insurer": sl_queue.Rows(ids, insurer, ids % 2)})
    parties[1] = parties[1].replace(privacy={"labels": {"epsilon": 1.0}})
    sl_queue.run_local(job(), parties, out=tmp_path)
    rows, _, _ = new_rows()
    predicted = predict_threads(job(), parties, states(tmp_path), Asked(), rows=rows)
    write_outcome(predicted, tmp_path / "found.csv")
    found = pa.csv.read_csv(tmp_path / "found.csv")["probability"].to_numpy()
    said = columns_of(predicted.outputs, "binary", "logits")["probability"][predicted.rows.positions]
    flip = 1 / (1 + np.e)
    assert np.allclose(found, np.clip((said - flip) / (1 - 2 * flip), 0, 1), atol=1e-6)
    (predicted.version.path / "privacy.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"privacy\.json was altered since run \w+ wrote it; restore it"):
        write_outcome(predicted, tmp_path / "found.csv")


def test_the_labels_that_are_there_are_measured(trained: Any) -> None:
    root, parties, _ = trained
    rows, _, _ = new_rows()
    found = predict_threads(job(), parties, states(root), Asked(labels=True), rows=rows)
    assert found.objective is not None
    labels = found.rows.table.labels
    assert labels is not None and len(labels) == NEW


def test_rows_with_weights_are_evaluated_as_training_did_to_the_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, bank, insurer = np.arange(N), rng.standard_normal((N, 3)), rng.standard_normal((N, 2))
    rows = sl_queue.Rows(ids, insurer, (bank[:, 0] > insurer[:, 1]).astype(int), weights=np.where(ids % 7, 1.0, 30.5))
    parties = files({"bank": sl_queue.Rows(ids, bank), "insurer": rows})
    result = sl_queue.run_local(job(), parties, out=tmp_path)
    held_out = predict_threads(job(), parties, states(tmp_path), Asked(labels=True, held_out=True))
    found = write_evaluation(held_out, tmp_path / "held")
    assert found.metrics == result.history[-1]["holdout"]
    assert found.tables == result.history[-1]["tables"]
    again = write_evaluation(
        predict_threads(job(), parties, states(tmp_path), Asked(labels=True), rows={p.party: p.data for p in parties}),
        tmp_path / "all",
    )
    unweighted = sl_queue.Rows(rows.ids, rows.features, rows.labels)
    plain = {"bank": parties[0].data, "insurer": unweighted}
    other = predict_threads(job(), parties, states(tmp_path), Asked(labels=True), rows=plain)
    assert again.metrics["auroc"] != write_evaluation(other, tmp_path / "all").metrics["auroc"]


def test_a_row_that_a_party_lacks_is_refused_without_an_alignment(trained: Any) -> None:
    root, parties, _ = trained
    rows, _, _ = new_rows()
    rows["bank"] = sl_queue.Rows(rows["bank"].ids[1:], rows["bank"].features[1:])
    with pytest.raises(AlignmentError, match="the rows differ"):
        predict_threads(job(), parties, states(root), Asked(), rows=rows)


def test_the_base_of_another_run_is_refused_by_name(trained: Any, tmp_path: Path) -> None:
    root, parties, _ = trained
    sl_queue.run_local(job(), parties, out=tmp_path)
    mixed = {"bank": tmp_path / "bank", "insurer": root / "insurer"}
    with pytest.raises(AlignmentError, match=r"bank has the weights of run \w+, insurer .*--run"):
        predict_threads(job(), parties, mixed, Asked(), rows=new_rows()[0])
    with pytest.raises(CheckpointError, match="no version of run 'zzz'"):
        predict_threads(job(), parties, states(root), Asked(run="zzz"), rows=new_rows()[0])


def test_nothing_to_predict_is_said(trained: Any) -> None:
    root, parties, _ = trained
    empty = {party: sl_queue.Rows([], np.zeros((0, n))) for party, n in (("bank", 3), ("insurer", 2))}
    with pytest.raises(JobError):
        predict_threads(job(), parties, states(root), Asked(), rows=empty)
    with pytest.raises(JobError, match="has no rows to predict"):
        predict_threads(job(), parties, states(root), Asked())
    source = parties[0].replace(data={"source": lambda: parties[0].data}, predict={"path": root / "new.csv"})
    with pytest.raises(JobError, match=r"'bank' has no rows to predict: write .* beside a \[data\] path"):
        predict_threads(job(), [source, parties[1]], states(root), Asked())


def test_rows_that_are_shared_are_predicted_and_the_others_left_out_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, bank, insurer = np.arange(N), rng.standard_normal((N, 3)), rng.standard_normal((N, 2))
    psi = job(alignment={"method": "psi", "at_least": 100})
    parties = files({"bank": sl_queue.Rows(ids, bank), "insurer": sl_queue.Rows(ids, insurer, ids % 2)})
    result = sl_queue.run_local(psi, parties, out=tmp_path)
    rows, new, columns = new_rows()
    kept = rows["bank"].ids != new[3]
    rows["bank"] = sl_queue.Rows(rows["bank"].ids[kept], rows["bank"].features[kept])
    with pytest.raises(AlignmentError, match="1 of 90 rows to predict are not held by every party"):
        predict_threads(psi, parties, states(tmp_path), Asked(), rows=rows)
    found = predict_threads(psi, parties, states(tmp_path), Asked(leave_out=True), rows=rows)
    write_outcome(found, tmp_path / "found.csv")
    assert pa.csv.read_csv(tmp_path / "found-missing.csv")["id"].to_pylist() == [new[3]]
    whole = predict_threads(psi, parties, states(tmp_path), Asked(), rows=new_rows()[0])
    write_outcome(whole, tmp_path / "found.csv")
    assert not (tmp_path / "found-missing.csv").exists(), "an earlier prediction's"
    assert found.rows.positions[3] == -1 and (found.rows.positions >= 0).sum() == NEW - 1
    order = np.argsort(new)[np.sort(new) != new[3]]
    wanted = joined(result, columns, order, schedule_of(psi, NEW - 1).batches.batch_size)
    assert np.array_equal(found.outputs, wanted.numpy())


def test_later_rows_of_an_id_are_left_out_and_lack_at_nobody(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, bank, insurer = np.arange(N), rng.standard_normal((N, 3)), rng.standard_normal((N, 2))
    psi = job(alignment={"method": "psi"}, epochs=1)
    parties = files({"bank": sl_queue.Rows(ids, bank), "insurer": sl_queue.Rows(ids, insurer, ids % 2)})
    sl_queue.run_local(psi, parties, out=tmp_path)
    asked = {"bank": sl_queue.Rows([5, 7, 9], bank[:3]), "insurer": sl_queue.Rows([9, 5, 5, 7, 9], insurer[:5])}
    first = {party: FileSpec(source=lambda rows=rows: rows, duplicates="first") for party, rows in asked.items()}
    found = predict_threads(psi, parties, states(tmp_path), Asked(), rows=first)
    assert found.rows.missing == 0
    assert write_outcome(found, tmp_path / "p.csv")[0].startswith("3 predictions with run ")
    assert pa.csv.read_csv(tmp_path / "p.csv")["id"].to_pylist() == [9, 5, 7]
    asked["bank"] = sl_queue.Rows([5, 9], bank[:2])
    with pytest.raises(AlignmentError, match="1 of 5 rows to predict are not held by every party"):
        predict_threads(psi, parties, states(tmp_path), Asked(), rows=first | {"bank": asked["bank"]})
    found = predict_threads(psi, parties, states(tmp_path), Asked(leave_out=True), rows=first | {"bank": asked["bank"]})
    write_outcome(found, tmp_path / "q.csv")
    assert pa.csv.read_csv(tmp_path / "q.csv")["id"].to_pylist() == [9, 5]
    assert pa.csv.read_csv(tmp_path / "q-missing.csv")["id"].to_pylist() == [7]


@pytest.mark.parametrize("change", ["a row less", "another row", "a row more"])
def test_a_finished_run_on_aligned_rows_names_a_table_that_was_exported_again(tmp_path: Path, change: str) -> None:
    rng = np.random.default_rng(0)
    ids, bank, insurer = np.arange(N), rng.standard_normal((N, 3)), rng.standard_normal((N, 2))
    psi = job(alignment={"method": "psi"}, epochs=1)
    labelled = sl_queue.Rows(ids, insurer, ids % 2)
    sl_queue.run_local(psi, files({"bank": sl_queue.Rows(ids, bank), "insurer": labelled}), out=tmp_path)
    exported = {
        "a row less": sl_queue.Rows(ids[1:], bank[1:]),
        "another row": sl_queue.Rows(np.where(ids == 7, 9999, ids), bank),
        "a row more": sl_queue.Rows(np.append(ids, 9999), np.vstack([bank, bank[:1]])),
    }
    with pytest.raises(CheckpointError, match="the table's ids differ from those that were aligned; restore the table"):
        sl_queue.run_local(psi, files({"bank": exported[change], "insurer": labelled}), out=tmp_path)


def test_a_table_that_changed_since_training_is_said_beside_its_scores(
    trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, parties, _ = trained
    held_out = Asked(labels=True, held_out=True)
    predict_threads(job(), parties, states(root), held_out)
    assert "any more" not in caplog.text
    data = parties[1].data
    changed = parties[1].replace(data=sl_queue.Rows(data.ids, data.features + 1, 1 - data.labels))
    predict_threads(job(), [parties[0], changed], states(root), held_out)
    told = "the values of the features differ; the values of the labels differ"
    assert f"what is measured is of the present one: {told}" in caplog.text
    assert "insurer: the table is not that of run" in caplog.text and "bank: the table" not in caplog.text


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../../evil", "a/b", "a\\b", "today\n", ".hidden", "ö" * 101])
def test_a_prediction_whose_name_is_no_folders_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(JobError, match="a prediction cannot be called"):
        folder_of(tmp_path, name)


@pytest.mark.parametrize("name", ["today", "2026-11-28", "Größe 3", "a.b_c"])
def test_any_other_name_is_a_folder_among_the_predictions(tmp_path: Path, name: str) -> None:
    assert folder_of(tmp_path, name) == tmp_path / "predictions" / name


class Codes(nn.Module):
    """A base model of codes, which are whole numbers."""

    def __init__(self, inputs: int, cut: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, cut)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.embedding(x).sum(1)
        return output


def test_whole_numbers_that_are_written_with_a_point_are_those_that_were_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def written(name: str, point: str, label: str = "") -> dict[str, Any]:
        lines = [f"{row},{row % 10}{point},{row % 3}{label and f',{row % 2}'}" for row in range(30)]
        (tmp_path / name).write_text("\n".join([f"id,zone,kind{label and ',late'}", *lines]))
        return {"path": tmp_path / name, "id": "id", **({"label": "late"} if label else {})}

    unread = sl_queue.Rows([], np.zeros((0, 1)))
    bank, insurer = files({"bank": unread, "insurer": unread}, Codes)
    bank = bank.replace(data=written("bank.csv", ""), predict={"path": tmp_path / "bank.csv"})
    new = {"path": tmp_path / "insurer.csv"}
    insurer = insurer.replace(data=written("insurer.csv", "", "late"), predict=new)
    sl_queue.run_local(job(epochs=1), [bank, insurer], out=tmp_path)

    def predicted() -> Any:
        return predict_threads(job(epochs=1), [bank, insurer], states(tmp_path), Asked()).outputs

    wanted = predicted()
    written("bank.csv", ".0")
    assert np.array_equal(predicted(), wanted)
    written("bank.csv", ".5")
    with pytest.raises(ShapeError):
        predicted()
    assert "bank: training had whole numbers only, and there are others in 'zone'" in caplog.text

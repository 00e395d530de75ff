"""Predictions release activations too: they are in the ledger and the budget, and a response is undone in them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sl_queue
from sl_queue.compute.predicted import columns_of
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.errors import CheckpointError, JobError
from sl_queue.launch.answering_versions import versions_of
from sl_queue.launch.asked import Asked
from sl_queue.launch.outcome import undoing, write_outcome
from sl_queue.launch.prediction import Predicted, spec_to_predict
from sl_queue.launch.prediction_worker import run_prediction
from sl_queue.local.prediction import predict_threads
from sl_queue.privacy.accounting import gaussian_epsilon, gaussian_mu
from sl_queue.privacy.response import Response, undone
from sl_queue.storage.secret_file import write_secret
from sl_queue.storage.versions import versions_in
from tests.compute.test_privacy_run import FEATURES, files, job

SIGMA = 4.0
ROLES = ("bank", "post", "shop")


def trained(folder: Path, shop: Mapping[str, Any], bank: Mapping[str, Any]) -> list[sl_queue.PartyFile]:
    """Train three epochs, and return the party files."""
    write_secret(folder / "secret")
    secret = {"secret": folder / "secret"}
    parties = files({**shop, **secret} if shop else {}, {**bank, **secret} if bank else {})
    sl_queue.run_local(job(), parties, out=folder / "out")
    return parties


def predict(folder: Path, parties: list[sl_queue.PartyFile], first: int = 0, name: str = "one") -> Predicted:
    """Predict a hundred rows."""
    ids, rows = np.arange(100), slice(first, first + 100)
    data = {
        "bank": sl_queue.Rows(ids, FEATURES[rows, :4]),
        "post": sl_queue.Rows(ids, FEATURES[rows, 4:]),
        "shop": sl_queue.Rows(ids),
    }
    states = {role: folder / "out" / role for role in ROLES}
    return predict_threads(job(), parties, states, Asked(name), rows=data)


def releases(folder: Path) -> int:
    return len((folder / "out" / "bank" / "privacy.jsonl").read_text().splitlines())


def test_a_prediction_is_one_more_release_and_the_same_once_more_is_none(tmp_path: Path) -> None:
    parties = trained(tmp_path, {}, {"activations": {"clip": 1.0, "sigma": SIGMA}})
    assert releases(tmp_path) == 3
    first = predict(tmp_path, parties)
    assert releases(tmp_path) == 4
    assert np.array_equal(predict(tmp_path, parties, name="two").outputs, first.outputs)  # the same noise again
    assert releases(tmp_path) == 4
    predict(tmp_path, parties, first=100)
    assert releases(tmp_path) == 5
    lines = [json.loads(line) for line in (tmp_path / "secret.privacy.jsonl").read_text().splitlines()]
    assert [line["run"].startswith("predicted/") for line in lines] == [False] * 3 + [True] * 2


def test_a_prediction_that_would_pass_the_budget_sends_nothing(tmp_path: Path) -> None:
    four = gaussian_epsilon(gaussian_mu([SIGMA] * 4), 1e-6)
    parties = trained(tmp_path, {}, {"activations": {"clip": 1.0, "sigma": SIGMA}, "budget": four + 0.1})
    predict(tmp_path, parties)
    with pytest.raises(
        JobError, match=r"party 'bank': \[privacy\] budget = .* would be passed by these predictions: .* 5"
    ):
        predict(tmp_path, parties, first=100)
    assert releases(tmp_path) == 4


def test_a_deployed_worker_predicts_with_a_lasting_secret_or_not_at_all(tmp_path: Path) -> None:
    parties = files({}, {"activations": {"clip": 1.0, "sigma": SIGMA}})
    bank = parties[0].model_copy(update={"state": tmp_path / "state"})
    with pytest.raises(JobError, match="its secret is not named"):
        run_prediction("feature", job(), bank, "one", None, "amqp://nobody.invalid", tmp_path / "state")


def test_a_service_is_one_release_for_each_version_and_is_held_against_the_budget(tmp_path: Path) -> None:
    defence = {"activations": {"clip": 1.0, "sigma": SIGMA}, "budget": gaussian_epsilon(gaussian_mu([SIGMA] * 4), 1e-6)}
    parties = trained(tmp_path, {}, defence)
    state = tmp_path / "out" / "bank"
    (version,) = versions_in(state)
    spec = resolve(job(), parties[0], Importer())

    def answer(first: int) -> Any:
        rows = sl_queue.Rows(np.arange(9), FEATURES[first : first + 9, :4])
        return versions_of(job(), spec_to_predict(spec, rows, Asked()), state).base_of(version.run)

    assert answer(0) is not None
    assert answer(0) is not None  # another process, the same rows
    assert releases(tmp_path) == 4
    with pytest.raises(JobError, match="would be passed by these predictions"):
        answer(9)


# The response ---------------------------------------------------------------------------------------------------


def test_probabilities_that_are_written_are_those_of_true_labels(tmp_path: Path) -> None:
    parties = trained(tmp_path, {"labels": {"epsilon": 2.0}}, {})
    predicted = predict(tmp_path, parties)
    write_outcome(predicted, tmp_path / "predictions.csv")
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    written = np.array([float(line.split(",")[-1]) for line in lines[1:]])
    of_responses = columns_of(predicted.outputs, "binary", "logits")["probability"]
    assert written == pytest.approx(undone(of_responses, Response(2.0, (0.0, 1.0))), abs=1e-6)
    assert not np.allclose(written, of_responses, atol=0.01)


def test_without_a_response_probabilities_are_the_models(tmp_path: Path) -> None:
    parties = trained(tmp_path, {"meter": True}, {})
    predicted = predict(tmp_path, parties)
    assert undoing(predicted.version) is None


def test_a_report_that_cannot_be_read_gives_no_probability_of_unknown_meaning(tmp_path: Path) -> None:
    parties = trained(tmp_path, {"labels": {"epsilon": 2.0}}, {})
    predicted = predict(tmp_path, parties)
    (predicted.version.path / "privacy.json").write_text('{"response": {"epsilon": 2')
    with pytest.raises(CheckpointError, match=r"privacy\.json was altered since run"):
        write_outcome(predicted, tmp_path / "predictions.csv")
    earlier = replace(predicted.version, about={**predicted.version.about, "beside": None})  # has no digest of it
    with pytest.raises(CheckpointError, match=r"privacy\.json cannot be read .* which responses"):
        undoing(earlier)

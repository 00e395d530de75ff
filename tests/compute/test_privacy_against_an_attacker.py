"""A patient attacker adds up what it is sent: epochs, restarts, runs, predictions. A response withstands it."""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import sl_queue
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.table import read_table
from sl_queue.launch.asked import Asked
from sl_queue.launch.privacy import responded, token_key
from sl_queue.local.prediction import predict_threads
from sl_queue.privacy import attacks
from sl_queue.privacy.accounting import cap_of_epsilon
from sl_queue.storage.secret_file import read_secret, write_secret
from tests.support.first_version import Enough, stop_after

pytestmark = pytest.mark.timeout(600)

N, EPSILON, CHANCE = 400, 1.0, 0.07
RNG = np.random.default_rng(8)
NOISE = RNG.standard_normal((N, 6)).astype(np.float32)  # columns that say nothing of the labels
LABELS = (RNG.random(N) < 0.4).astype(np.int64)
KNOWN = np.flatnonzero(LABELS == 1)[:5]  # rows whose labels the attacker knows
ADAM = {"name": "adam", "lr": 0.02}

Sent = list[tuple[Tensor, Tensor]]  # rows, and their gradients


class Notes:
    """Gradients as they came back. Mutable."""

    def __init__(self) -> None:
        self.sent: Sent = []


class Curious(nn.Module):
    """A base model that notes every gradient that comes back; its first column is the number of the row."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.ReLU())
        self.notes = notes

    def forward(self, x: Tensor) -> Tensor:
        activation: Tensor = self.layers(x[:, 1:])
        rows = x[:, 0].long()
        if activation.requires_grad:
            activation.register_hook(lambda gradient: self.notes.sent.append((rows, gradient.detach().clone())))
        return activation


class Fuse(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 1)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        output: Tensor = self.linear(inputs[0])
        return output


def job(**changes: Any) -> sl_queue.Job:
    parties = {"bank": {"role": "feature", "cut": [12]}, "shop": {"role": "label"}}
    values = {"name": "curious", "seed": 5, "epochs": 4, "batch_size": 50, "holdout": 0.2, "parties": parties}
    return sl_queue.Job(**values | {"pipeline": {"micro_batches": 1, "checkpoint_every": 4}} | changes)


def files(notes: Notes, privacy: Mapping[str, Any]) -> list[sl_queue.PartyFile]:
    ids = np.arange(N)
    columns = np.column_stack([ids.astype(np.float32), NOISE])

    def base() -> nn.Module:
        return Curious(notes)

    fuse = {"model": Fuse, "optimizer": ADAM, "loss": "bce_with_logits", "metrics": ["auroc"]}
    shop: dict[str, Any] = {"data": sl_queue.Rows(ids, labels=LABELS), "fuse": fuse, "privacy": dict(privacy)}
    bank: dict[str, Any] = {"data": sl_queue.Rows(ids, columns), "base": {"model": base, "optimizer": ADAM}}
    return [sl_queue.PartyFile(party=party, threads=1, **own) for party, own in (("bank", bank), ("shop", shop))]


def likeness(seen: Sent) -> np.ndarray:
    """Add up, over all that was sent, how like each row's gradient is to those of rows whose labels are known."""
    total = np.zeros(N)
    friends = np.zeros(12)
    for rows, gradients in seen:  # a direction of its own for each message would need a known row in it
        unit = attacks.directions(gradients.numpy().astype(np.float64))
        known = np.isin(rows.numpy(), KNOWN)
        if known.any():
            friends = unit[known].mean(0)
        total[rows.numpy()] += unit @ friends
    return total


def mean_gradients(seen: Sent) -> np.ndarray:
    """Return each row's gradient, mean over all that was sent, so that noise of each message falls out."""
    total, count = np.zeros((N, 12)), np.zeros(N)
    for rows, gradients in seen:
        total[rows.numpy()] += gradients.numpy()
        count[rows.numpy()] += 1
    return total / np.maximum(count, 1)[:, None]


def best_attack(runs: list[Sent], predictions: list[np.ndarray]) -> float:
    """Return the two-sided AUC of the best of several ways to put all of it together."""
    each = [likeness(seen) for seen in runs]
    summed = np.sum([score / (score.std() or 1.0) for score in each], axis=0)
    everything = np.hstack([mean_gradients(seen) for seen in runs])
    rng, reached = np.random.default_rng(0), everything.any(1)
    fitted = attacks.completion(everything[reached], LABELS[reached], rng, 60)
    forecast = np.sum(predictions, axis=0)
    found = [attacks.auc(LABELS[reached] == 1, score[reached]) for score in (*each, summed, forecast)]
    return max(*found, fitted)


def attacked(folder: Path, privacy: Mapping[str, Any]) -> float:
    """Train, train again elsewhere with everything deleted, be interrupted, predict; return what an attacker has."""
    runs: list[Sent] = []
    predictions = []
    for name, changes in (("first", {}), ("again", {"name": "other", "seed": 11, "epochs": 5}), ("cut", {"seed": 6})):
        notes = Notes()
        parties, out = files(notes, privacy), folder / name
        if name == "cut":
            with pytest.raises(Enough):
                sl_queue.run_local(job(**changes), parties, out=out, on_status=stop_after(2))
        sl_queue.run_local(job(**changes), parties, out=out)
        runs.append(notes.sent)
        rows = {file.party: file.data for file in parties}
        states = {role: out / role for role in ("bank", "shop")}
        predictions.append(predict_threads(job(**changes), parties, states, Asked(), rows=rows).outputs[:, 0])
    return best_attack(runs, predictions)


def test_without_a_defence_the_attack_reads_every_label(tmp_path: Path) -> None:
    assert attacked(tmp_path, {}) > 0.99


def test_a_response_caps_whatever_is_added_up_over_epochs_restarts_runs_and_predictions(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(blake2b(b"one that was drawn by lot", digest_size=32).digest())
    (tmp_path / "secret").chmod(0o600)
    privacy = {"labels": {"epsilon": EPSILON}, "secret": tmp_path / "secret"}
    found = attacked(tmp_path, privacy)
    spec = resolve(job(), files(Notes(), privacy)[-1], Importer()).with_secret(read_secret(tmp_path / "secret"))
    table = responded(spec, read_table(spec.table, token_key=token_key(spec)))
    assert table.labels is not None
    told = attacks.auc(LABELS == 1, table.labels.astype(np.float64))  # what the responses themselves say
    assert told == pytest.approx(cap_of_epsilon(EPSILON), abs=CHANCE)
    assert found < told + CHANCE
    lines = [json.loads(line) for line in (tmp_path / "secret.privacy.jsonl").read_text().splitlines()]
    assert {line["mechanism"] for line in lines} == {"labels"}
    assert len({line["run"] for line in lines}) == 3


def test_nothing_of_a_secret_is_in_what_other_parties_hold(tmp_path: Path) -> None:
    write_secret(tmp_path / "secret")
    secret = read_secret(tmp_path / "secret")
    sl_queue.run_local(
        job(), files(Notes(), {"labels": {"epsilon": EPSILON}, "secret": tmp_path / "secret"}), out=tmp_path / "out"
    )
    others = [path for role in ("bank", "scheduler") for path in (tmp_path / "out" / role).rglob("*") if path.is_file()]
    assert len(others) > 3
    for path in others:
        body = path.read_bytes()
        assert secret not in body
        assert secret.hex().encode() not in body

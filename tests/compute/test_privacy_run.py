"""Defences, meter and ledger in whole runs: what leaks, what a restart repeats, and what a budget stops."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sl_queue
from sl_queue.config.party import PartyFile
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.table import read_table
from sl_queue.errors import CheckpointError, JobError
from sl_queue.launch.privacy import require_lasting_secret, responded, token_key
from sl_queue.privacy.accounting import gaussian_epsilon, gaussian_mu
from sl_queue.storage.secret_file import write_secret
from tests.support.first_version import Enough, stop_after
from tests.support.split import Concatenated, equal_weights

N, ADAM = 400, {"name": "adam", "lr": 0.05}
RNG = np.random.default_rng(3)
FEATURES = RNG.standard_normal((N, 8)).astype(np.float32)
LABELS = (FEATURES[:, 0] + FEATURES[:, 4] > 1.2).astype(np.int64)  # a fifth of them
EVERYTHING: dict[str, Any] = {"activations": {"clip": 1.0, "sigma": 0.5}, "nopeek": 0.5, "meter": True}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU())

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers(x)


def job(**changes: Any) -> sl_queue.Job:
    parties = {
        "bank": {"role": "feature", "cut": [6]},
        "post": {"role": "feature", "cut": [6]},
        "shop": {"role": "label"},
    }
    values = {"name": "leak", "seed": 5, "epochs": 3, "batch_size": 64, "holdout": 0.25, "parties": parties}
    return sl_queue.Job(**values | {"pipeline": {"micro_batches": 2, "checkpoint_every": 3}} | changes)


def files(shop: Mapping[str, Any], bank: Mapping[str, Any], n_rows: int = N) -> list[PartyFile]:
    """Return the parties with these tables [privacy]; the post has none."""
    ids = np.arange(1000, 1000 + n_rows)
    given: dict[str, Any] = {}
    for place, party in enumerate(("bank", "post")):
        columns = FEATURES[:n_rows, 4 * place : 4 * place + 4]
        given[party] = {
            "data": sl_queue.Rows(ids, columns),
            "base": {"model": Base, "optimizer": ADAM},
            "privacy": dict(bank if place == 0 else {}),
        }
    fuse = {"model": Concatenated, "args": {"input_dim": 12, "output_dim": 1}, "optimizer": ADAM, "metrics": ["auroc"]}
    given["shop"] = {"data": sl_queue.Rows(ids, labels=LABELS[:n_rows]), "fuse": {**fuse, "loss": "bce_with_logits"}}
    given["shop"]["privacy"] = dict(shop)
    return [PartyFile(party=party, threads=1, **values) for party, values in given.items()]


def run(out: Path, shop: Mapping[str, Any], bank: Mapping[str, Any], on_status: Any = None, **changes: Any) -> Any:
    return sl_queue.run_local(job(**changes), files(shop, bank), out=out, on_status=on_status)


def report(out: Path, party: str) -> Any:
    return json.loads((out / party / "final" / "privacy.json").read_text())


# The meter ------------------------------------------------------------------------------------------------------


def test_undefended_labels_are_read_and_the_history_says_so(tmp_path: Path) -> None:
    result = run(tmp_path, {"meter": True}, {})
    for place in ("scheduler", "shop"):
        lines = [json.loads(line) for line in (tmp_path / place / "history.jsonl").read_text().splitlines()]
        assert [line["leak"] for line in lines] == [epoch["leak"] for epoch in result.history]
    leak = result.history[-1]["leak"]
    assert set(leak) == {"bank", "post"}
    assert leak["bank"]["direction"] > 0.99
    assert leak["bank"]["patient"] > 0.99
    assert leak["bank"]["chance"] < 0.65
    told = report(tmp_path, "shop")
    assert told["measured"] == leak
    assert told["mechanisms"] == []
    assert "every label: bank, post can read them from gradients" in told["not_protected"]


def test_a_meter_changes_no_bit_of_the_weights(tmp_path: Path) -> None:
    with_meter = run(tmp_path / "a", {"meter": True}, {"meter": True})
    without = run(tmp_path / "b", {}, {})
    assert equal_weights(with_meter.fuse, without.fuse)
    assert equal_weights(with_meter.base("bank"), without.base("bank"))
    assert "leak" not in without.history[0]
    assert set(report(tmp_path / "a", "bank")["measured"]["shop"]) >= {"ridge", "network", "attribute", "chance"}


# Recovery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shop", [{"labels": {"epsilon": 3.0}, "gradients": "max-norm"}, {"gradients": {"noise": 0.5}}])
def test_interrupted_equals_uninterrupted_with_every_defence_and_meter(tmp_path: Path, shop: dict[str, Any]) -> None:
    shop = {**shop, "meter": True}
    whole = run(tmp_path / "whole", shop, EVERYTHING)
    with pytest.raises(Enough):
        run(tmp_path / "cut", shop, EVERYTHING, stop_after(2))
    again = run(tmp_path / "cut", shop, EVERYTHING)
    for party in ("bank", "post"):
        assert equal_weights(whole.base(party), again.base(party))
    for party in ("bank", "shop"):
        assert report(tmp_path / "whole", party)["measured"] == report(tmp_path / "cut", party)["measured"]
    # What was forced back counts again, whether it was the same or not; a response is the same.
    epochs, more = (report(tmp_path / name, "bank")["mechanisms"][0]["releases_a_row"] for name in ("whole", "cut"))
    assert 3 == epochs <= more <= 5
    assert report(tmp_path / "whole", "shop")["mechanisms"] == report(tmp_path / "cut", "shop")["mechanisms"]
    assert equal_weights(whole.fuse, again.fuse)
    assert [epoch["leak"] for epoch in whole.history] == [epoch["leak"] for epoch in again.history]


def test_a_run_is_not_resumed_with_other_defences(tmp_path: Path) -> None:
    with pytest.raises(Enough):
        run(tmp_path, {}, {}, stop_after(2))
    with pytest.raises(CheckpointError, match=r"privacy\.gradients was 'not there', now 'max-norm'"):
        run(tmp_path, {"gradients": "max-norm"}, {})


def test_defences_change_what_is_trained_and_evaluation_is_defended_too(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", {}, {}, epochs=8)
    noisy = run(tmp_path / "noisy", {}, {"activations": {"clip": 1.0, "sigma": 3.0}}, epochs=8)
    assert not equal_weights(plain.base("bank"), noisy.base("bank"))
    still = run(tmp_path / "still", {}, {"activations": {"clip": 1e6, "sigma": 0.0}}, epochs=8)
    assert equal_weights(plain.base("bank"), still.base("bank"))  # nothing is clipped, and the chain rule is 1
    assert plain.history[-1]["holdout"]["auroc"] > 0.9
    assert noisy.history[-1]["holdout"]["auroc"] < 0.9


# The response ---------------------------------------------------------------------------------------------------


def given_labels(party_file: PartyFile, secret: bytes) -> np.ndarray:
    """Return the labels that a run trains on."""
    spec = resolve(job(), party_file, Importer()).with_secret(secret)
    table = responded(spec, read_table(spec.table, token_key=token_key(spec)))
    assert table.labels is not None
    assert table.truth is not None
    return table.labels


def test_a_response_depends_on_the_secret_and_the_row_and_on_nothing_of_the_run() -> None:
    shop = {"labels": {"epsilon": 1.0}}
    first = given_labels(files(shop, {})[-1], b"s" * 32)
    assert 0.2 < (first != LABELS).mean() < 0.34  # 1 / (1 + e) of them
    assert np.array_equal(given_labels(files(shop, {})[-1], b"s" * 32), first)
    assert np.array_equal(given_labels(files(shop, {}, 300)[-1], b"s" * 32), first[:300])  # a table that has grown
    assert not np.array_equal(given_labels(files(shop, {})[-1], b"t" * 32), first)


def test_everything_that_is_told_of_labels_is_made_of_responses(tmp_path: Path) -> None:
    """A label holder whose true labels are the responses of another does the same, bit for bit."""
    result = run(tmp_path / "a", {"labels": {"epsilon": 2.0}}, {})
    shop = files({"labels": {"epsilon": 2.0}}, {})[-1]
    labels = given_labels(shop, b"")
    plain = files({}, {})[-1].privacy
    pretended = shop.model_copy(
        update={"data": sl_queue.Rows(np.arange(1000, 1000 + N), labels=labels), "privacy": plain}
    )
    other = sl_queue.run_local(job(), [*files({}, {})[:-1], pretended])
    assert equal_weights(result.fuse, other.fuse)
    assert [e["holdout"] for e in result.history] == [e["holdout"] for e in other.history]
    told = report(tmp_path / "a", "shop")
    assert told["holdout_true"]["auroc"] > result.history[-1]["holdout"]["auroc"] + 0.02
    (mechanism,) = told["mechanisms"]
    assert (mechanism["epsilon"], mechanism["delta"], mechanism["auc_cap"], mechanism["releases_a_row"]) == (
        2.0,
        0.0,
        0.8808,
        1,
    )
    assert told["response"]["classes"] == [0.0, 1.0]


def test_no_attack_of_the_meter_passes_the_cap_by_more_than_chance_and_columns(tmp_path: Path) -> None:
    result = run(tmp_path, {"labels": {"epsilon": 1.0, "prior_ok": True}, "meter": True}, {})
    leak = result.history[-1]["leak"]["bank"]
    for name in ("direction", "spectral", "patient"):
        assert leak[name] < leak["response"] + 0.06
    assert leak["response"] < 0.731 + 0.08


def test_a_response_to_labels_too_rare_for_it_is_refused_and_may_be_accepted() -> None:
    rare = np.zeros(N, np.int64)
    rare[:3] = 1
    shop = files({"labels": {"epsilon": 2.0}}, {})[-1]
    shop = shop.model_copy(update={"data": sl_queue.Rows(np.arange(N), labels=rare)})
    expected = r"party 'shop': \[privacy\] labels = \{ epsilon = 2 \} with 0.75 % positives: 12.5 % of labels "
    with pytest.raises(
        JobError, match=expected + r"will say positive and 5.3 % of those are; raise epsilon above 4.5, or accept"
    ):
        given_labels(shop, b"s" * 32)
    accepted = files({"labels": {"epsilon": 2.0, "prior_ok": True}}, {})[-1]
    given_labels(accepted.model_copy(update={"data": shop.data}), b"s" * 32)


def test_a_response_to_numbers_is_refused() -> None:
    shop = files({"labels": {"epsilon": 2.0}}, {})[-1]
    shop = shop.model_copy(update={"data": sl_queue.Rows(np.arange(N), labels=RNG.standard_normal(N))})
    with pytest.raises(JobError, match=r"needs classes, whole numbers, one a row; these labels are float64 \(400,\)"):
        given_labels(shop, b"s" * 32)
    same = shop.model_copy(update={"data": sl_queue.Rows(np.arange(N), labels=np.ones(N, np.int64))})
    with pytest.raises(JobError, match=r"labels = \{ epsilon = 2 \} has no use: all labels are of one class"):
        given_labels(same, b"s" * 32)


# Secrets --------------------------------------------------------------------------------------------------------


def test_noise_cannot_be_computed_from_the_job_where_a_secret_keys_it(tmp_path: Path) -> None:
    bank: dict[str, Any] = {"activations": {"clip": 1.0, "sigma": 1.0}}
    public = [run(tmp_path / name, {}, bank) for name in ("a", "b")]
    assert equal_weights(public[0].base("bank"), public[1].base("bank"))  # whoever knows the job repeats it
    write_secret(tmp_path / "secret")
    private = [run(tmp_path / name, {}, bank | {"secret": tmp_path / "secret"}) for name in ("c", "d")]
    assert equal_weights(private[0].base("bank"), private[1].base("bank"))  # and whoever has the secret
    assert not equal_weights(public[0].base("bank"), private[0].base("bank"))
    assert report(tmp_path / "a", "bank")["not_protected"][0].startswith("anything: the job's seed keys every draw")
    assert not report(tmp_path / "c", "bank")["not_protected"][0].startswith("anything")


@pytest.mark.parametrize(
    "defence", [{"labels": {"epsilon": 1.0}}, {"gradients": "max-norm"}, {"gradients": {"noise": 1.0}}]
)
def test_a_deployed_party_that_draws_for_rows_needs_a_secret_that_outlives_its_folder(
    tmp_path: Path, defence: dict[str, Any]
) -> None:
    def require(**more: Any) -> None:
        required(files(defence | more, {})[-1], private=True)

    def required(party_file: PartyFile, *, private: bool) -> None:
        require_lasting_secret(resolve(job(), party_file, Importer()), tmp_path / "state", private=private)

    with pytest.raises(JobError, match=r"party 'shop': .* not named.*sl-queue key --private --out shop\.secret"):
        require()
    with pytest.raises(JobError, match="in its state folder"):
        require(secret=tmp_path / "state" / "secret")
    require(secret=tmp_path / "secret")
    require(secret="seed")  # of which a warning says that it is public
    required(files(defence, {})[-1], private=False)
    required(files({"meter": True}, {})[-1], private=True)


# The ledger and the budget --------------------------------------------------------------------------------------


def test_every_epoch_is_one_release_of_each_row_and_earlier_runs_count(tmp_path: Path) -> None:
    write_secret(tmp_path / "secret")
    bank = {"activations": {"clip": 1.0, "sigma": 4.0}, "secret": tmp_path / "secret"}
    for number, name in enumerate(("first", "second"), 1):
        run(tmp_path / name, {}, bank)
        told = report(tmp_path / name, "bank")
        (mechanism,) = told["mechanisms"]
        assert mechanism["releases_a_row"] == 3 * number
        assert mechanism["epsilon"] == pytest.approx(gaussian_epsilon(gaussian_mu([4.0] * 3 * number), 1e-6), abs=1e-3)
        assert told["earlier_runs"] == number - 1
    assert len((tmp_path / "second" / "bank" / "privacy.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "secret.privacy.jsonl").read_text().splitlines()) == 6


def test_a_budget_that_the_whole_run_would_pass_stops_it_before_anything_is_sent(tmp_path: Path) -> None:
    bank = {"activations": {"clip": 1.0, "sigma": 4.0}, "budget": 8.0}
    with pytest.raises(JobError, match=r"party 'bank': \[privacy\] budget = 8 allows 9 more epochs, and 10 are"):
        run(tmp_path, {}, bank, epochs=10)
    assert not (tmp_path / "bank" / "privacy.jsonl").exists()


def test_with_early_stopping_a_budget_stops_a_run_at_the_epoch_that_would_pass_it(tmp_path: Path) -> None:
    bank = {"activations": {"clip": 1.0, "sigma": 1.0}, "budget": 17.0}
    stopping = {"metric": "loss", "patience": 100}
    with pytest.raises(JobError, match=r"budget = 17 allows 0 more epochs"):
        run(tmp_path, {}, bank, epochs=50, early_stopping=stopping)
    epochs = len((tmp_path / "bank" / "privacy.jsonl").read_text().splitlines())
    before, after = (gaussian_epsilon(gaussian_mu([1.0] * n), 1e-6) for n in (epochs, epochs + 1))
    assert before <= 17 < after


def test_another_response_on_the_same_rows_adds_up_and_the_same_one_does_not(tmp_path: Path) -> None:
    write_secret(tmp_path / "secret")
    shop = {"secret": tmp_path / "secret", "budget": 3.0}
    for name in ("first", "second"):
        run(tmp_path / name, shop | {"labels": {"epsilon": 2.0}}, {})
        assert report(tmp_path / name, "shop")["mechanisms"][0]["epsilon"] == 2.0
    with pytest.raises(JobError, match=r"worth epsilon 4.25 in all; nothing was sent"):
        run(tmp_path / "third", shop | {"labels": {"epsilon": 2.25}}, {})

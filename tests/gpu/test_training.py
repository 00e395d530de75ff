"""Training on a GPU: split equals joined, twice equals once, resumed equals undisturbed, with hands or without."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue.checking.check import check
from sl_queue.compute.seeds import key, seeded
from sl_queue.compute.threads import settings_kept
from sl_queue.local.threads import Result, run_local, run_threads
from sl_queue.protocol.messages import SCHEDULER, MicroBatch
from tests.support.resolved import train_joined
from tests.support.split import Concatenated, Parties, Stages, equal_weights, furthest, parties

ROWS = 60
GPU = torch.device("cuda")
ADAM = {"name": "adam", "lr": 0.01}
PIPELINE = {"micro_batches": 3, "depth": 6, "checkpoint_every": 2}


class Sequences(nn.Module):
    """A recurrent layer over six readings of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(2, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(len(x), 6, 2))[0][:, -1]  # type: ignore[no-any-return]


class Words(nn.Module):
    """An embedding, whose gradient is added row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.words((x.abs() * 2).long().clamp(max=3)).mean(1))  # type: ignore[no-any-return]


def images() -> nn.Module:
    layers = nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Unflatten(1, (3, 2, 2)), *layers, nn.Flatten())


def attention() -> nn.Module:
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (3, 4)), encoder, nn.Flatten(), nn.Linear(12, 5))


def table() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 5))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "table": table,
    "images": images,
    "sequences": Sequences,
    "words": Words,
    "attention": attention,
}


def made(base: Callable[[], nn.Module] = table, devices: tuple[str, str] = ("cuda", "cuda"), **more: Any) -> Parties:
    """Return a bank and an insurer, who has the labels, on these devices."""
    torch.manual_seed(3)
    draw = np.random.default_rng(5)
    fuse = nn.Sequential(Concatenated(10, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 1))
    features = {party: draw.normal(size=(ROWS, 12)).astype(np.float32) for party in ("bank", "insurer")}
    settings: dict[str, Any] = {"batch_size": 12, "epochs": 3, "holdout": 0.2, "pipeline": PIPELINE, "optimizer": ADAM}
    settings |= {"metrics": ["auroc"], "label_holder": "insurer", "cuts": {"bank": [5], "insurer": [5]}}
    run = parties({"bank": base(), "insurer": table()}, fuse, features, draw.integers(0, 2, ROWS), **settings | more)
    on = dict(zip(("bank", "insurer"), devices, strict=True))
    return Parties(run.job, {p: file.replace(device=on[p], threads=1) for p, file in run.files.items()}, run.tables, {})


def trained(run: Parties) -> Stages:
    with settings_kept():
        return run.stages().train(run.pipeline)


def assert_same(one: Stages, other: Stages) -> None:
    assert one.losses == other.losses
    assert one.evaluations == other.evaluations
    for name, module in one.modules().items():
        assert equal_weights(module, other.modules()[name]), name


def assert_split_equals_joined(run: Parties) -> None:
    split = trained(run)
    with settings_kept():
        joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(run.n_rows))
    assert split.losses == joined.losses
    assert [line["holdout"] for line in joined.history] == split.evaluations
    for name, module in split.modules().items():
        theirs = joined.fuse if name == "fuse" else joined.bases[name]
        assert equal_weights(module, theirs), (name, furthest(module, theirs))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_split_equals_joined_on_any_devices(model: str, devices: tuple[str, str]) -> None:
    assert_split_equals_joined(made(MODELS[model], devices))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_split_equals_joined_in_mixed_precision(precision: str) -> None:
    assert_split_equals_joined(made(precision=precision))


@pytest.mark.parametrize("model", MODELS)
def test_a_second_time_and_a_resumed_run_have_the_bits_of_the_first(model: str) -> None:
    run = made(MODELS[model])
    quiet = trained(run)
    assert_same(trained(run), quiet)
    for step in range(1, 11, 2):
        with settings_kept():
            begun, fresh = run.stages().train(run.pipeline, stop_after=step), run.stages()
            fresh.bases["bank"].load(begun.bases["bank"].state())
            fresh.fuse.load(begun.fuse.state())
            fresh.train(run.pipeline, first_step=step + 1)
        assert begun.losses + fresh.losses == quiet.losses, step
        for name, module in quiet.modules().items():
            assert equal_weights(module, fresh.modules()[name]), (name, step)


def test_a_run_in_threads_has_the_bits_of_one_loop_and_gives_settings_back() -> None:
    run = made(images, holdout=0.0)  # which rows are held out follows their ids there, and their positions here
    stages = trained(run)
    result = run_local(run.job, list(run.files.values()))
    assert furthest(result.fuse, stages.modules()["fuse"].cpu()) == 0
    assert furthest(result.base("bank"), stages.modules()["bank"].cpu()) == 0
    assert torch.get_deterministic_debug_mode() == 0


def test_check_finds_both_ways_equal_bit_for_bit() -> None:
    run = made(images)
    found = check(run.job, list(run.files.values()))
    assert [finding.text for finding in found if finding.level == "error"] == []
    assert any("all weights are equal bit for bit" in finding.text for finding in found)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("model", ["table", "images"])
def test_hands_change_no_bit_but_the_last_of_what_others_compute(model: str, alone: bool, tmp_path: Path) -> None:
    run = made(MODELS[model])

    def outcome(hands: int) -> Result:
        states = {role: tmp_path / str(hands) / role for role in ("bank", "insurer", SCHEDULER)}
        files = [file.replace(hands={"alone": alone}) if hands else file for file in run.files.values()]
        counts = {"bank": hands, "insurer": hands} if hands else {}
        return run_threads(run.job, files, "memory://", states, lambda _: None, hands=counts)

    plain, one, several = (outcome(hands) for hands in (0, 1, 3))
    losses, of_one, of_several = ([line["loss"] for line in result.history] for result in (plain, one, several))
    assert of_one == of_several == (losses if alone else pytest.approx(losses, rel=1e-4))
    for name in ("bank", "insurer", "fuse"):
        module, theirs, others = (r.fuse if name == "fuse" else r.base(name) for r in (plain, one, several))
        assert equal_weights(theirs, others), "it depends on how many there are"
        if alone and (model, name) != ("images", "bank"):  # cuDNN rounds running averages in a way of its own
            assert equal_weights(module, theirs), name
        if alone:  # else the lead makes optimizer steps on its CPU
            assert all(torch.equal(*pair) for pair in zip(module.parameters(), theirs.parameters(), strict=True))


def test_draws_are_keyed_and_leave_the_generators_as_they_were() -> None:
    before = torch.cuda.get_rng_state()

    def drawn(of: int) -> Tensor:
        with seeded(of, GPU):
            return torch.rand(5, device=GPU)

    public, private = (key(7, "bank", "base forward", MicroBatch(0, 0), secret) for secret in (b"", bytes(32)))
    assert torch.equal(drawn(private), drawn(private))
    assert not torch.equal(drawn(private), drawn(public))
    assert torch.equal(torch.cuda.get_rng_state(), before)


class Ema(nn.Module):
    """A loss that keeps an average, in a buffer that begins on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        value = nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), labels.float())
        if self.training:
            self.mean = self.mean * 0.9 + 0.1 * value.detach()
        return value / self.mean


def called(loss: Callable[[Tensor, Tensor], Tensor], output: Tensor, labels: Tensor) -> Tensor:
    return loss(output, labels)


@pytest.mark.parametrize(
    "loss",
    [Ema, lambda: Ema().forward, lambda: partial(called, Ema())],
    ids=["a module", "a method of one", "an argument of a function"],
)
def test_a_loss_with_a_buffer_is_trained_with_and_saved(loss: Callable[[], Any]) -> None:
    run = made(loss=loss())
    assert_split_equals_joined(run)
    run_local(run.job, list(run.files.values()))

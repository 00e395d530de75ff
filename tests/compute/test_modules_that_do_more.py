"""Modules, losses and metrics that do more than compute: merge weights, save another form, write into arguments."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn

from sl_queue import check, holdout_rows, run_local
from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from tests.support.split import equal_weights

N = 40
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(N, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
SGD = {"name": "sgd", "lr": 0.1}
HELD = holdout_rows(np.arange(N), 7, 0.25)


class Head(nn.Module):
    """One layer; `squeezes` takes every axis of length one away."""

    def __init__(self, squeezes: bool = False) -> None:
        super().__init__()
        self.layer, self.squeezes = nn.Linear(4, 1), squeezes

    def forward(self, inputs: list[Tensor]) -> Tensor:
        output = self.layer(inputs[0])
        return output.squeeze() if self.squeezes else output  # type: ignore[no-any-return]


def job_of(**job: Any) -> Job:
    return Job(
        name="t",
        seed=7,
        parties={"bank": {"role": "feature", "cut": [4]}, "holder": {"role": "label"}},
        **{"epochs": 3, "batch_size": 8, "holdout": 0.25, **job},
    )


def files_of(base: Any, fuse: Any = None, start: Path | None = None, labels: Any = Y, **more: Any) -> list[PartyFile]:
    torch.manual_seed(2)
    learning = {"optimizer": more.pop("optimizer", SGD), **({"ema": more.pop("ema")} if "ema" in more else {})}
    rows = Rows(np.arange(N), None, labels, more.pop("weights", None))
    begins: dict[str, Any] = {} if start is None else {"start": {"from": start / "bank"}}
    head = {"model": fuse or Head(), "loss": "bce_with_logits", **learning, **more}
    bank = {"model": base, **learning}
    return [
        PartyFile(party="bank", threads=1, data=Rows(np.arange(N), X), base=bank, **begins),
        PartyFile(party="holder", threads=1, data=rows, fuse=head),
    ]


# Evaluation mode and saved forms ------------------------------------------------------------------------------------


class Merging(nn.Module):
    """A low-rank change of a frozen layer, merged into it in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(4, 2))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.b.data @ self.a.data) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.b @ self.a)


class Caching(nn.Module):
    """Normalises its weights once, as evaluation begins."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.cache: Tensor | None = None

    def train(self, mode: bool = True) -> "Caching":
        super().train(mode)
        self.cache = None if mode else F.normalize(self.weight.detach())
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight) if self.cache is None else self.cache)


@pytest.mark.parametrize("kind", [Merging, Caching])
def test_what_a_layer_computes_as_evaluation_begins_is_of_the_averaged_weights(kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    result = run_local(job_of(), files_of(kind(), ema=0.9))
    base, fuse = result.base("bank").eval(), result.fuse.eval()
    with torch.no_grad():
        output = fuse([base(torch.from_numpy(X[HELD]))])[:, 0]
    loss = F.binary_cross_entropy_with_logits(output, torch.from_numpy(Y[HELD]).float()).item()
    assert result.history[-1]["holdout"]["loss"] == pytest.approx(loss, rel=1e-4)


class Transposed(nn.Module):
    """Saves its weights the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = (self.w if keep_vars else self.w.detach()).t().contiguous()

    def _load_from_state_dict(self, state: Any, prefix: str, *_: Any) -> None:
        with torch.no_grad():
            self.w.copy_(state[f"{prefix}weight"].t())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def test_a_run_begins_with_weights_that_a_module_saves_in_another_form(tmp_path: Path) -> None:
    first = run_local(job_of(), files_of(Transposed()), out=tmp_path / "one")
    still = {"name": "sgd", "lr": 0.0}
    second = run_local(job_of(), files_of(Transposed(), start=tmp_path / "one", optimizer=still), out=tmp_path / "two")
    assert equal_weights(first.base("bank"), second.base("bank"))


class Growing(nn.Module):
    """Has a memory that grows in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("memory", torch.zeros(1))
        self.memory: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(self.memory) < 9:
            self.memory.resize_(len(self.memory) + 1)[-1] = 0.1
        return self.layer(x) * (1 + self.memory.sum())  # type: ignore[no-any-return]


def test_a_buffer_may_be_resized_in_place() -> None:
    result = run_local(job_of(), files_of(Growing()))
    assert result.base("bank").memory.shape == (9,)


# Losses and metrics that write into what they are given -------------------------------------------------------------


def sigmoid_in_place(output: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy(output.sigmoid_(), labels.to(output.dtype))


def sigmoid(output: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy(output.sigmoid(), labels.to(output.dtype))


def scaled_in_place(output: Tensor, labels: Tensor) -> Tensor:
    return (output - labels.mul_(2).sub_(1)).square().mean()


def scaled(output: Tensor, labels: Tensor) -> Tensor:
    return (output - (labels * 2 - 1)).square().mean()


@pytest.mark.parametrize(
    ("in_place", "plain", "labels", "metrics"),
    [
        (sigmoid_in_place, sigmoid, Y, ["accuracy", "auroc"]),
        (scaled_in_place, scaled, Y.astype(np.float32), ["mse", "r2"]),
    ],
)
def test_a_loss_that_writes_into_its_arguments_changes_nothing_else(
    in_place: Callable[..., Tensor], plain: Callable[..., Tensor], labels: Any, metrics: list[str]
) -> None:
    torch.manual_seed(1)
    base = nn.Linear(6, 4)
    lines = [
        run_local(job_of(), files_of(copy.deepcopy(base), labels=labels, loss=loss, metrics=metrics)).history[-1]
        for loss in (in_place, plain)
    ]
    assert lines[0]["loss"] == lines[1]["loss"]
    assert lines[0]["holdout"] == lines[1]["holdout"]


def right_in_place(output: Tensor, labels: Tensor) -> float:
    return float(((output.sigmoid_()[:, 0] > 0.5) == (labels > 0.5)).float().mean())


def test_a_metric_that_writes_into_its_arguments_changes_no_other() -> None:
    torch.manual_seed(1)
    held = run_local(job_of(), files_of(nn.Linear(6, 4), metrics=[right_in_place, "accuracy"])).history[-1]["holdout"]
    assert held["right_in_place"] == pytest.approx(held["accuracy"])


@pytest.mark.parametrize(
    ("loss", "sums"),
    [
        (nn.BCEWithLogitsLoss(reduction="sum"), True),
        (lambda output, labels: (output - labels).square().sum(), True),
        (lambda output, labels: (output - labels).square().mean(), False),
        (nn.BCEWithLogitsLoss(), False),
    ],
)
def test_a_sum_is_warned_of_where_a_step_is_cut_into_parts(loss: Any, sums: bool) -> None:
    for micro_batches in (2, 1):
        job = job_of(pipeline={"micro_batches": micro_batches})
        said = " ".join(finding.text for finding in check(job, files_of(nn.Linear(6, 4), loss=loss)))
        assert ("the loss is twice as large of all rows twice: it is a sum" in said) == (sums and micro_batches == 2)


# Held-out rows that count for nothing, or are few -------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "metrics"), [("loss", []), ("f1", ["f1"])])
def test_held_out_rows_that_do_not_count_neither_stop_a_run_nor_choose_its_weights(
    metric: str, metrics: list[str]
) -> None:
    weights = np.where(HELD, 0.0, 1.0)
    job = job_of(epochs=6, early_stopping={"metric": metric, "patience": 2})
    files = files_of(nn.Linear(6, 4), weights=weights, metrics=metrics)
    result = run_local(job, files)
    assert len(result.history) == 6
    assert {value for line in result.history for value in line["holdout"].values()} == {None}
    errors = [finding.text for finding in check(job, files) if finding.exit_code]
    assert any(f"early_stopping.metric = {metric!r}: no held-out row counts" in text for text in errors)


def test_a_model_that_cannot_take_the_last_held_out_row_alone_is_found_by_check() -> None:
    held = int(HELD.sum())
    rows = held - 1  # evaluated together, and one is left over
    assert rows > 1
    assert (N - held) % rows != 1
    errors = [f.text for f in check(job_of(batch_size=rows), files_of(nn.Linear(6, 4), Head(True))) if f.exit_code]
    assert any("puts out float32 () for 1 row(s)" in text and "the last held-out rows" in text for text in errors)

"""A loss gets numbers wide enough, and each output meets its own label."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn

from sl_queue.compute.fitting import Form, fitted
from sl_queue.compute.losses import floor_of, loss_of
from sl_queue.compute.objective import why_not_finite
from sl_queue.errors import ComputeError, JobError, NonFiniteError, ShapeError
from tests.support.resolved import computes
from tests.support.split import Concatenated, Parties, Stages, equal_weights, furthest, parties

CPU = torch.device("cpu")
ROWS = 40
FRACTIONS, CLASSES = np.linspace(-3, 900, ROWS), np.arange(ROWS) % 2


@pytest.fixture(autouse=True)
def _fixed_draws() -> None:
    torch.manual_seed(3)


class Constant(nn.Module):
    """Puts out one number for each row, whatever comes in; trains nothing to speak of."""

    def __init__(self, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([[value]], dtype=dtype))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.value.expand(len(inputs[0]), 1)


def run_of(labels: Any, fuse: nn.Module, loss: Any, **changes: Any) -> Parties:
    features = np.random.default_rng(0).normal(size=(len(labels), 3)).astype(np.float32)
    dtype = next(fuse.parameters()).dtype
    settings: dict[str, Any] = {
        "bases": {"bank": nn.Linear(3, 4).to(dtype)},
        "features": {"bank": features},
        "holdout": 0.3,
    }
    settings |= {"cuts": {"bank": [4]}, "optimizer": {"name": "sgd", "lr": 1e-12}}
    return parties(**settings | {"fuse": fuse, "labels": labels, "loss": loss} | changes)


def trained(run: Parties) -> Stages:
    return run.stages().train(run.pipeline)


# Dtype --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", ["mse", "torch.nn:L1Loss", lambda o, y: (o - y).abs().mean()], ids=["mse", "l1", "own"]
)
@pytest.mark.parametrize(
    ("output", "dtype", "label"),
    [
        (1000.0, torch.bfloat16, 1001.0),  # bfloat16 has 1000 and 1008
        (2048.0, torch.float16, 2049.0),
        (2.0**24, torch.float32, 2**24 + 1),  # whole numbers of a table
        (2.0**24, torch.float32, 2.0**24 + 1),
        (1e8, torch.float32, 1e8 + 1),
    ],
    ids=str,
)
def test_an_error_of_one_is_told_as_one_whatever_the_models_dtype(
    loss: Any, output: float, dtype: torch.dtype, label: float
) -> None:
    labels = np.full(ROWS, label)
    found = trained(run_of(labels, Constant(output, dtype), loss, metrics=["mae", "mse"]))
    assert found.losses[0] == pytest.approx(1.0)
    assert found.evaluations[0] == pytest.approx({"loss": 1.0, "mae": 1.0, "mse": 1.0})


def test_metrics_see_fractions_that_float32_does_not_have() -> None:
    labels = np.full(ROWS, 0.1)
    found = trained(run_of(labels, Constant(0.1, torch.float32), "mse", metrics=["mae"]))
    assert found.evaluations[0]["mae"] == pytest.approx(abs(0.1 - float(np.float32(0.1))), rel=1e-6)


def test_a_class_of_a_bfloat16_model_is_learned_in_float32() -> None:
    seen: set[torch.dtype] = set()

    def own(output: Tensor, labels: Tensor) -> Tensor:
        if len(output) > 4:  # no trial
            seen.update((output.dtype, labels.dtype))
        return F.binary_cross_entropy_with_logits(output, labels.to(output.dtype))

    for labels in (CLASSES, CLASSES * 1.0):
        trained(run_of(labels, Constant(0.5, torch.bfloat16), own))
    assert seen == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("labels", "floor"),
    [
        (FRACTIONS, torch.float32),  # as ever: rounded as the weights are
        (np.random.default_rng(0).lognormal(5, 3, 1000), torch.float32),
        (CLASSES, torch.float32),
        (np.array([0, 2**24 + 1]), torch.float64),
        (np.array([0.0, 2.0**24 + 1]), torch.float64),
        (1e8 + np.linspace(0, 1, 9), torch.float64),
        (np.array([1.0, 1e300]), torch.float64),
        (np.array([1.0, 2.5], np.float32), torch.float32),
        (np.array([True, False]), torch.float32),
    ],
)
def test_float64_is_taken_only_where_float32_does_not_have_the_labels(labels: Any, floor: torch.dtype) -> None:
    assert floor_of(labels) == floor


# Shape --------------------------------------------------------------------------------------------------------------

BY_ROW: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": lambda o, y: ((o - y) ** 2).mean(),
    "squares of a flat output": lambda o, y: ((o[:, 0] - y.reshape(-1)) ** 2).mean(),
    "squares of the table's shape": lambda o, y: ((o[:, 0] - y) ** 2).mean(),
    "squeezed": lambda o, y: ((o.squeeze() - y) ** 2).mean(),
    "weighted": lambda o, y: ((1 + y.abs()) * (o - y) ** 2).sum() / (1 + y.abs()).sum(),
    "weighted, squeezed": lambda o, y: ((1 + y.abs()) * (o.squeeze(1) - y) ** 2).sum() / (1 + y.abs()).sum(),
    "quantile": lambda o, y: torch.maximum(0.9 * (y - o), 0.1 * (o - y)).mean(),
    "hinge": lambda o, y: torch.relu(1 - o * (2 * y - 1)).mean(),
    "hinge, squeezed": lambda o, y: torch.relu(1 - o.squeeze(1) * (2 * y - 1)).mean(),
    "focal": lambda o, y: ((y - o.sigmoid()).abs() ** 2 * F.softplus(-o * (2 * y - 1))).mean(),
    "poisson": lambda o, y: (torch.exp(o) - y * o).mean(),
    "a function of torch": F.smooth_l1_loss,
    "a partial of one": partial(F.huber_loss, delta=2.0),
    "a module": nn.HuberLoss(),
}


@pytest.mark.parametrize("name", BY_ROW)
@pytest.mark.parametrize("labels", [CLASSES, CLASSES * 1.0, FRACTIONS / 100], ids=["whole", "0.0 and 1.0", "fractions"])
@pytest.mark.parametrize("output", [torch.full((2, 1), 0.1), torch.tensor([[0.3], [0.7]])], ids=["equal", "different"])
def test_each_output_meets_its_own_label(name: str, labels: Any, output: Tensor) -> None:
    """The mean over rows is the mean of what each row gives alone."""
    loss, warnings, _ = fitted(BY_ROW[name], BY_ROW[name], output, labels, "")
    outputs, tensor = torch.randn(ROWS, 1), torch.from_numpy(labels)
    found = loss(outputs, tensor)
    each = torch.stack([loss(outputs[[i, i]], tensor[[i, i]]) for i in range(ROWS)])
    weights = 1 + tensor.abs() if name.startswith("weighted") else torch.ones(ROWS)
    assert found == pytest.approx(((each * weights).sum() / weights.sum()).item(), rel=1e-4)
    assert not warnings


class Running(nn.Module):
    """Divides by a running mean of itself, and adds noise."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.ones(()))

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        value = ((output.squeeze(1) - labels) ** 2).mean() + 0.01 * torch.rand(())
        self.mean.mul_(0.9).add_(0.1 * value.detach())
        return value / self.mean


def test_state_and_draws_of_a_loss_do_not_hide_the_shape_it_takes() -> None:
    loss, warnings = fitted(Running(), None, torch.rand(2, 1), FRACTIONS, "")[:2]
    assert (loss.form, warnings) == (Form.TABLE, [])


@pytest.mark.parametrize(("output", "labels"), [((2,), (ROWS, 1)), ((2, 1, 3), (ROWS, 3)), ((2, 3), (ROWS, 1, 3))])
def test_labels_of_several_numbers_come_in_the_outputs_shape(output: tuple[int, ...], labels: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).normal(size=labels)
    loss, _, _ = fitted(BY_ROW["squares"], None, torch.rand(output), values, "")
    outputs = torch.randn(ROWS, *output[1:])
    expected = ((outputs.reshape(ROWS, -1) - torch.from_numpy(values).reshape(ROWS, -1)) ** 2).mean()
    assert loss(outputs, torch.from_numpy(values)) == pytest.approx(expected.item(), rel=1e-5)


def test_a_loss_over_all_rows_keeps_the_tables_shape() -> None:
    def cox(output: Tensor, times: Tensor) -> Tensor:
        risk = output[:, 0][times.argsort(descending=True)]
        return (torch.logcumsumexp(risk, 0) - risk).mean()

    outputs, times = torch.randn(ROWS, 1), torch.from_numpy(FRACTIONS)
    loss, _, _ = fitted(cox, cox, outputs[:2], FRACTIONS, "")
    assert loss(outputs, times) == cox(outputs, times)


def test_a_loss_that_takes_both_shapes_differently_is_warned_of() -> None:
    def ranked(output: Tensor, labels: Tensor) -> Tensor:
        margins = output[:, 0][:, None] - output[:, 0]
        return (margins.sigmoid() * (labels[:, None] < labels)).mean()

    _, (warning,), _ = fitted(ranked, ranked, torch.rand(2, 1), FRACTIONS, "")
    assert "it is given (rows,), as in the table" in warning


@pytest.mark.parametrize("loss", ["torch.nn:L1Loss", "torch.nn:SmoothL1Loss", "torch.nn:HuberLoss", BY_ROW["squares"]])
def test_a_split_run_with_a_loss_of_the_users_own_learns_a_line(loss: Any) -> None:
    features = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)  # as run_of makes them
    labels = 3 * features[:, 0].astype(np.float64)
    adam = {"name": "adam", "lr": 0.05}
    found = trained(run_of(labels, Concatenated(4, 1), loss, metrics=["r2"], epochs=30, batch_size=16, optimizer=adam))
    r2 = found.evaluations[-1]["r2"]
    assert r2 is not None and r2 > 0.99


def test_a_row_by_row_loss_of_torch_refuses_an_output_that_labels_do_not_fit() -> None:
    for loss in ("torch.nn:L1Loss", F.mse_loss):
        with pytest.raises(ShapeError, match=r"output is float32 \(2, 3\), the labels are float64 \(2,\)"):
            run_of(FRACTIONS, Concatenated(4, 3), loss).stages()


# Classes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "torch.nn:CrossEntropyLoss"])
@pytest.mark.parametrize("labels", [CLASSES, CLASSES * 1.0, CLASSES[:, None]], ids=["(n,)", "floats", "(n, 1)"])
def test_class_numbers_come_as_a_cross_entropy_takes_them(loss: Any, labels: Any) -> None:
    run = run_of(labels, Concatenated(4, 3), loss)
    want = F.cross_entropy(torch.eye(2, 3), torch.from_numpy(CLASSES[:2]))
    assert run.stages().fuse.objective.loss(torch.eye(2, 3), torch.from_numpy(labels[:2])) == want


@pytest.mark.parametrize("loss", ["cross_entropy", "torch.nn:CrossEntropyLoss"])
@pytest.mark.parametrize("kind", ["one-hot", "whole one-hot", "soft"])
def test_a_probability_for_each_class_is_a_label(loss: Any, kind: str) -> None:
    numbers = np.arange(ROWS) % 3
    labels = np.eye(3)[numbers].astype(np.int64 if kind == "whole one-hot" else np.float64)
    labels = 0.9 * labels + 0.1 / 3 if kind == "soft" else labels
    fuse = Concatenated(4, 3)
    found = trained(run_of(labels, fuse, loss, metrics=["accuracy", "auroc"], optimizer={"name": "sgd", "lr": 0.5}))
    assert found.evaluations[-1].keys() == {"loss", "accuracy", "auroc"}
    assert furthest(found.modules()["fuse"], fuse) > 1e-3


def test_one_hot_labels_train_as_class_numbers_do() -> None:
    numbers, base, fuse = np.arange(ROWS) % 3, nn.Linear(3, 4), Concatenated(4, 3)
    runs = [
        trained(run_of(labels, fuse, "cross_entropy", bases={"bank": base}, optimizer={"name": "sgd", "lr": 0.5}))
        for labels in (numbers, np.eye(3)[numbers])
    ]
    assert furthest(runs[0].modules()["fuse"], runs[1].modules()["fuse"]) < 1e-6
    assert not equal_weights(runs[0].modules()["fuse"], fuse)


@pytest.mark.parametrize(
    ("loss", "labels", "outputs", "complaint"),
    [
        ("cross_entropy", np.ones((ROWS, 3)) / 2, 3, r"float64 \(rows, 3\).* in 40 of 40 rows .* add up to 1"),
        ("torch.nn:CrossEntropyLoss", FRACTIONS, 3, "labels are not whole numbers; this loss takes class numbers"),
        ("bce_with_logits", CLASSES * 2 - 1, 1, "bce_with_logits takes 0 to 1: write -1 as 0 and 1 as 1"),
        ("bce_with_logits", CLASSES + 1, 1, "write 1 as 0 and 2 as 1"),
    ],
)
def test_labels_that_are_no_classes_are_named(loss: Any, labels: Any, outputs: int, complaint: str) -> None:
    with pytest.raises(JobError, match=complaint):
        run_of(labels, Concatenated(4, outputs), loss).stages()


# What cannot be learned from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (lambda o, y: ((o.detach() - y) ** 2).mean(), "does not depend on the fuse model's output"),
        (lambda o, y: torch.tensor(1.0), "does not depend on the fuse model's output"),
        (lambda o, y: ((o > 0) == y).float().mean(), "does not depend on the fuse model's output"),
        (lambda o, y: ((o - y) ** 2).mean(1), r"the loss returns float32 \(2,\); it must return the mean"),
        (nn.L1Loss(reduction="none"), r"the loss returns float32 \(2, 1\); it must return the mean"),
    ],
)
def test_a_loss_without_a_gradient_or_a_mean_is_named_before_training(loss: Any, complaint: str) -> None:
    with pytest.raises(ComputeError, match=complaint):
        run_of(CLASSES, Concatenated(4, 1), loss).stages()


def test_a_loss_that_is_a_constant_of_some_batches_is_no_constant() -> None:
    def of_three_rows(output: Tensor, labels: Tensor) -> Tensor:
        return output[2:].mean() if len(output) > 2 else torch.zeros(())

    run_of(CLASSES, Concatenated(4, 1), of_three_rows).stages()


def test_trials_leave_no_trace_in_a_loss_and_in_no_global_generator() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, output: Tensor, labels: Tensor) -> Tensor:
            self.calls += 1
            return (output - labels).abs().mean() + torch.rand(()) + float(np.random.rand())

    loss = Counting()
    run = run_of(FRACTIONS, Concatenated(4, 1), loss)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    run.stages()
    assert loss.calls == 0
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]


def test_a_loss_that_is_not_finite_is_said_to_come_from_where_it_comes_from() -> None:
    found = why_not_finite(torch.tensor([[1.0], [torch.nan], [torch.inf]]), "bank:Fuse")
    assert found.startswith("the output of bank:Fuse holds NaN or infinity in 2 of 3 rows")
    assert "has grown to 1e+20: lower the learning rate" in why_not_finite(torch.full((2, 1), 1e20), "bank:Fuse")
    assert "is finite, so the loss makes it" in why_not_finite(torch.zeros(2, 1), "bank:Fuse")


def test_the_log_of_a_negative_output_is_no_matter_of_the_learning_rate() -> None:
    run = run_of(FRACTIONS, Constant(-1.0, torch.float32), lambda o, y: (o.log() - y).abs().mean())
    with pytest.raises(NonFiniteError, match=r"micro-batch 0.0: the loss is nan; .* the loss makes it") as caught:
        trained(run)
    assert "learning rate" not in str(caught.value)


def test_a_named_loss_is_found_by_name() -> None:
    run = run_of(CLASSES, Concatenated(4, 1), "mse")
    assert loss_of(computes(run.job, [run.files["holder"]])[0], CPU).__name__ == "mse"  # type: ignore[attr-defined]

"""Loss, labels and metrics: right values, and every mistake of a user is named."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torch import Tensor, nn

from sl_queue.compute.label_scale import far_labels
from sl_queue.compute.losses import LOSSES
from sl_queue.compute.names import NAMED_LOSSES
from sl_queue.errors import (
    ComputeError,
    JobError,
    LocalProtocolError,
    NonFiniteError,
    ShapeError,
)
from sl_queue.protocol.messages import MicroBatch
from tests.support.bank import FIRST, ROWS, raised, setup, stages
from tests.support.split import Concatenated, parties

pytestmark = pytest.mark.usefixtures("one_thread_and_fixed_draws")


def test_the_losses_of_party_files_are_those_that_there_are() -> None:
    assert tuple(LOSSES) == NAMED_LOSSES


def hinge(output: Tensor, labels: Tensor) -> Tensor:
    return torch.relu(1 - output[:, 0] * (2 * labels - 1)).mean()


BAD_LABELS: list[tuple[str, Any, int, str]] = [
    ("cross_entropy", np.arange(ROWS) % 4, 3, "class labels go from 0 to 3, but the fuse model has 3 outputs, for "),
    ("cross_entropy", np.arange(ROWS) % 3 - 1, 3, "class labels go from -1 to 1"),
    ("cross_entropy", np.arange(ROWS) / 2 % 3, 3, "labels are not whole numbers; cross_entropy takes classes 0 to 2"),
    ("bce_with_logits", np.arange(ROWS) % 3, 1, "labels go from 0 to 2; bce_with_logits takes 0 to 1"),
    ("mse", np.where(np.arange(ROWS) == 3, np.nan, 1.0), 1, "labels hold NaN or infinity"),
    ("mse", np.array(["yes"] * ROWS), 1, "labels are <U3; write them as numbers"),
]


@pytest.mark.parametrize(("loss", "labels", "outputs", "complaint"), BAD_LABELS)
def test_labels_that_do_not_suit_loss_and_model_are_named_before_training(
    loss: str, labels: Any, outputs: int, complaint: str
) -> None:
    message = raised(JobError, lambda: stages(loss=loss, labels=labels, fuse=Concatenated(7, outputs)))
    assert message.startswith("party 'insurer': ")
    assert complaint in message


def test_an_output_that_does_not_suit_the_labels_is_named_before_training() -> None:
    message = raised(ShapeError, lambda: stages(fuse=Concatenated(7, 3)))
    assert message.startswith(
        "party 'insurer': the fuse model's output is float32 (2, 3), the labels are int64 (2,); this loss needs"
    )


def test_a_fuse_that_fails_on_the_cuts_is_named_before_training() -> None:
    message = raised(ShapeError, lambda: stages(fuse=Concatenated(9, 1)))
    failed = "tests.support.split:Concatenated failed on [float32 (2, 4), float32 (2, 3)]: RuntimeError: "
    assert message.startswith(f"party 'insurer': {failed}")
    assert "check tests.support.split:Concatenated and its args" in message

    class Pooling(nn.Module):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            return torch.cat(inputs, 1).mean()

    message = raised(ShapeError, lambda: stages(fuse=Pooling()))
    assert "returns float32 () for 2 rows; its first axis must be the rows" in message


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (lambda output, labels: output.sum() * 1j, "the loss returns complex64 (); it must return the mean"),
        (lambda output, labels: output**2, "the loss returns float32 (2, 1); it must return the mean over the rows"),
        (lambda output, labels: 5, "the loss returns int; it must return"),
        (lambda output, labels: output[5, 5], "failed on output float32 (2, 1) and labels int64 (2,): IndexError"),
        (nn.MarginRankingLoss, "failed on output float32 (2, 1) and labels int64 (2,): TypeError"),
    ],
)
def test_a_loss_of_the_users_own_that_cannot_be_used_is_named(loss: Any, complaint: str) -> None:
    assert complaint in raised(ComputeError, lambda: stages(loss=loss))


def test_a_loss_may_be_a_class_of_torch() -> None:
    run = setup(loss="torch.nn:SmoothL1Loss", labels=np.linspace(0, 1, ROWS)[:, None])
    found = run.stages()
    value = found.fuse.objective.loss(torch.zeros(2, 1), torch.ones(2, 1))
    assert value == 0.5
    found.train(run.pipeline)


def test_a_loss_that_becomes_nan_is_named_with_its_step() -> None:
    def diverging(output: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(output))
        return output.mean() * (torch.nan if calls.count(8) > 2 else 1.0)

    calls: list[int] = []
    run = setup(loss=diverging)  # steps of 8, 8 and 4 rows; trials are of fewer
    message = raised(NonFiniteError, lambda: run.stages().train(run.pipeline))
    assert message.startswith("party 'insurer', micro-batch 3.0: the loss is nan; the output of ")
    assert "is finite, so the loss makes it" in message


def test_an_infinite_gradient_of_a_finite_loss_is_named_with_the_party_it_is_for() -> None:
    def steep(output: Tensor, labels: Tensor) -> Tensor:
        return (output * 0).abs().sqrt().mean()

    found = stages(loss=steep)
    sent = found.bases["bank"].forward(FIRST)
    message = raised(NonFiniteError, lambda: found.fuse.forward_backward(FIRST, {"bank": sent}))
    assert message.startswith("party 'insurer', micro-batch 0.0: gradient for party 'bank' holds NaN or infinity")


def measure(scores: Any, labels: Any, metrics: list[str], loss: Any, order: Any = lambda parts: parts) -> Any:
    """Evaluate a model without parameters on scores of its own; half of the rows are held out."""
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
    scores = scores.reshape(len(labels), -1)
    run = parties(
        bases={"bank": nn.Identity()},
        fuse=nn.Identity(),
        features={"bank": scores},
        labels=labels,
        cuts={"bank": [scores.shape[1]]},
        aggregation="sum",
        loss=loss,
        metrics=metrics,
        batch_size=4,
        holdout=0.5,
    )
    found, batches = run.stages(), run.job.batches(len(labels))
    for index in order(list(range(batches.holdout_parts))):
        micro_batch = MicroBatch(0, index)
        found.fuse.evaluate(micro_batch, {"bank": found.bases["bank"].predict(micro_batch)})
    rows = np.concatenate([batches.holdout_part(index) for index in range(batches.holdout_parts)])
    return found.fuse.metrics(), scores[rows], labels[rows]


def test_binary_metrics_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 2, 60)
    names = ["auroc", "accuracy", "f1", "precision", "recall", "average_precision"]
    found, scores, held_out = measure(draw.normal(size=60) + labels, labels, names, "bce_with_logits")
    predicted = scores[:, 0] > 0
    assert found == pytest.approx(
        {
            "loss": reference.log_loss(held_out, 1 / (1 + np.exp(-scores[:, 0].astype(np.float64)))),
            "auroc": reference.roc_auc_score(held_out, scores[:, 0]),
            "accuracy": reference.accuracy_score(held_out, predicted),
            "f1": reference.f1_score(held_out, predicted),
            "precision": reference.precision_score(held_out, predicted),
            "recall": reference.recall_score(held_out, predicted),
            "average_precision": reference.average_precision_score(held_out, scores[:, 0]),
        },
        rel=1e-5,
    )


def test_multiclass_metrics_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(2)
    labels = draw.integers(0, 3, 90)
    names = ["auroc", "accuracy", "f1", "precision", "recall", "average_precision"]
    found, scores, held_out = measure(draw.normal(size=(90, 3)) + np.eye(3)[labels], labels, names, "cross_entropy")
    shares = np.exp(scores.astype(np.float64)) / np.exp(scores.astype(np.float64)).sum(1, keepdims=True)
    predicted, one_hot = scores.argmax(1), np.eye(3)[held_out]
    assert found == pytest.approx(
        {
            "loss": reference.log_loss(held_out, shares),
            "auroc": reference.roc_auc_score(held_out, shares, multi_class="ovr"),
            "accuracy": reference.accuracy_score(held_out, predicted),
            "f1": reference.f1_score(held_out, predicted, average="macro"),
            "precision": reference.precision_score(held_out, predicted, average="macro"),
            "recall": reference.recall_score(held_out, predicted, average="macro"),
            "average_precision": reference.average_precision_score(one_hot, shares),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("loss", ["mse", nn.functional.l1_loss])
def test_regression_metrics_are_those_of_scikit_learn(loss: Any) -> None:
    draw = np.random.default_rng(3)
    labels = draw.normal(size=(60, 1))
    found, scores, held_out = measure(labels + draw.normal(size=(60, 1)), labels, ["mse", "mae", "r2", "loss"], loss)
    values = {
        "mse": reference.mean_squared_error(held_out, scores),
        "mae": reference.mean_absolute_error(held_out, scores),
        "r2": reference.r2_score(held_out, scores),
    }
    assert found == pytest.approx(values | {"loss": values["mse" if loss == "mse" else "mae"]}, rel=1e-5)


def test_metrics_do_not_depend_on_the_order_of_evaluation() -> None:
    scores = np.random.default_rng(1).normal(size=600)  # enough for their sum to depend on its order
    forward, *_ = measure(scores, np.zeros(600), ["mse"], "mse")
    backward, *_ = measure(scores, np.zeros(600), ["mse"], "mse", lambda parts: parts[::-1])
    assert forward == backward


def test_an_evaluation_starts_anew_after_its_metrics() -> None:
    found = stages(holdout=0.4).fuse
    base = stages(holdout=0.4).bases["bank"]
    found.evaluate(FIRST, {"bank": base.predict(FIRST)})
    assert found.metrics()["loss"] is not None
    assert "without an evaluation" in raised(LocalProtocolError, found.metrics)


@pytest.mark.parametrize(
    ("labels", "loss", "metrics", "undefined"),
    [
        (np.zeros(40, int), "bce_with_logits", ["auroc", "average_precision", "f1", "accuracy", "recall"], 2),
        (np.ones(40, int), "bce_with_logits", ["auroc", "average_precision", "precision"], 2),
        (np.zeros(40, int), "cross_entropy", ["auroc", "average_precision", "f1", "precision", "recall"], 2),
        (np.ones(40), "mse", ["r2", "mse"], 1),
    ],
)
def test_a_metric_that_the_held_out_rows_do_not_define_is_none(
    labels: Any, loss: str, metrics: list[str], undefined: int
) -> None:
    scores = np.random.default_rng(1).normal(size=(40, 3 if loss == "cross_entropy" else 1))
    found, *_ = measure(scores, labels, metrics, loss)
    assert [name for name in metrics if found[name] is None] == metrics[:undefined]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_class_that_no_held_out_row_has_is_left_out_of_the_mean() -> None:
    draw = np.random.default_rng(2)
    labels = draw.integers(0, 2, 60)
    found, scores, held_out = measure(draw.normal(size=(60, 3)), labels, ["auroc"], "cross_entropy")
    shares = torch.from_numpy(scores).double().softmax(1).numpy()
    each = [reference.roc_auc_score(held_out == c, shares[:, c]) for c in (0, 1)]
    assert found["auroc"] == pytest.approx(sum(each) / 2, rel=1e-5)


CLASSES, NUMBERS = np.arange(ROWS) % 2, np.linspace(0, 1, ROWS)[:, None]


@pytest.mark.parametrize(
    ("loss", "labels", "metric", "complaint"),
    [
        ("bce_with_logits", CLASSES, "auc", "'auc' is unknown for a binary loss; allowed are loss, auroc, accuracy"),
        ("mse", NUMBERS, "auroc", "'auroc' is unknown for a regression loss; allowed are loss, mse, rmse, mae, r2"),
        (nn.functional.l1_loss, NUMBERS, "f1", "'f1' is unknown for a regression loss"),
        (hinge, CLASSES, "auc", "'auc' is unknown for a binary loss"),
    ],
)
def test_a_metric_that_is_unknown_is_named_with_those_that_are_not(
    loss: Any, labels: Any, metric: str, complaint: str
) -> None:
    assert complaint in raised(JobError, lambda: stages(loss=loss, labels=labels, metrics=[metric]))


@pytest.mark.parametrize("labels", [np.arange(40) % 2, np.arange(40) % 2 * 1.0, np.arange(40) % 2 * 2 - 1])
def test_with_a_loss_of_the_users_own_the_labels_decide_what_is_measured(labels: Any) -> None:
    found, scores, held_out = measure(np.random.default_rng(1).normal(size=40), labels, ["accuracy"], hinge)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(held_out == 1, scores[:, 0] > 0))
    counts, *_ = measure(np.zeros(40), labels, ["mae"], hinge)
    assert counts["mae"] == pytest.approx(np.abs(held_out).mean())
    fractions, *_ = measure(np.zeros(40), labels + 0.25, ["mse"], hinge)
    assert fractions["mse"] == pytest.approx(np.mean((held_out + 0.25) ** 2))


def test_labels_that_no_metric_of_the_task_can_take_are_named_before_training() -> None:
    message = raised(JobError, lambda: stages(loss=hinge, labels=np.arange(ROWS) % 3, metrics=["accuracy"]))
    assert message.startswith("party 'insurer': labels go from 0 to 2; accuracy needs 0 and 1, or -1 and 1")
    three = {"loss": hinge, "labels": np.arange(ROWS) % 4, "fuse": Concatenated(7, 3)}
    message = raised(JobError, lambda: stages(**three, metrics=["f1", "auroc"]))
    assert "class labels go from 0 to 3, but the fuse model has 3 outputs" in message
    stages(**three)


def test_the_steps_loss_is_the_mean_over_its_rows_however_they_are_cut() -> None:
    one = setup()
    same = {"bases": {p: one.given[p] for p in ("bank", "insurer")}, "fuse": one.given["fuse"]}
    three = setup(**same, pipeline={"micro_batches": 3})
    whole, cut = one.stages().train(one.pipeline).losses, three.stages().train(three.pipeline).losses
    assert cut == pytest.approx(whole, rel=1e-5)


# Labels far from the model's first outputs ------------------------------------------------------------------------


class Scaled(Concatenated):
    """A fuse model that knows mean and deviation of the labels."""

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return 3500.0 + 800.0 * super().forward(inputs)


class Words(nn.Module):
    """A fuse model that takes activations as numbers of words, which are not negative."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 1)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        joined = torch.cat(inputs, 1)
        assert bool((joined >= 0).all())
        return self.words(joined.long().clamp(max=8)).sum(1) + 0.0 * joined.sum(1, keepdim=True)


FAR = 3500.0 + 800.0 * np.linspace(-1.0, 1.0, ROWS)


def told_of(labels: Any, fuse: nn.Module, loss: Any = "mse", **more: Any) -> str | None:
    return far_labels(stages(labels=labels, fuse=fuse, loss=loss, **more).fuse)


def test_labels_far_from_the_first_outputs_are_told_with_what_brings_them_near() -> None:
    told = told_of(FAR, Concatenated(7, 1))
    assert told is not None
    assert "the labels have mean 3500 and standard deviation 485.6 where trained on, and the fuse model" in told
    assert told.endswith("have it put out mean + deviation * x")
    assert told_of(FAR, Scaled(7, 1)) is None
    close = told_of(1234567.0 + np.arange(ROWS) / 10, Concatenated(7, 1))
    assert close is not None and "mean 1234567.95 and" in close


@pytest.mark.parametrize(
    ("labels", "loss", "outputs"),
    [
        (np.round(FAR), "poisson", 1),
        (FAR / 800.0, "mse", 1),
        (np.arange(ROWS) % 2, "bce_with_logits", 1),
        (np.arange(ROWS) % 2, "bce_with_logits", 0),
        (np.full(ROWS, 3500.5), "mse", 1),
        (np.where(np.arange(ROWS) == 3, 1e300, FAR), "mse", 1),
        (np.stack([FAR, FAR], 1), "mse", 2),
    ],
    ids=["logarithms", "near", "classes", "a model of words", "one value", "one beyond all others", "two columns"],
)
def test_other_labels_are_not_told(labels: Any, loss: str, outputs: int) -> None:
    assert told_of(labels, Concatenated(7, outputs) if outputs else Words(), loss) is None


def test_a_model_that_does_not_take_drawn_activations_is_trained_without_a_word() -> None:
    class Picky(Words):
        def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
            assert len(inputs[0]) < 64
            return super().forward(inputs)

    assert told_of(FAR, Picky()) is None
    assert told_of(FAR, Words()) is not None


def test_rows_that_are_not_trained_on_say_nothing_of_labels() -> None:
    run = setup(labels=FAR, fuse=Concatenated(7, 1), loss="mse", holdout=0.3)
    rows = run.job.batches(ROWS).training_positions
    told = far_labels(run.stages().fuse)
    assert told is not None and f"standard deviation {FAR[rows].std():.4g} where trained on" in told

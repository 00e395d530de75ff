"""Losses with options, metrics with arguments and in code: the values of torch and of scikit-learn."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
import torchmetrics
from sklearn import metrics as sklearn
from torch import Tensor, nn

from sl_queue.compute.predicted import columns_of
from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import agree
from sl_queue.data.spec import Rows
from sl_queue.errors import JobError
from sl_queue.launch.scheduler import plan_of
from sl_queue.protocol.fingerprints import differences
from sl_queue.protocol.messages import MicroBatch
from tests.support.resolved import fingerprint
from tests.support.split import Parties, Stages, table_of

ROWS = 40
SGD = {"name": "sgd", "lr": 0.1}


class Head(nn.Module):
    """A layer on the first activation, and what makes its numbers fit."""

    def __init__(self, outputs: int = 1, ends: Any = None) -> None:
        super().__init__()
        self.layer, self.ends = nn.Linear(4, outputs), ends or nn.Identity()

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.ends(self.layer(inputs[0]))  # type: ignore[no-any-return]


def run_of(
    labels: Any, fuse: nn.Module | None = None, loss: Any = "bce_with_logits", job: Any = None, **fuse_table: Any
) -> Parties:
    torch.manual_seed(3)
    features = np.random.default_rng(0).normal(size=(len(labels), 3)).astype(np.float32)
    given = {"bank": nn.Linear(3, 4), "fuse": fuse or Head()}
    files = {
        "bank": PartyFile(
            party="bank",
            data=Rows(np.arange(len(labels)), features),
            base={"model": given["bank"], "optimizer": SGD},
        ),
        "holder": PartyFile(
            party="holder",
            data=Rows(np.arange(len(labels)), None, labels),
            fuse={"model": given["fuse"], "optimizer": SGD, "loss": loss, **fuse_table},
        ),
    }
    settings: dict[str, Any] = {"name": "t", "seed": 7, "epochs": 2, "batch_size": len(labels), "holdout": 0.5}
    roles = {"bank": {"role": "feature", "cut": [4]}, "holder": {"role": "label"}}
    made = Job(**settings | {"parties": roles} | (job or {}))
    return Parties(made, files, {"bank": table_of(features), "holder": table_of(None, labels)}, given)


def trained(run: Parties) -> Stages:
    return run.stages().train(run.pipeline)


def held_out(run: Parties) -> tuple[Tensor, Tensor]:
    """Return the outputs of the held-out rows after the last epoch, and their labels."""
    stages, batches = trained(run), run.job.batches(ROWS)
    rows = np.concatenate([batches.holdout_part(i) for i in range(batches.holdout_parts)])
    modules = stages.modules()
    with torch.no_grad():
        outputs = modules["fuse"]([modules["bank"](torch.from_numpy(run.tables["bank"].features[rows]))])
    return outputs, torch.from_numpy(run.tables["holder"].labels)[rows]


CLASSES, THREE = np.arange(ROWS) % 2, np.arange(ROWS) % 3
NUMBERS = np.linspace(0.1, 2.0, ROWS).astype(np.float32)
WEIGHT = [0.2, 1.0, 3.0]

LOSSES: dict[str, tuple[Any, Any, nn.Module, Any]] = {
    "pos_weight": (
        {"name": "bce_with_logits", "pos_weight": 3.0},
        CLASSES,
        Head(),
        lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.float(), pos_weight=torch.tensor(3.0)),
    ),
    "label_smoothing": (
        {"name": "cross_entropy", "label_smoothing": 0.1},
        THREE,
        Head(3),
        lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    ),
    "weight": (
        {"name": "cross_entropy", "weight": WEIGHT},
        THREE,
        Head(3),
        lambda o, y: F.cross_entropy(o, y, torch.tensor(WEIGHT)),
    ),
    "l1": ("l1", NUMBERS, Head(), lambda o, y: F.l1_loss(o[:, 0], y)),
    "huber": ({"name": "huber", "delta": 0.3}, NUMBERS, Head(), lambda o, y: F.huber_loss(o[:, 0], y, delta=0.3)),
    "poisson": ("poisson", THREE, Head(), lambda o, y: F.poisson_nll_loss(o[:, 0], y.float())),
    "rates": (
        {"name": "poisson", "log_input": False, "full": True},
        THREE,
        Head(ends=nn.Softplus()),
        lambda o, y: F.poisson_nll_loss(o[:, 0], y.float(), False, True),
    ),
    "bce": ("bce", CLASSES, Head(ends=nn.Sigmoid()), lambda o, y: F.binary_cross_entropy(o[:, 0], y.float())),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_named_loss_with_options_is_that_of_torch(name: str) -> None:
    loss, labels, fuse, of_torch = LOSSES[name]
    run = run_of(labels, fuse, loss)
    stages = trained(run)
    outputs, targets = held_out(run)
    assert stages.evaluations[-1]["loss"] == pytest.approx(of_torch(outputs, targets).item(), rel=1e-6)
    own = run.job.batches(ROWS).rows(MicroBatch(0, 0))
    with torch.no_grad():
        first = run.given["fuse"]([run.given["bank"](torch.from_numpy(run.tables["bank"].features[own]))])
    assert stages.losses[0] == pytest.approx(of_torch(first, torch.from_numpy(labels)[own]).item(), rel=1e-6)


def off_by(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs[:, 0] - labels).abs().max())


def test_metrics_of_classes_with_arguments_are_those_of_scikit_learn() -> None:
    wanted: list[Any] = [
        {"name": "fbeta", "beta": 2.0},
        {"name": "FBetaScore", "beta": 0.5, "as": "half"},
        {"name": "accuracy", "threshold": 0.4, "as": "lenient"},
        "specificity",
        "matthews_corrcoef",
        off_by,
    ]
    run = run_of(CLASSES, metrics=wanted)
    found = trained(run).evaluations[-1]
    outputs, labels = held_out(run)
    scores, y = outputs[:, 0].double().sigmoid().numpy(), labels.numpy()
    guess = (scores > 0.5).astype(int)
    assert found["fbeta"] == pytest.approx(sklearn.fbeta_score(y, guess, beta=2.0), rel=1e-6)
    assert found["half"] == pytest.approx(sklearn.fbeta_score(y, guess, beta=0.5), rel=1e-6)
    assert found["lenient"] == pytest.approx(sklearn.accuracy_score(y, scores > 0.4))
    assert found["specificity"] == pytest.approx(sklearn.recall_score(1 - y, 1 - guess))
    assert found["matthews_corrcoef"] == pytest.approx(sklearn.matthews_corrcoef(y, guess), abs=1e-6)
    assert found["off_by"] == pytest.approx(off_by(outputs, labels))


def test_metrics_of_numbers_and_of_several_classes() -> None:
    run = run_of(NUMBERS, loss="mse", metrics=["rmse", "mse", {"name": "explained_variance"}])
    found = trained(run).evaluations[-1]
    outputs, labels = held_out(run)
    assert found["rmse"] == pytest.approx(sklearn.root_mean_squared_error(labels, outputs[:, 0]), rel=1e-5)
    assert found["explained_variance"] == pytest.approx(
        sklearn.explained_variance_score(labels, outputs[:, 0]), rel=1e-4
    )
    run = run_of(THREE, Head(3), "cross_entropy", metrics=[{"name": "accuracy", "top_k": 2}, "cohen_kappa"])
    found = trained(run).evaluations[-1]
    outputs, labels = held_out(run)
    assert found["cohen_kappa"] == pytest.approx(sklearn.cohen_kappa_score(labels, outputs.argmax(1)), abs=1e-6)
    ours = torchmetrics.functional.classification.multiclass_accuracy(outputs, labels, 3, top_k=2)
    assert found["accuracy"] == pytest.approx(ours.item())


def gamma(output: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss of a Gamma regression with a logarithmic link."""
    return (output[:, 0] + labels * torch.exp(-output[:, 0])).mean()


LINKS: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
    "poisson": ("poisson", THREE, {}, torch.exp),
    "with its constant": ({"name": "poisson", "full": True}, THREE, {}, torch.exp),
    "rates": ({"name": "poisson", "log_input": False}, THREE, {}, None),
    "PoissonNLLLoss": ("torch.nn:PoissonNLLLoss", THREE, {}, torch.exp),
    "PoissonNLLLoss of rates": (nn.PoissonNLLLoss(log_input=False), THREE, {}, None),
    "a function": (F.poisson_nll_loss, THREE, {}, torch.exp),
    "a partial": (partial(partial(F.poisson_nll_loss, log_input=False), full=True), THREE, {}, None),
    "a loss of ones own": (gamma, NUMBERS, {"outputs": "logarithms"}, torch.exp),
    "fractions": ("bce_with_logits", NUMBERS / 2, {"task": "regression"}, torch.sigmoid),
    "mse": ("mse", NUMBERS, {}, None),
}


@pytest.mark.parametrize("name", LINKS)
def test_metrics_of_numbers_and_predictions_are_on_the_scale_of_the_labels(name: str) -> None:
    loss, labels, more, link = LINKS[name]
    run = run_of(labels, Head(ends=None if link else nn.Softplus()), loss, metrics=["mse", "rmse", "mae", "r2"], **more)
    stages, (outputs, targets) = trained(run), held_out(run)
    predicted = (link(outputs) if link else outputs)[:, 0].double().numpy()
    found, objective = stages.evaluations[-1], stages.fuse.objective
    assert found["mae"] == pytest.approx(sklearn.mean_absolute_error(targets, predicted), rel=1e-6)
    assert found["mse"] == pytest.approx(sklearn.mean_squared_error(targets, predicted), rel=1e-6)
    assert found["rmse"] == pytest.approx(sklearn.mean_squared_error(targets, predicted) ** 0.5, rel=1e-6)
    assert found["r2"] == pytest.approx(sklearn.r2_score(targets, predicted), rel=1e-5)
    columns = columns_of(outputs.numpy(), str(objective.task), str(objective.outputs))
    np.testing.assert_allclose(columns["value"], predicted, rtol=1e-6)


def test_what_a_version_of_before_predicts_stays_what_it_was() -> None:
    outputs = np.array([[0.5], [-1.0]], np.float32)
    np.testing.assert_array_equal(columns_of(outputs, "regression", "logits")["value"], outputs[:, 0])


@pytest.mark.parametrize(
    ("loss", "labels", "metrics", "told"),
    [
        ("mse", NUMBERS, ["mae"], "but the loss takes no logarithms"),
        ("bce_with_logits", CLASSES, ["f1"], r"is of numbers, and this is a classification"),
    ],
)
def test_logarithms_that_cannot_be_are_refused(loss: str, labels: Any, metrics: list[str], told: str) -> None:
    with pytest.raises(JobError, match=told):
        run_of(labels, loss=loss, metrics=metrics, outputs="logarithms").stages()


def test_an_object_as_a_metric_begins_from_nothing_in_each_epoch() -> None:
    run = run_of(NUMBERS, loss="mse", metrics=["torchmetrics:MeanAbsoluteError", torchmetrics.R2Score()], task=None)
    found = trained(run).evaluations
    outputs, labels = held_out(run)
    assert set(found[-1]) == {"loss", "MeanAbsoluteError", "R2Score"}
    assert found[-1]["R2Score"] == pytest.approx(sklearn.r2_score(labels, outputs[:, 0]), rel=1e-3)


def test_the_task_of_a_loss_of_ones_own_may_be_said() -> None:
    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return (output - labels.reshape(-1, 1)).abs().mean()

    assert "f1" in trained(run_of(CLASSES, loss=loss, metrics=["f1"], task="binary", outputs="logits")).evaluations[-1]
    run = run_of(CLASSES, loss=loss, metrics=["mean_absolute_percentage_error"], task="regression")
    assert "mean_absolute_percentage_error" in trained(run).evaluations[-1]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (["specifity"], "'specifity' is unknown for a binary loss; allowed are loss, auroc, accuracy"),
        ([{"name": "fbeta"}], "'fbeta' with {} fails: TypeError"),
        ([{"name": "fbeta", "beta": 2.0, "gamma": 1}], "got an unexpected keyword argument 'gamma'"),
        (["confusion_matrix"], "'confusion_matrix' returns Tensor; a metric is one number"),
        ([nn.Linear(1, 1)], "has parameters, which nothing trains; put it into the fuse model"),
    ],
)
def test_a_metric_that_cannot_be_measured_is_refused_before_training(metrics: list[Any], words: str) -> None:
    with pytest.raises(JobError) as caught:
        run_of(CLASSES, metrics=metrics).stages()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("fuse", "words"),
    [
        ({"loss": "hubber"}, "fuse.loss = 'hubber'; did you mean 'huber'? it must be bce_with_logits"),
        ({"loss": {"name": "huber", "delta": -1.0}}, "fuse.loss .delta = -1.0; it must be a number above 0"),
        ({"loss": {"name": "mse", "delta": 1.0}}, "fuse.loss .delta is unknown; 'mse' takes no options"),
        ({"loss": {"name": "cross_entropy", "label_smoothing": 1.0}}, "a number from 0 to below 1"),
        ({"loss": "mse", "metrics": ["mse", {"name": "mse"}]}, "has 'mse' twice"),
        ({"loss": "mse", "metrics": [3]}, "fuse.metrics [0] = 3; it must be a name"),
    ],
)
def test_a_party_file_says_what_is_wrong_with_loss_and_metrics(fuse: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError) as caught:
        PartyFile(party="a", data=Rows([1], None, [1]), fuse={"model": "m:Net", **fuse})
    assert words in str(caught.value)


def test_labels_that_do_not_suit_a_named_loss_are_refused() -> None:
    with pytest.raises(JobError, match=r"labels go down to -1; poisson takes counts"):
        run_of(THREE - 1, loss="poisson").stages()
    with pytest.raises(JobError, match=r"bce takes 0 to 1"):
        run_of(THREE, Head(ends=nn.Sigmoid()), "bce").stages()


def test_options_of_the_loss_are_part_of_the_fingerprint() -> None:
    plain, one, two = (
        fingerprint(run.job, run.files["holder"])
        for run in (
            run_of(NUMBERS, loss="huber"),
            run_of(NUMBERS, loss={"name": "huber", "delta": 1.0}),
            run_of(NUMBERS, loss={"name": "huber", "delta": 2.0}),
        )
    )
    assert differences(one, two) == ["fuse.loss.delta was 1.0, now 2.0"]
    assert differences(plain, two)
    assert differences(two, plain)


# Early stopping -------------------------------------------------------------------------------------------------


def stopping(metrics: list[Any], **rule: Any) -> tuple[Job, PartyFile]:
    run = run_of(CLASSES, metrics=metrics, job={"early_stopping": {"patience": 2, **rule}})
    return run.job, run.files["holder"]


def test_early_stopping_knows_which_value_of_a_named_metric_is_better() -> None:
    for metric, lower in (("loss", True), ("rmse", True), ("auroc", False), ("fbeta", False)):
        job, _ = stopping([], metric=metric)
        rule = plan_of(job).early_stopping
        assert rule is not None
        assert rule.lower_is_better is lower
    job, file = stopping([off_by], metric="off_by", mode="min")
    agree(job, file)
    rule = plan_of(job).early_stopping
    assert rule is not None
    assert rule.lower_is_better


def test_of_a_metric_in_code_early_stopping_has_to_be_said_which_value_is_better() -> None:
    job, file = stopping([off_by], metric="off_by")
    with pytest.raises(JobError, match=r"early_stopping.mode is missing: whether 'off_by' is better when it is larger"):
        agree(job, file)
    job, file = stopping([{"name": "fbeta", "beta": 2.0, "as": "f2"}], metric="ff2", mode="max")
    with pytest.raises(JobError, match=r"'ff2' is not measured; did you mean 'f2'\?"):
        agree(job, file)

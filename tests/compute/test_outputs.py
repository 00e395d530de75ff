"""Metrics know what they are given: logits, probabilities or their logarithms."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from sklearn import metrics as reference
from torch import Tensor, nn

from sl_queue.compute.outputs import Outputs, ending
from sl_queue.errors import JobError
from tests.support.split import Concatenated, Parties, parties

ROWS = 60
PROBABILITIES, LOGS, LOGITS = Outputs.PROBABILITIES, Outputs.LOG_PROBABILITIES, Outputs.LOGITS
CLASSES = np.random.default_rng(2).integers(0, 2, ROWS)
THREE = np.random.default_rng(2).integers(0, 3, ROWS)


class Ending(Concatenated):
    """A linear layer, and `end` after it."""

    def __init__(self, classes: int, end: Any) -> None:
        super().__init__(4, classes)
        self.end = end

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.end(super().forward(inputs))  # type: ignore[no-any-return]


def log_loss(output: Tensor, labels: Tensor) -> Tensor:
    """Compute a loss of the user's own, on probabilities."""
    output = output if output.dim() > 1 and output.shape[1] > 1 else torch.cat([1 - output, output], 1)
    return F.nll_loss(output.clamp(1e-6).log(), labels.flatten())


def one_for_all(output: Tensor, labels: Tensor) -> Tensor:
    return (output.flatten(1).mean(1) - labels.flatten()).abs().mean()


def run_of(fuse: nn.Module, loss: Any, labels: Any = CLASSES, **changes: Any) -> Parties:
    features = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
    torch.manual_seed(3)
    outputs = changes.pop("outputs", None)
    settings: dict[str, Any] = {"bases": {"bank": nn.Linear(3, 4)}, "features": {"bank": features}, "holdout": 0.5}
    settings |= {"cuts": {"bank": [4]}, "metrics": ["accuracy", "f1", "auroc"], "epochs": 1, "batch_size": 10}
    made = parties(**settings | {"fuse": fuse, "loss": loss, "labels": labels} | changes)
    file = made.files["holder"]
    assert file.fuse is not None
    made.files["holder"] = file.model_copy(update={"fuse": file.fuse.model_copy(update={"outputs": outputs})})
    return made


def outputs_of(fuse: nn.Module, loss: Any, **changes: Any) -> Outputs:
    return run_of(fuse, loss, **changes).stages().fuse.objective.outputs


# Found --------------------------------------------------------------------------------------------------------------

ENDS: list[tuple[Any, Outputs | None]] = [
    (torch.sigmoid, PROBABILITIES),
    (lambda x: torch.sigmoid(x).reshape(-1, 1, 1).squeeze(2), PROBABILITIES),
    (lambda x: torch.sigmoid(x.float()).double().clamp(1e-6, 1 - 1e-6), PROBABILITIES),
    (lambda x: torch.cat([torch.sigmoid(x), torch.sigmoid(-x)], 1), PROBABILITIES),
    (lambda x: torch.cat([torch.sigmoid(x), x], 1), None),
    (lambda x: torch.softmax(torch.cat([x, -x], 1), 1)[:, 1], PROBABILITIES),
    (lambda x: torch.softmax(torch.cat([x, -x], 1), 1)[:, 1:2].transpose(0, 1).T, PROBABILITIES),
    (lambda x: F.log_softmax(torch.cat([x, -x], 1), 1), LOGS),
    (lambda x: F.log_softmax(torch.cat([x, -x], 1), 1).exp(), PROBABILITIES),
    (lambda x: torch.sigmoid(x).log(), LOGS),
    (F.logsigmoid, LOGS),
    (F.hardsigmoid, PROBABILITIES),
    (lambda x: x, None),
    (lambda x: torch.sigmoid(x) * 2, None),
    (lambda x: x * torch.sigmoid(x), None),
    (torch.exp, None),
]


@pytest.mark.parametrize(("end", "found"), ENDS)
def test_what_a_model_ends_in_is_read_off_its_graph(end: Any, found: Outputs | None) -> None:
    assert ending(end(torch.randn(5, 1, requires_grad=True) * 1)) is found
    assert ending(end(torch.randn(5, 1))) is None


def test_a_backward_hook_on_the_model_hides_nothing() -> None:
    module = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    module.register_full_backward_hook(lambda *_: None)
    assert ending(module(torch.randn(2, 3, requires_grad=True))) is PROBABILITIES


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("fuse", "loss", "labels", "found"),
    [
        (Ending(1, torch.sigmoid), log_loss, CLASSES, PROBABILITIES),
        (Ending(1, lambda x: x), "bce_with_logits", CLASSES, LOGITS),
        (Ending(1, torch.sigmoid), "bce_with_logits", CLASSES, LOGITS),
        (Ending(1, torch.sigmoid), "torch.nn:BCELoss", CLASSES * 1.0, PROBABILITIES),
        (Ending(1, lambda x: x.clamp(0, 1)), "torch.nn:BCELoss", CLASSES, PROBABILITIES),
        (Ending(3, lambda x: x.softmax(1)), log_loss, THREE, PROBABILITIES),
        (Ending(3, lambda x: x.exp() / x.exp().sum(1, keepdim=True)), log_loss, THREE, PROBABILITIES),
        (Ending(3, lambda x: x.abs() / x.abs().sum(1, keepdim=True)), log_loss, THREE, PROBABILITIES),
        (Ending(1, lambda x: x), one_for_all, CLASSES, LOGITS),
        (Ending(1, lambda x: x * 0), one_for_all, CLASSES, LOGITS),
        (Ending(3, lambda x: x.log_softmax(1)), "torch.nn:NLLLoss", THREE, LOGS),
    ],
)
def test_the_meaning_of_the_output_is_found(
    fuse: nn.Module, loss: Any, labels: Any, found: Outputs, frozen: bool
) -> None:
    assert outputs_of(fuse.requires_grad_(not frozen), loss, labels=labels) is found


# Measured -----------------------------------------------------------------------------------------------------------


def held_out(run: Parties) -> tuple[Any, Any]:
    """Return the held-out rows, and the logits that the models give for them."""
    batches = run.job.batches(ROWS)
    rows = np.concatenate([batches.holdout_part(index) for index in range(batches.holdout_parts)])
    features = run.tables["bank"].features
    assert features is not None
    return rows, run.given["fuse"].linear(run.given["bank"](torch.from_numpy(features[rows]))).detach().numpy()


@pytest.mark.parametrize("end", [lambda x: x, torch.sigmoid, F.logsigmoid], ids=["logits", "sigmoid", "logsigmoid"])
def test_binary_metrics_are_the_same_of_logits_probabilities_and_their_logarithms(end: Any) -> None:
    def own(output: Tensor, labels: Tensor) -> Tensor:
        return (output - labels).abs().mean()

    run = run_of(Ending(1, end), own, optimizer={"name": "sgd", "lr": 0.0})
    found = run.stages().train(run.pipeline)
    rows, scores = held_out(run)
    scores = scores[:, 0]
    assert 0 < (scores > 0).mean() < 1
    assert found.evaluations[0] == pytest.approx(
        {
            "loss": found.evaluations[0]["loss"],
            "accuracy": reference.accuracy_score(CLASSES[rows], scores > 0),
            "f1": reference.f1_score(CLASSES[rows], scores > 0),
            "auroc": reference.roc_auc_score(CLASSES[rows], scores),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("end", [lambda x: x, lambda x: x.softmax(1), lambda x: x.log_softmax(1)])
def test_multiclass_metrics_are_the_same_of_logits_probabilities_and_their_logarithms(end: Any) -> None:
    def own(output: Tensor, labels: Tensor) -> Tensor:
        return output.gather(1, labels[:, None]).mean()

    run = run_of(Ending(3, end), own, THREE, optimizer={"name": "sgd", "lr": 0.0}, metrics=["auroc"])
    found = run.stages().train(run.pipeline)
    rows, scores = held_out(run)
    shares = torch.from_numpy(scores).double().softmax(1).numpy()
    want = reference.roc_auc_score(THREE[rows], shares, multi_class="ovr")
    assert found.evaluations[0]["auroc"] == pytest.approx(want, rel=1e-5)


# Asked for ----------------------------------------------------------------------------------------------------------

BOUNDED = [lambda x: 1 - torch.sigmoid(x), lambda x: (torch.tanh(x) + 1) / 2, lambda x: x.clamp(0, 1)]


@pytest.mark.parametrize("end", BOUNDED)
def test_outputs_that_may_be_either_are_asked_for_and_may_be_given(end: Any) -> None:
    with pytest.raises(JobError, match=r'\[fuse\] outputs is missing: accuracy, f1 of .* "probabilities" or "logits"'):
        outputs_of(Ending(1, end), one_for_all)
    assert outputs_of(Ending(1, end), one_for_all, outputs="probabilities") is PROBABILITIES
    assert outputs_of(Ending(1, end), one_for_all, outputs="logits") is LOGITS
    assert outputs_of(Ending(1, end), one_for_all, metrics=["auroc"]) is LOGITS, "a rank asks nothing"
    assert outputs_of(Ending(1, end), one_for_all, metrics=[]) is LOGITS


@pytest.mark.parametrize(
    ("fuse", "loss", "outputs", "metrics", "complaint"),
    [
        (Ending(1, torch.sigmoid), "bce_with_logits", "probabilities", ["f1"], "but the loss takes logits"),
        (Ending(1, lambda x: x + 5), one_for_all, "probabilities", ["f1"], "the fuse model puts out numbers beyond"),
        (Ending(1, lambda x: x + 5), one_for_all, "log_probabilities", ["f1"], "puts out numbers above 0"),
        (Ending(1, lambda x: x), "mse", "logits", ["mae"], "has no use: this loss and these metrics are of numbers"),
    ],
)
def test_outputs_that_cannot_be_are_refused(
    fuse: nn.Module, loss: Any, outputs: str, metrics: list[str], complaint: str
) -> None:
    with pytest.raises(JobError, match=complaint):
        outputs_of(fuse, loss, outputs=outputs, metrics=metrics)


# Warned of ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fuse", "loss", "labels", "warned"),
    [
        (Ending(1, torch.sigmoid), "bce_with_logits", CLASSES, "applies another sigmoid or softmax"),
        (Ending(1, torch.sigmoid), "torch.nn:BCEWithLogitsLoss", CLASSES, "applies another sigmoid or softmax"),
        (Ending(3, lambda x: x.softmax(1)), "cross_entropy", THREE, "applies another sigmoid or softmax"),
        (Ending(3, lambda x: x.softmax(1)), nn.CrossEntropyLoss(), THREE, "applies another sigmoid or softmax"),
        (Ending(3, lambda x: x.softmax(1)), "torch.nn:NLLLoss", THREE, "takes log-probabilities"),
        (Ending(3, lambda x: x.abs() + 1), "torch.nn:NLLLoss", THREE, "end it in a LogSoftmax"),
        (Ending(3, lambda x: x.log_softmax(1)), "cross_entropy", THREE, None),  # which changes nothing
        (Ending(1, lambda x: x), "bce_with_logits", CLASSES, None),
        (Ending(1, torch.sigmoid), log_loss, CLASSES, None),
    ],
)
def test_a_loss_that_applies_what_the_model_has_applied_is_warned_of(
    fuse: nn.Module, loss: Any, labels: Any, warned: str | None
) -> None:
    warnings = run_of(fuse, loss, labels, metrics=["accuracy"]).stages().fuse.objective.warnings
    assert len(warnings) == (warned is not None)
    assert all(warned in warning for warning in warnings if warned)

"""Sample weights, class weights and labels that are not known: exact in a step, however it is cut into parts."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from sklearn import metrics as sklearn
from torch import Tensor, nn

from sl_queue.compute.other_metrics import Task
from sl_queue.compute.weighted_metrics import weighted_metrics
from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from sl_queue.errors import JobError
from sl_queue.protocol.messages import MicroBatch
from tests.support.resolved import fingerprint, train_joined
from tests.support.split import Parties, Stages, equal_weights, furthest, table_of
from tests.support.tables import read_table

ROWS = 24
SGD = {"name": "sgd", "lr": 0.5}
Outputs = int | tuple[int, ...]
DRAW = np.random.default_rng(0)
WEIGHTS = DRAW.uniform(0, 3, ROWS) * (DRAW.random(ROWS) > 0.2)


class Head(nn.Module):
    """One layer on the first activation."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.shape = outputs if isinstance(outputs, tuple) else (outputs,)
        self.layer = nn.Linear(4, math.prod(self.shape))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.layer(inputs[0]).reshape(-1, *self.shape)  # type: ignore[no-any-return]


def run_of(
    labels: Any, loss: Any, outputs: Outputs, weights: Any = None, micro_batches: int = 3, **fuse: Any
) -> Parties:
    torch.manual_seed(1)
    features = np.random.default_rng(1).normal(size=(ROWS, 3)).astype(np.float32)
    given = {"bank": nn.Linear(3, 4), "fuse": Head(outputs)}
    rows = Rows(np.arange(ROWS), None, labels, weights)
    files = {
        "bank": PartyFile(
            party="bank", data=Rows(np.arange(ROWS), features), base={"model": given["bank"], "optimizer": SGD}
        ),
        "holder": PartyFile(
            party="holder", data=rows, fuse={"model": given["fuse"], "optimizer": SGD, "loss": loss, **fuse}
        ),
    }
    job = Job(
        name="t",
        seed=7,
        epochs=2,
        batch_size=12,
        holdout=0.25,
        parties={"bank": {"role": "feature", "cut": [4]}, "holder": {"role": "label"}},
        pipeline={"micro_batches": micro_batches, "checkpoint_every": 1},
    )
    tables = {party: read_table(job, file) for party, file in files.items()}
    return Parties(job, files, tables, given)


def trained(run: Parties) -> Stages:
    return run.stages().train(run.pipeline)


def step_of(run: Parties, loss: Any, step: int = 0) -> dict[str, nn.Module]:
    """Return the first step in plain PyTorch, all rows of it at once; `loss` is of outputs and positions."""
    import copy

    modules = {name: copy.deepcopy(module) for name, module in run.given.items()}
    batches = run.job.batches(ROWS)
    rows = np.concatenate([batches.rows(MicroBatch(step, i)) for i in range(batches.parts(step))])
    output = modules["fuse"]([modules["bank"](torch.from_numpy(run.tables["bank"].features[rows]))])
    loss(output, rows).backward()
    for module in modules.values():
        torch.optim.SGD(module.parameters(), lr=0.5).step()
    return modules


def after_one_step(run: Parties) -> dict[str, Any]:
    stages = run.stages().train(run.pipeline, stop_after=0)
    return stages.modules()


BINARY = DRAW.integers(0, 2, ROWS)
CLASSES = DRAW.integers(0, 3, ROWS)
SEVERAL = DRAW.integers(0, 2, (ROWS, 3)).astype(np.float32)
GAPS = np.where(DRAW.random((ROWS, 3)) < 0.4, np.nan, SEVERAL)
ONE_GAP = np.where(DRAW.random(ROWS) < 0.4, np.nan, BINARY.astype(float))
W = torch.from_numpy(WEIGHTS)
TARGETS = torch.from_numpy(CLASSES)
CLASS_WEIGHT = [0.2, 1.0, 3.0]


def masked_bce(labels: Any, weights: Any = None) -> Any:
    y = torch.from_numpy(labels).float()

    def loss(output: Tensor, rows: Any) -> Tensor:
        known = ~y[rows].isnan().reshape(output.shape)
        each = F.binary_cross_entropy_with_logits(output, y[rows].nan_to_num().reshape(output.shape), reduction="none")
        counts = known.float() * (1.0 if weights is None else weights[rows].float()[:, None])
        return (each * counts).sum() / counts.sum()

    return loss


GRID = DRAW.integers(0, 3, (ROWS, 2))
ONE_HOT = np.eye(3, dtype=np.float32)[CLASSES]
SOME_IGNORED = np.where(DRAW.random(ROWS) < 0.4, -100, CLASSES)
ROWS_KNOWN = np.where(DRAW.random((ROWS, 1)) < 0.4, np.nan, ONE_HOT)
OF_CLASSES = torch.tensor(CLASS_WEIGHT)


def cross_entropy(labels: Any, **options: Any) -> Any:
    """Return torch's own loss of outputs and positions; rows of which a label is not known are left out."""
    y = torch.from_numpy(labels)

    def loss(output: Tensor, rows: Any) -> Tensor:
        known = ~y[rows].isnan().reshape(len(rows), -1).any(1)
        return F.cross_entropy(
            output[known], y[rows][known].to(y.dtype if y.dtype == torch.int64 else torch.float32), **options
        )

    return loss


def weighed(labels: Any) -> Any:
    """Return the mean of torch's own loss for each row, by the rows' weights."""

    def loss(output: Tensor, rows: Any) -> Tensor:
        each = F.cross_entropy(output, torch.from_numpy(labels)[rows], reduction="none")
        return ((each * W[rows]).sum() / W[rows].sum()).float()

    return loss


CASES: dict[str, tuple[Any, Any, Outputs, Any, dict[str, Any], Any]] = {
    "binary weights": (BINARY, "bce_with_logits", 1, WEIGHTS, {}, masked_bce(BINARY.astype(float), W)),
    "class weights": (
        CLASSES,
        {"name": "cross_entropy", "weight": CLASS_WEIGHT, "label_smoothing": 0.1},
        3,
        None,
        {},
        lambda o, rows: F.cross_entropy(
            o, torch.from_numpy(CLASSES)[rows], torch.tensor(CLASS_WEIGHT), label_smoothing=0.1
        ),
    ),
    "both": (
        CLASSES,
        {"name": "cross_entropy", "weight": CLASS_WEIGHT},
        3,
        WEIGHTS,
        {},
        lambda o, rows: (
            (
                F.cross_entropy(o, torch.from_numpy(CLASSES)[rows], torch.tensor(CLASS_WEIGHT), reduction="none")
                * W[rows]
            )
            .sum()
            .div((torch.tensor(CLASS_WEIGHT)[torch.from_numpy(CLASSES)[rows]] * W[rows]).sum())
            .float()
        ),
    ),
    "gaps": (GAPS, "bce_with_logits", 3, None, {"missing_labels": "mask"}, masked_bce(GAPS)),
    "one gap": (ONE_GAP, "bce_with_logits", 1, None, {"missing_labels": "mask"}, masked_bce(ONE_GAP)),
    "gaps and weights": (GAPS, "bce_with_logits", 3, WEIGHTS, {"missing_labels": "mask"}, masked_bce(GAPS, W)),
    "torch's": (GAPS, nn.BCEWithLogitsLoss(), 3, None, {"missing_labels": "mask"}, masked_bce(GAPS)),
    "own": (
        BINARY,
        lambda o, y, w: (F.binary_cross_entropy_with_logits(o[:, 0], y.float(), reduction="none") * w).sum() / w.sum(),
        1,
        WEIGHTS,
        {},
        masked_bce(BINARY.astype(float), W),
    ),
    "own with gaps": (
        ONE_GAP,
        lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.float()),
        1,
        None,
        {"missing_labels": "mask"},
        masked_bce(ONE_GAP),
    ),
    "class weights of a column": (
        CLASSES[:, None],
        {"name": "cross_entropy", "weight": CLASS_WEIGHT},
        3,
        None,
        {},
        cross_entropy(CLASSES, weight=OF_CLASSES),
    ),
    "class weights of a grid": (
        GRID,
        {"name": "cross_entropy", "weight": CLASS_WEIGHT},
        (3, 2),
        None,
        {},
        cross_entropy(GRID, weight=OF_CLASSES),
    ),
    "class weights of probabilities": (
        ONE_HOT,
        {"name": "cross_entropy", "weight": CLASS_WEIGHT},
        3,
        None,
        {},
        cross_entropy(ONE_HOT, weight=OF_CLASSES),
    ),
    "class weights of torch's": (
        CLASSES,
        nn.CrossEntropyLoss(OF_CLASSES),
        3,
        None,
        {},
        cross_entropy(CLASSES, weight=OF_CLASSES),
    ),
    "class weights of a function": (
        CLASSES,
        partial(F.cross_entropy, weight=OF_CLASSES),
        3,
        None,
        {},
        cross_entropy(CLASSES, weight=OF_CLASSES),
    ),
    "classes that are ignored": (SOME_IGNORED, nn.CrossEntropyLoss(), 3, None, {}, cross_entropy(SOME_IGNORED)),
    "another number that is ignored": (
        CLASSES,
        nn.CrossEntropyLoss(OF_CLASSES, ignore_index=2),
        3,
        None,
        {},
        cross_entropy(CLASSES, weight=OF_CLASSES, ignore_index=2),
    ),
    "margins": (
        CLASSES,
        nn.MultiMarginLoss(weight=OF_CLASSES),
        3,
        None,
        {},
        lambda o, rows: F.multi_margin_loss(o, TARGETS[rows], weight=OF_CLASSES),
    ),
    "probabilities and weights": (ONE_HOT, "cross_entropy", 3, WEIGHTS, {}, weighed(ONE_HOT)),
    "probabilities with gaps": (
        ROWS_KNOWN,
        "cross_entropy",
        3,
        None,
        {"missing_labels": "mask", "metrics": ["accuracy"]},
        cross_entropy(ROWS_KNOWN),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_mean_over_all_its_rows(name: str) -> None:
    labels, loss, outputs, weights, fuse, of_torch = CASES[name]
    for micro_batches in (1, 5):
        run = run_of(labels, loss, outputs, weights, micro_batches, **fuse)
        plain, ours = step_of(run, of_torch), after_one_step(run)
        for part, module in plain.items():
            assert furthest(module, ours[part]) < 1e-6, (part, micro_batches)


@pytest.mark.parametrize("name", CASES)
def test_split_equals_joined_where_rows_do_not_count_alike(name: str) -> None:
    labels, loss, outputs, weights, fuse, _ = CASES[name]
    run = run_of(labels, loss, outputs, weights, **fuse)
    stages = trained(run)
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(ROWS))
    assert equal_weights(joined.fuse, stages.modules()["fuse"])
    assert equal_weights(joined.bases["bank"], stages.modules()["bank"])
    assert [line["holdout"]["loss"] for line in joined.history] == [found["loss"] for found in stages.evaluations]


def test_a_micro_batch_without_a_known_label_adds_nothing() -> None:
    labels = np.full(ROWS, np.nan)
    labels[:4] = [0, 1, 0, 1]
    run = run_of(labels, "bce_with_logits", 1, micro_batches=12, missing_labels="mask")
    stages = trained(run)
    assert all(np.isfinite(stages.losses))
    assert furthest(after_one_step(run)["fuse"], step_of(run, masked_bce(labels))["fuse"]) < 1e-6


def held_out(run: Parties, stages: Stages) -> tuple[Any, Any]:
    batches = run.job.batches(ROWS)
    rows = np.concatenate([batches.holdout_part(i) for i in range(batches.holdout_parts)])
    modules = stages.modules()
    with torch.no_grad():
        return rows, modules["fuse"]([modules["bank"](torch.from_numpy(run.tables["bank"].features[rows]))])


def test_held_out_rows_are_measured_by_their_weights() -> None:
    run = run_of(BINARY, "bce_with_logits", 1, WEIGHTS, metrics=["auroc", "accuracy", "f1"])
    stages = trained(run)
    rows, output = held_out(run, stages)
    found, scores, y, w = stages.evaluations[-1], output[:, 0].numpy(), BINARY[rows], WEIGHTS[rows]
    assert found["loss"] == pytest.approx(masked_bce(BINARY.astype(float), W)(output, rows).item(), rel=1e-6)
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(y, scores, sample_weight=w))
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(y, scores > 0, sample_weight=w))
    assert found["f1"] == pytest.approx(sklearn.f1_score(y, scores > 0, sample_weight=w))


def test_labels_that_are_not_known_are_left_out_of_metrics() -> None:
    run = run_of(ONE_GAP, "bce_with_logits", 1, missing_labels="mask", metrics=["accuracy"])
    stages = trained(run)
    rows, output = held_out(run, stages)
    known = ~np.isnan(ONE_GAP[rows])
    right = (output[:, 0].numpy() > 0)[known] == ONE_GAP[rows][known]
    assert stages.evaluations[-1]["accuracy"] == pytest.approx(right.mean())


@pytest.mark.parametrize("name", ["auroc", "accuracy", "f1", "precision", "recall", "average_precision"])
def test_weighted_metrics_of_classes_are_those_of_scikit_learn(name: str) -> None:
    draw = np.random.default_rng(3)
    scores, y, w = draw.random(200).round(1), draw.integers(0, 2, 200), draw.uniform(0, 2, 200)
    guessed = scores > 0.5
    wanted = {
        "auroc": sklearn.roc_auc_score(y, scores, sample_weight=w),
        "accuracy": sklearn.accuracy_score(y, guessed, sample_weight=w),
        "f1": sklearn.f1_score(y, guessed, sample_weight=w),
        "precision": sklearn.precision_score(y, guessed, sample_weight=w),
        "recall": sklearn.recall_score(y, guessed, sample_weight=w),
        "average_precision": sklearn.average_precision_score(y, scores, sample_weight=w),
    }
    found = weighted_metrics(Task.BINARY)[name](*map(torch.from_numpy, (scores, y, w)))
    assert found == pytest.approx(wanted[name])
    one = torch.ones(200, dtype=torch.long)
    alone = weighted_metrics(Task.BINARY)[name](torch.from_numpy(scores), one, torch.from_numpy(w))
    assert (alone is None) == (name in ("auroc", "average_precision"))


@pytest.mark.parametrize("name", ["accuracy", "f1", "precision", "recall"])
def test_weighted_metrics_of_several_classes_are_those_of_scikit_learn(name: str) -> None:
    draw = np.random.default_rng(3)
    scores, y, w = draw.random((200, 4)), draw.integers(0, 4, 200), draw.uniform(0, 2, 200)
    guessed = scores.argmax(1)
    wanted = {
        "accuracy": sklearn.accuracy_score(y, guessed, sample_weight=w),
        "f1": sklearn.f1_score(y, guessed, average="macro", sample_weight=w),
        "precision": sklearn.precision_score(y, guessed, average="macro", sample_weight=w),
        "recall": sklearn.recall_score(y, guessed, average="macro", sample_weight=w),
    }
    assert weighted_metrics(Task.MULTICLASS)[name](*map(torch.from_numpy, (scores, y, w))) == pytest.approx(
        wanted[name]
    )


def test_weighted_metrics_of_numbers_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(3)
    guessed, y, w = draw.random(50), draw.random(50), draw.uniform(0, 2, 50)
    found = {n: m(*map(torch.from_numpy, (guessed, y, w))) for n, m in weighted_metrics(Task.REGRESSION).items()}
    assert found["mse"] == pytest.approx(sklearn.mean_squared_error(y, guessed, sample_weight=w))
    assert found["rmse"] == pytest.approx(sklearn.root_mean_squared_error(y, guessed, sample_weight=w))
    assert found["mae"] == pytest.approx(sklearn.mean_absolute_error(y, guessed, sample_weight=w))
    assert found["r2"] == pytest.approx(sklearn.r2_score(y, guessed, sample_weight=w))


# Tables -----------------------------------------------------------------------------------------------------------


def test_several_label_columns_with_gaps_and_a_weight_are_read_from_a_file(tmp_path: Any) -> None:
    lines = ["id,x,a,b,w"] + [f"{i},{i}.5,{'' if i == 3 else i % 2},{1 - i % 2},{i}" for i in range(8)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = {"path": tmp_path / "t.csv", "id": "id", "label": ["a", "b"], "weight": "w"}
    job = Job(
        name="t",
        seed=1,
        epochs=1,
        batch_size=4,
        parties={"bank": {"role": "feature", "cut": [1]}, "holder": {"role": "label", "cut": [1]}},
    )
    fuse = {"model": "m:Net", "loss": "bce_with_logits", "missing_labels": "mask"}
    table = read_table(job, PartyFile(party="holder", data=data, fuse=fuse))
    assert table.columns == ("x",)
    assert table.labels is not None
    assert table.weights is not None
    assert table.labels.shape == (8, 2)
    assert np.isnan(table.labels[3, 0])
    assert np.isnan(table.labels).sum() == 1
    assert table.weights.tolist() == list(range(8))
    with pytest.raises(JobError, match=r"values are missing in label column 'a' in 1 of 8 rows"):
        read_table(job, PartyFile(party="holder", data=data, fuse={"model": "m:Net", "loss": "bce_with_logits"}))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"label": ["a", "a"]}, "more than once among id, label and features: a"),
        ({"label": "a", "weight": "a"}, "names a column more than once among id, label and features: a"),
        (
            {"label": "a", "features": ["w"], "weight": "w"},
            "names a column more than once among id, label and features",
        ),
    ],
)
def test_a_column_has_one_use(data: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError) as caught:
        PartyFile(party="a", data={"path": "t.csv", "id": "id", **data})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (-np.ones(ROWS), "weights: 24 of 24 are below 0"),
        (np.zeros(ROWS), "weights: all are 0, so nothing could be learned"),
        (np.ones(3), "24 ids are given, but weights for 3 rows"),
        (np.full(ROWS, np.nan), "weights: NaN or infinity in 24 of 24 rows"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: Any, words: str) -> None:
    with pytest.raises(JobError) as caught:
        run_of(BINARY, "bce_with_logits", 1, weights)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "weights", "fuse", "words"),
    [
        (BINARY, WEIGHTS, {"metrics": ["cohen_kappa"]}, "'cohen_kappa' knows no weights of rows"),
        (
            BINARY,
            WEIGHTS,
            {"loss": lambda o, y: (o[:, 0] - y).abs().mean()},
            "rows have weights, and the loss takes none",
        ),
        (
            GAPS,
            None,
            {"missing_labels": "mask", "loss": lambda o, y: (o - y).abs().mean()},
            'missing_labels = "mask" with several labels a row needs a loss that has a name',
        ),
        (
            GAPS,
            WEIGHTS,
            {"missing_labels": "mask", "loss": lambda o, y, w: ((o - y).abs().mean(1) * w).mean()},
            'missing_labels = "mask" with several labels a row needs a loss that has a name',
        ),
        (np.full((ROWS, 3), np.nan), None, {"missing_labels": "mask"}, "no row has all of its labels"),
    ],
)
def test_what_cannot_tell_rows_apart_is_refused(labels: Any, weights: Any, fuse: Any, words: str) -> None:
    fuse = dict(fuse)
    run = run_of(labels, fuse.pop("loss", "bce_with_logits"), 3 if labels.ndim > 1 else 1, weights, **fuse)
    with pytest.raises(JobError) as caught:
        run.stages()
    assert words in str(caught.value)


def test_missing_labels_are_refused_unless_they_are_masked() -> None:
    with pytest.raises(JobError, match=r"labels: NaN or infinity in \d+ of 24 rows"):
        run_of(GAPS, "bce_with_logits", 3)


def test_other_weights_are_another_fingerprint() -> None:
    plain, one, other = (run_of(BINARY, "bce_with_logits", 1, w) for w in (None, WEIGHTS, WEIGHTS * 2))
    prints = [fingerprint(run.job, run.files["holder"], run.tables["holder"]) for run in (plain, one, other)]
    assert "data.weights" not in prints[0]
    assert prints[1]["data.weights"] != prints[2]["data.weights"]
    assert table_of(None, BINARY).weights is None

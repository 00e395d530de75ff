"""Splitting is not an approximation: stages that only exchange payloads give the weights of a plain training loop."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue.compute.seeds import key
from sl_queue.compute.threads import limit_threads
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.actions import Forward, Update
from sl_queue.protocol.schedule.row_order import row_order
from tests.support.resolved import train_joined
from tests.support.split import SGD, Concatenated, Parties, equal_weights, furthest, parties

ADAM = {"name": "adam", "lr": 0.01}
ROWS = 30  # with batches of 12: two whole batches an epoch and a short one of 6


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_draws() -> Iterator[None]:
    before = torch.get_num_threads()
    limit_threads(1)
    torch.manual_seed(3)
    yield
    limit_threads(before)


def tabular(n_parties: int = 2, rows: int = ROWS, dtype: Any = np.float32) -> dict[str, Any]:
    draw = np.random.default_rng(5)
    names = [f"party{i}" for i in range(n_parties)]
    features = {name: draw.normal(size=(rows, 3 + i)).astype(dtype) for i, name in enumerate(names)}
    return {
        "bases": {name: nn.Sequential(nn.Linear(3 + i, 4), nn.ReLU()) for i, name in enumerate(names)},
        "fuse": Concatenated(4 * n_parties, 1),
        "features": features,
        "labels": draw.integers(0, 2, rows),
        "cuts": {name: [4] for name in names},
    }


AGGREGATIONS: dict[str, Any] = {
    "list": lambda xs: xs,
    "concat": lambda xs: torch.cat(xs, 1),
    "sum": lambda xs: sum(xs[1:], start=xs[0]),
    "mean": lambda xs: sum(xs[1:], start=xs[0]) / len(xs),
}


def features_of(setup: Parties, party: str) -> Any:
    return setup.tables[party].features


def plain(setup: Parties, loss: Any, optimizer: Any) -> dict[str, Any]:
    """Train in a loop that knows nothing of stages, payloads or pipelines."""
    job, holder = setup.job, setup.job.label_holder
    bases = {p: copy.deepcopy(setup.given[p]).train() for p in job.fused}
    fuse = copy.deepcopy(setup.given["fuse"]).train()
    names = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}
    make = getattr(torch.optim, names[optimizer["name"]])
    settings = {k: v for k, v in optimizer.items() if k != "name"}
    optimizers = [make(m.parameters(), **settings) for m in (*bases.values(), fuse) if list(m.parameters())]
    labels = torch.from_numpy(setup.tables[holder].labels)
    labels = labels.float() if labels.is_floating_point() else labels
    step = 0
    for epoch in range(job.epochs):
        order = row_order(setup.n_rows, job.seed, epoch) if job.shuffle else np.arange(setup.n_rows)
        for first in range(0, setup.n_rows, job.batch_size):
            rows = order[first : first + job.batch_size]
            if job.drop_last and len(rows) < job.batch_size:
                continue
            for index, part in enumerate(np.array_split(rows, min(job.pipeline.micro_batches, len(rows)))):
                outputs = []
                for party, base in bases.items():
                    columns = torch.from_numpy(features_of(setup, party)[part])
                    torch.manual_seed(key(job.seed, party, "base forward", MicroBatch(step, index)))
                    outputs.append(base(columns.float() if columns.is_floating_point() else columns))
                torch.manual_seed(key(job.seed, holder, "fuse forward", MicroBatch(step, index)))
                output = fuse(AGGREGATIONS[job.fuse.aggregation](outputs))
                (loss(output, labels[torch.from_numpy(part)]) * (len(part) / len(rows))).backward()
            for o in optimizers:
                o.step()
                o.zero_grad()
            step += 1
    return {**bases, "fuse": fuse}


def bce(output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), labels.float())


def squared(output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.squeeze(1), labels)


def hinge(output: Tensor, labels: Tensor) -> Tensor:
    return torch.relu(1 - output.squeeze(1) * (2 * labels - 1)).mean()


def assert_split_equals_plain(plain_loss: Any, optimizer: Any = SGD, bits: bool = True, **setup: Any) -> None:
    """Split, joined and plain training agree; `bits` is False where plain PyTorch adds in an order of its own."""
    made = parties(optimizer=optimizer, **setup)
    expected = plain(made, plain_loss, optimizer)
    split = made.stages().train(made.pipeline)
    joined = train_joined(made.job, list(made.files.values()), made.tables, made.job.batches(made.n_rows))
    assert split.losses == joined.losses
    for name, module in split.modules().items():
        assert equal_weights(module, joined.fuse if name == "fuse" else joined.bases[name]), name
        assert furthest(module, expected[name]) <= 1e-6, name
        assert not bits or equal_weights(module, expected[name]), name
        if list(module.parameters()):
            assert furthest(module, made.given[name]) > 1e-4, f"{name} did not learn"


@pytest.mark.parametrize("n_parties", [1, 2, 5])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=lambda o: o["name"])
def test_binary_classification_with_any_number_of_feature_parties(n_parties: int, optimizer: Any) -> None:
    assert_split_equals_plain(bce, optimizer, **tabular(n_parties))


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD | {"momentum": 0.9, "weight_decay": 0.01},
        {"name": "adamw", "lr": 0.01, "amsgrad": True},
        {"name": "rmsprop", "lr": 0.01, "centered": True},
    ],
    ids=lambda o: o["name"],
)
def test_any_optimizer(optimizer: Any) -> None:
    assert_split_equals_plain(bce, optimizer, **tabular())


@pytest.mark.parametrize("aggregation", ["list", "concat", "sum", "mean"])
@pytest.mark.parametrize("n_parties", [1, 3])
def test_every_aggregation(aggregation: str, n_parties: int) -> None:
    setup = tabular(n_parties)
    if aggregation != "list":
        setup["fuse"] = nn.Linear(4 * n_parties if aggregation == "concat" else 4, 1)
    assert_split_equals_plain(bce, aggregation=aggregation, **setup)


def test_multiclass_classification() -> None:
    setup = tabular() | {"fuse": Concatenated(8, 4), "labels": np.arange(ROWS) % 4}
    assert_split_equals_plain(nn.functional.cross_entropy, loss="cross_entropy", **setup)


def test_regression_with_float64_labels() -> None:
    setup = tabular() | {"labels": np.linspace(-1, 1, ROWS)}
    assert_split_equals_plain(squared, loss="mse", **setup)


def test_a_loss_of_the_users_own() -> None:
    assert_split_equals_plain(hinge, loss=hinge, **tabular())


def test_float64_columns_are_cast_to_the_models_dtype() -> None:
    assert_split_equals_plain(bce, **tabular(dtype=np.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models_of_another_dtype_exchange_activations_of_that_dtype(dtype: torch.dtype) -> None:
    setup = tabular()
    setup["bases"] = {name: base.to(dtype) for name, base in setup["bases"].items()}
    made = parties(**setup | {"fuse": setup["fuse"].to(dtype)})
    split = made.stages()
    assert split.bases["party0"].forward(MicroBatch(0, 0)).dtype == str(dtype).removeprefix("torch.")
    split = made.stages().train(made.pipeline)
    joined = train_joined(made.job, list(made.files.values()), made.tables, made.job.batches(made.n_rows))
    assert equal_weights(split.modules()["fuse"], joined.fuse)
    assert all(equal_weights(split.modules()[party], base) for party, base in joined.bases.items())
    assert furthest(joined.fuse, made.given["fuse"]) > 1e-4


def test_integer_columns_reach_an_embedding_as_they_are() -> None:
    setup = tabular()
    setup["features"]["party0"] = np.arange(ROWS * 3).reshape(ROWS, 3) % 5
    setup["bases"]["party0"] = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 4))
    assert_split_equals_plain(bce, **setup)


def test_a_label_holder_with_a_base_model_of_its_own_between_two_feature_parties() -> None:
    assert_split_equals_plain(bce, ADAM, label_holder="party1", pipeline={"micro_batches": 2}, **tabular(3))


@pytest.mark.parametrize(("micro_batches", "depth"), [(1, 1), (4, 1), (4, 2), (4, 4), (5, 7)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_pipeline_without_staleness(micro_batches: int, depth: int, shuffle: bool) -> None:
    pipeline = {"micro_batches": micro_batches, "depth": depth}  # 5 of 12 rows are uneven, as are 4 of 6
    assert_split_equals_plain(bce, ADAM, pipeline=pipeline, shuffle=shuffle, **tabular())


def test_a_last_batch_of_one_row() -> None:
    assert_split_equals_plain(bce, pipeline={"micro_batches": 4}, **tabular(rows=25))


def test_a_short_last_batch_that_is_dropped() -> None:
    assert_split_equals_plain(bce, drop_last=True, **tabular())


def test_dropout_in_bases_and_fuse() -> None:
    setup = tabular()
    setup["bases"] = {name: nn.Sequential(base, nn.Dropout(0.4)) for name, base in setup["bases"].items()}
    setup["fuse"] = nn.Sequential(setup["fuse"], nn.Dropout(0.2))
    assert_split_equals_plain(bce, pipeline={"micro_batches": 3}, label_holder="party1", **setup)


@pytest.mark.parametrize("depth", [1, 3])
def test_batch_norm_with_its_running_statistics(depth: int) -> None:
    setup = tabular()
    setup["bases"] = {name: nn.Sequential(base, nn.BatchNorm1d(4)) for name, base in setup["bases"].items()}
    setup["fuse"] = nn.Sequential(Concatenated(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    # Plain PyTorch hands BatchNorm a slice of a wider gradient, which its kernel sums up in another order.
    assert_split_equals_plain(bce, bits=False, pipeline={"micro_batches": 3, "depth": depth}, **setup)


def test_activations_with_channels_height_and_width() -> None:
    draw = np.random.default_rng(1)
    images = {name: draw.normal(size=(ROWS, 1, 8, 8)).astype(np.float32) for name in ("left", "right")}
    setup = {
        "bases": {n: nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for n in images},
        "fuse": nn.Sequential(nn.Conv2d(32, 4, 3, stride=4), nn.Flatten(), nn.Linear(16, 3)),
        "features": images,
        "labels": np.arange(ROWS) % 3,
        "cuts": {name: [16, 8, 8] for name in images},
    }
    assert_split_equals_plain(
        nn.functional.cross_entropy, bits=False, loss="cross_entropy", aggregation="concat", **setup
    )


def test_a_base_without_parameters_and_one_whose_weights_are_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.there, self.back = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.back.weight = self.there.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.back(torch.tanh(self.there(x)))  # type: ignore[no-any-return]

    setup = tabular() | {"bases": {"party0": nn.Identity(), "party1": Tied()}, "cuts": {"party0": [3], "party1": [4]}}
    assert_split_equals_plain(bce, ADAM, **setup | {"fuse": Concatenated(7, 1)})


def test_a_fuse_model_may_change_its_inputs_in_place() -> None:
    class InPlace(Concatenated):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            return super().forward([x.mul_(2) for x in inputs])

    setup = tabular() | {"fuse": InPlace(8, 1)}
    setup["bases"] = {name: base[0] for name, base in setup["bases"].items()}  # a ReLU's output may not be changed
    assert_split_equals_plain(bce, **setup)


def test_a_fuse_model_may_take_its_inputs_out_of_their_list() -> None:
    class Popping(Concatenated):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            last = inputs.pop()
            return super().forward([inputs.pop(), last])

    assert_split_equals_plain(bce, **tabular() | {"fuse": Popping(8, 1)})


def test_a_party_that_the_fuse_model_ignores_learns_nothing() -> None:
    class Ignoring(Concatenated):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            return super().forward([inputs[0], inputs[1].detach()])

    made = parties(**tabular() | {"fuse": Ignoring(8, 1)})
    split = made.stages().train(made.pipeline).modules()
    assert equal_weights(split["party1"], made.given["party1"])
    assert not equal_weights(split["party0"], made.given["party0"])


def test_held_out_rows_are_measured_as_in_joined_training() -> None:
    setup = tabular() | {"metrics": ["auroc", "accuracy"], "holdout": 0.3, "pipeline": {"micro_batches": 2}}
    setup["bases"]["party0"].append(nn.Dropout(0.5))
    made = parties(label_holder="party1", **setup)
    split = made.stages().train(made.pipeline)
    joined = train_joined(made.job, list(made.files.values()), made.tables, made.job.batches(made.n_rows))
    assert [line["holdout"] for line in joined.history] == split.evaluations
    assert [(line["epoch"], line["step"]) for line in joined.history] == [(0, 1), (1, 3)]
    assert [sorted(found) for found in split.evaluations] == [["accuracy", "auroc", "loss"]] * 2
    assert joined.history[0]["loss"] == pytest.approx((12 * split.losses[0] + 9 * split.losses[1]) / 21)


def test_a_given_module_is_trained_as_a_copy() -> None:
    setup = tabular()
    before = copy.deepcopy(setup["bases"]["party0"])
    made = parties(**setup)
    made.stages().train(made.pipeline)
    assert equal_weights(setup["bases"]["party0"], before)


# Staleness ------------------------------------------------------------------------------------------------------


def versions(setup: Parties) -> dict[MicroBatch, int]:
    """Return how many updates came before each forward pass."""
    version: dict[MicroBatch, int] = {}
    updates = 0
    for action in setup.pipeline.feature_actions(0):
        match action:
            case Forward(micro_batch):
                version[micro_batch] = updates
            case Update():
                updates += 1
    return version


def delayed(setup: Parties) -> dict[str, Any]:
    """Plain SGD on delayed gradients: each forward uses the weights after as many updates as came before it."""
    version = versions(setup)
    batches = setup.job.batches(setup.n_rows)
    live = {p: copy.deepcopy(setup.given[p]).train() for p in setup.job.fused}
    fuse = copy.deepcopy(setup.given["fuse"]).train()
    labels = torch.from_numpy(setup.tables["holder"].labels)
    past = [copy.deepcopy(live)]
    for step in range(batches.steps):
        for index in range(batches.parts(step)):
            micro_batch = MicroBatch(step, index)
            rows = batches.rows(micro_batch)
            then = {p: copy.deepcopy(past[version[micro_batch]][p]).train() for p in live}
            outputs = []
            for party, base in then.items():
                for buffer, newest in zip(base.buffers(), live[party].buffers(), strict=True):
                    buffer.copy_(newest)
                torch.manual_seed(key(setup.job.seed, party, "base forward", micro_batch))
                outputs.append(base(torch.from_numpy(features_of(setup, party)[rows])))
                for buffer, newest in zip(base.buffers(), live[party].buffers(), strict=True):
                    newest.copy_(buffer)
            share = len(rows) / batches.rows_in_step(step)
            torch.autograd.backward(bce(fuse(outputs), labels[torch.from_numpy(rows)]) * share)
            for party, base in then.items():
                for parameter, old in zip(live[party].parameters(), base.parameters(), strict=True):
                    if old.grad is None:
                        continue
                    parameter.grad = old.grad if parameter.grad is None else parameter.grad + old.grad
        for module in (*live.values(), fuse):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data -= SGD["lr"] * parameter.grad
                    parameter.grad = None
        past.append(copy.deepcopy(live))
    assert any(version[mb] < mb.step for mb in version), "nothing was stale"
    return {**live, "fuse": fuse}


@pytest.mark.parametrize(
    ("micro_batches", "depth", "staleness"), [(1, 2, 1), (1, 4, 3), (3, 4, 1), (3, 5, 2), (2, 9, 4)]
)
def test_a_run_ahead_applies_delayed_gradients_to_the_live_weights(
    micro_batches: int, depth: int, staleness: int
) -> None:
    pipeline = {"micro_batches": micro_batches, "depth": depth, "staleness": staleness}
    setup = tabular(rows=61)
    setup["bases"] = {n: nn.Sequential(b, nn.BatchNorm1d(4), nn.Dropout(0.1)) for n, b in setup["bases"].items()}
    made = parties(pipeline=pipeline, drop_last=True, **setup)
    expected = delayed(made)
    split = made.stages().train(made.pipeline)
    for name, module in split.modules().items():
        assert furthest(module, expected[name]) <= 1e-6, name
    in_step = parties(pipeline=pipeline | {"staleness": 0}, drop_last=True, **setup)
    other = in_step.stages().train(in_step.pipeline)
    assert furthest(other.modules()["party0"], split.modules()["party0"]) > 1e-5, "staleness changed nothing"


def test_a_run_ahead_works_with_tied_and_frozen_weights() -> None:
    setup = tabular()
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    setup["bases"]["party0"] = nn.Sequential(first, nn.Tanh(), second, nn.Linear(3, 4))
    setup["bases"]["party0"][3].requires_grad_(False)
    made = parties(pipeline={"micro_batches": 1, "depth": 3, "staleness": 2}, **setup)
    expected = delayed(made)
    module = made.stages().train(made.pipeline).modules()["party0"]
    assert furthest(module, expected["party0"]) <= 1e-6
    assert module[0].weight is module[2].weight
    assert equal_weights(module[3], setup["bases"]["party0"][3])

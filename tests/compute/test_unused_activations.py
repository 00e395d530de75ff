"""None is not zero: what the loss does not depend on has no gradient, and no optimizer moves it."""

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sl_queue
from sl_queue.cut.packing import Compress, Dtype
from sl_queue.errors import ComputeError, RemoteProtocolError
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import Gradient, Header, Kind, MicroBatch, Payload
from tests.compute.test_split_equals_joined import bce, plain
from tests.support.resolved import train_joined
from tests.support.split import Parties, equal_weights, parties

FIRST = MicroBatch(0, 0)
MOVERS: list[dict[str, Any]] = [  # each moves a parameter whose gradient is zero
    {"name": "adam", "lr": 0.01},
    {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    {"name": "rmsprop", "lr": 0.01, "weight_decay": 0.1},
]
WIRES = [{"dtype": dtype, "compress": compress} for dtype, compress in product(get_args(Dtype), get_args(Compress))]


class Dropping(nn.Module):
    """Leaves parties out at random, as modality dropout does; one head of two is never used."""

    def __init__(self, width: int, kept: float = 0.4) -> None:
        super().__init__()
        self.linear, self.spare, self.kept = nn.Linear(width, 1), nn.Linear(width, 1), kept

    def forward(self, inputs: list[Tensor]) -> Tensor:
        chosen = [x for x in inputs if not self.training or torch.rand(()) < self.kept]
        if not chosen:
            return self.linear.bias.expand(len(inputs[0]), 1)
        return self.linear(torch.stack(chosen).sum(0))  # type: ignore[no-any-return]


class Routing(nn.Module):
    """Uses what `parties` names, for as long as a test likes."""

    def __init__(self, *used: int) -> None:
        super().__init__()
        self.linear, self.used = nn.Linear(4, 1), used

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.linear(torch.stack([inputs[place] for place in self.used]).sum(0))  # type: ignore[no-any-return]


def run(fuse: nn.Module, **more: Any) -> Parties:
    """Parties a and b, and a label holder c with a base model of its own; a's ends in a ReLU."""
    torch.manual_seed(3)
    draw = np.random.default_rng(5)
    bases = {"a": nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "b": nn.Linear(3, 4), "c": nn.Linear(3, 4)}
    features = {party: draw.normal(size=(30, 3)).astype(np.float32) for party in bases}
    labels = draw.integers(0, 2, 30)
    cuts = {party: [4] for party in bases}
    return parties(bases, fuse, features, labels, cuts=cuts, label_holder="c", **{"epochs": 4} | more)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("pipeline", [{"micro_batches": 1}, {"micro_batches": 3, "depth": 2}], ids=str)
@pytest.mark.parametrize("optimizer", MOVERS, ids=lambda o: o["name"])
def test_parties_that_a_step_leaves_out_end_as_in_one_process(optimizer: Any, pipeline: Any) -> None:
    made = run(Dropping(4), optimizer=optimizer, pipeline=pipeline)
    split = made.stages().train(made.pipeline).modules()
    joined = train_joined(made.job, list(made.files.values()), made.tables, made.job.batches(made.n_rows))
    expected = plain(made, bce, optimizer)
    for name, module in split.items():
        assert equal_weights(module, expected[name]), name
        assert equal_weights(module, joined.fuse if name == "fuse" else joined.bases[name]), name


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_party_that_is_never_used_stays_as_it_was_however_tensors_travel(wire: Any, staleness: int) -> None:
    pipeline = {"micro_batches": 2, "depth": 3, "staleness": staleness}
    made = run(Routing(1), optimizer=MOVERS[1], wire=wire, pipeline=pipeline, epochs=2)
    split = made.stages().train(made.pipeline).modules()
    assert [name for name in "abc" if equal_weights(split[name], made.given[name])] == ["a", "c"]


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_the_gradient_of_an_unused_activation_has_no_bytes_and_survives_its_way(wire: Any) -> None:
    stages = run(Routing(1, 2), wire=wire).stages()
    sent = {name: base.forward(FIRST) for name, base in stages.bases.items()}
    answers = stages.fuse.forward_backward(FIRST, sent)
    assert {name: bool(len(answer.data)) for name, answer in answers.items()} == {"a": False, "b": True}
    header = Header("run", 0, Kind.GRADIENT, "c", "a", FIRST)
    _, arrived = decode(encode(header, Gradient(FIRST, answers["a"])))
    assert arrived == Gradient(FIRST, answers["a"])
    stages.bases["a"].backward(FIRST, arrived.payload)
    assert all(parameter.grad is None for parameter in stages.bases["a"].module.parameters())


def test_an_operator_that_returns_none_for_its_input_gives_no_gradient() -> None:
    class Blind(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    class Fuse(Routing):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            return super().forward([Blind.apply(inputs[0]), *inputs[1:]])  # type: ignore[no-untyped-call]

    made = run(Fuse(0, 1), optimizer=MOVERS[1])
    split = made.stages().train(made.pipeline).modules()
    assert equal_weights(split["a"], made.given["a"])
    assert not equal_weights(split["b"], made.given["b"])


def test_a_frozen_base_model_is_left_alone() -> None:
    made = run(Dropping(4, kept=1.0), optimizer=MOVERS[1])
    for name in ("a", "c"):
        made.given[name].requires_grad_(False)
    split = made.stages().train(made.pipeline).modules()
    joined = train_joined(made.job, list(made.files.values()), made.tables, made.job.batches(made.n_rows))
    assert [name for name in "abc" if equal_weights(split[name], made.given[name])] == ["a", "c"]
    assert all(equal_weights(split[name], joined.bases[name]) for name in "abc")


@pytest.mark.parametrize("tampered", ["bytes", "rows", "shape"])
def test_a_gradient_that_says_unused_is_checked_like_any_other(tampered: str) -> None:
    stages = run(Routing(1)).stages()
    sent = {name: base.forward(FIRST) for name, base in stages.bases.items()}
    answer = stages.fuse.forward_backward(FIRST, sent)["a"]
    changes: dict[str, Any] = {"bytes": {"data": b"1234"}, "rows": {"rows": b"other"}, "shape": {"shape": (3, 4)}}
    with pytest.raises(RemoteProtocolError, match=r"micro-batch 0\.0: gradient of party 'c'"):
        stages.bases["a"].backward(FIRST, replace(answer, **changes[tampered]))


def test_an_activation_may_not_come_without_its_numbers() -> None:
    stages = run(Routing(1)).stages()
    sent = {name: base.forward(FIRST) for name, base in stages.bases.items()}
    empty = Payload(sent["a"].dtype, sent["a"].shape, b"", sent["a"].rows, f"{sent['a'].dtype}/unused")
    with pytest.raises(RemoteProtocolError, match=r"activation of party 'a': .* nobody asked for: 'unused'"):
        stages.fuse.forward_backward(FIRST, {**sent, "a": empty})


def test_a_loss_that_depends_on_nothing_is_named_with_its_micro_batch() -> None:
    class Detached(Routing):
        def forward(self, inputs: list[Tensor]) -> Tensor:
            return super().forward([x.detach() for x in inputs]).detach()

    made = run(Detached(0))
    with pytest.raises(ComputeError, match=r"micro-batch 0\.0: the loss of .*Detached depends on no activation"):
        made.stages().train(made.pipeline)


def test_a_whole_run_in_threads_leaves_parties_out_as_one_process_does() -> None:
    made = run(Dropping(4), optimizer=MOVERS[0], pipeline={"micro_batches": 2, "checkpoint_every": 2})
    result = sl_queue.run_local(made.job, list(made.files.values()))
    expected = plain(made, bce, MOVERS[0])
    assert all(equal_weights(result.base(name), expected[name]) for name in "abc")
    assert equal_weights(result.fuse, expected["fuse"])

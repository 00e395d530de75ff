"""Learning that cannot be done is refused before anything is trained, and party files say what is wrong with it."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from sl_queue.config.job import PartyFile
from sl_queue.data.spec import Rows
from sl_queue.errors import ComputeError, JobError
from tests.support.learning import run_of
from tests.support.split import Concatenated


class Sam(torch.optim.SGD):
    """Twice a step."""

    def first_step(self) -> None: ...
    def second_step(self) -> None: ...


class Lookahead(torch.optim.Optimizer):
    """One that wraps another."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups[0]["params"], {})
        self.inner = inner


def strange(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([*module.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)


class Codes(nn.Module):
    """Columns as codes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.abs() * 3).long().clamp(max=9)


def sparse_models() -> dict[str, nn.Module]:
    bases = {party: nn.Sequential(Codes(), nn.EmbeddingBag(10, 4, sparse=True)) for party in "ab"}
    return {**bases, "fuse": Concatenated(8, 1)}


@pytest.mark.parametrize(
    ("learning", "words"),
    [
        ({"optimizer": {"name": "lbfgs"}}, ["'lbfgs' evaluates the loss more than once a step"]),
        ({"optimizer": lambda m: torch.optim.LBFGS(m.parameters())}, ["LBFGS evaluates the loss more than once"]),
        ({"optimizer": lambda m: Sam(m.parameters(), lr=0.1)}, ["Sam evaluates the loss more than once a step"]),
        ({"optimizer": lambda m: m}, ["returns Net; it must return a torch.optim.Optimizer"]),
        ({"optimizer": strange}, ["'strange' trains 1 tensor that is not the model's"]),
        ({"optimizer": lambda m: torch.optim.SGD(m.head.parameters(), lr=1.0)}, ["leaves out embedding.weight"]),
        ({"optimizer": lambda m: Lookahead(torch.optim.Adam(m.parameters()))}, ["holds another optimizer", "'inner'"]),
        ({"groups": [{"match": "heads.*", "lr": 0.1}]}, ["'heads.*' matches no parameter", "embedding.weight"]),
        ({"groups": [{"match": "head.*", "lrr": 0.1}]}, ["groups[0].lrr is not an option of SGD; did you mean 'lr'?"]),
        ({"groups": [{"match": "*", "lr": -1.0}]}, ["refused by torch.optim.SGD", "-1.0"]),
        ({"optimizer": {"name": "adam", "lr": True}}, ["lr = true; torch.optim.Adam takes numbers there"]),
        (
            {"optimizer": {"name": "adam", "betas": [0.9, True]}},
            ["betas = [0.9, true]; torch.optim.Adam takes numbers"],
        ),
        ({"groups": [{"match": "*", "lr": True}]}, ["groups[0] = {'lr': True}: lr = true; torch.optim.SGD takes"]),
        ({"optimizer": {"name": "rprop", "no_decay": ["*.bias"]}}, ["no_decay has no use: Rprop has no weight_decay"]),
        ({"schedule": lambda step, steps: float("nan")}, ["schedule gives nan for step 0 of 6"]),
        ({"schedule": lambda step, steps: -1}, ["gives -1 for step 0 of 6; it must give a factor of at least 0"]),
        ({"schedule": lambda step: 1.0}, ["schedule fails on (0, 6): TypeError"]),
    ],
)
def test_what_cannot_learn_is_refused_before_anything_is_trained(learning: dict[str, Any], words: list[str]) -> None:
    run = run_of(**learning)
    with pytest.raises(JobError) as caught:
        run.stages()
    assert "party 'a': [base]" in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("learning", "words"),
    [
        ({"schedule": lambda step, steps: 1 / (3 - step)}, "schedule fails on (3, 6): ZeroDivisionError"),
        ({"schedule": lambda step, steps: 2.5 - step}, "schedule gives a learning rate of -0.05 for step 3"),
        ({"models": sparse_models()}, "SGD remembers 'momentum_buffer' of '1.weight' as a sparse tensor"),
    ],
)
def test_what_cannot_go_on_learning_is_named(learning: dict[str, Any], words: str) -> None:
    run = run_of(optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.5}, **learning)
    with pytest.raises(ComputeError, match=rf"party '.*': .(base|fuse).*{re.escape(words)}"):
        run.stages().train(run.pipeline)


@pytest.mark.parametrize(
    ("learning", "words"),
    [
        ({"schedule": {"name": "cosin"}}, "schedule = 'cosin' is unknown; it must be constant, cosine, linear"),
        ({"schedule": {"name": "cosine", "every": 3}}, "schedule.every is unknown; 'cosine' takes warmup, min_lr"),
        ({"schedule": {"name": "step"}}, "schedule.every is missing; it must be a whole number of at least 1"),
        ({"schedule": {"name": "exponential"}}, "schedule.gamma is missing"),
        ({"schedule": {"name": "linear", "warmup": 1.5}}, "schedule.warmup = 1.5; it must be a whole number"),
        ({"schedule": {"name": "linear", "warmup": True}}, "schedule.warmup = True; it must be"),
        ({"groups": [{"lr": 1.0}]}, "groups [0].match is missing"),
        ({"groups": [{"match": "x"}]}, "groups [0] sets nothing"),
        ({"groups": [{"match": [], "lr": 1.0}]}, "groups [0].match = []; it must be a pattern"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0; it must be a number above 0"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "has both clip_norm and clip_value"),
        ({"ema": 1.0}, "ema = 1.0; it must be a number between 0 and 1"),
        ({"groups": [{"match": "x", "lr": 1.0}], "optimizer": "bank:make"}, "has groups, but an optimizer in code"),
        ({"optimizer": {"name": "adam", "no_decay": [3]}}, "optimizer .no_decay = [3]; it must be a pattern"),
    ],
)
def test_a_party_file_says_what_is_wrong_with_how_a_model_learns(learning: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError) as caught:
        PartyFile(party="a", data=Rows([1], [[1.0]]), base={"model": "bank:Net", **learning})
    assert words.replace(" [", "[").replace(" .", ".") in str(caught.value).replace(" [", "[").replace(" .", ".")

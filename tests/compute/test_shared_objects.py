"""Objects that several attributes hold are one after a resume too, and those that have parted are two."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sl_queue.compute.modules.state import Built
from sl_queue.compute.optimizer_state import BuiltOptimizer
from sl_queue.cut.crossing import to_payload
from sl_queue.protocol.checkpoint import State
from tests.compute.test_module_state import Clock, Linear, resumed, setup
from tests.support.split import equal_weights


class Made(Linear):
    """Two names for one tensor, from the first forward on."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.last = torch.zeros(2), None

    def step(self) -> float:
        if self.last is None:
            self.last = self.history
        self.last += 0.1
        return float(self.history[0])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.step())


class InAList(Made):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[int] = []
        self.lists: list[list[int]] = []

    def step(self) -> float:
        if not self.lists:
            self.lists.append(self.words)
        self.lists[0].append(1)
        return 0.01 * len(self.words)


class OfAnObject(Made):
    def __init__(self) -> None:
        super().__init__()
        self.clock, self.watch = Clock(), Clock()

    def step(self) -> float:
        self.clock.values = self.history  # type: ignore[attr-defined]
        self.watch.values = self.clock.values  # type: ignore[attr-defined]
        self.watch.values.add_(0.1)  # type: ignore[attr-defined]
        return float(self.history.sum())


class OfABuffer(Made):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.means: list[Any] = []

    def step(self) -> float:
        self.means = [self.mean, self.linear.bias, self.linear]
        self.means[0].add_(0.1)
        return float(self.mean[0]) + float(self.means[1].detach().mean())


class Parted(Made):
    """One tensor at first; then one of the names has another."""

    def __init__(self) -> None:
        super().__init__()
        self.last = self.first = self.history

    def step(self) -> float:
        self.history = self.history + 0.1  # type: ignore[has-type]
        self.last.mul_(0.5).add_(1)
        return float(self.history[0]) + float(self.last[0]) + 2 * float(self.first[0])


class PartedFromABuffer(Made):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.last = self.mean

    def step(self) -> float:
        self.last = self.last + 0.1
        self.mean.add_(1)
        return float(self.mean[0]) + float(self.last[0])


class Still(Made):
    """The object that two hold stays as it is for long, while one of them changes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = {"x": self.history, "n": 0}, self.history, 0

    def step(self) -> float:
        self.calls += 1
        self.a["n"] += 1
        if self.calls > 12:
            self.b.add_(0.1)
        return float(self.a["x"][0]) + 0.1 * self.a["n"]


class ByParameter(Made):
    """Slow weights, by their parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = {p: p.detach().clone() for p in self.parameters()}

    def step(self) -> float:
        for parameter, slow in self.slow.items():
            slow.lerp_(parameter.detach(), 0.1)
        return float(sum(slow.sum() for slow in self.slow.values()))


KINDS = [Made, InAList, OfAnObject, OfABuffer, Parted, PartedFromABuffer, Still, ByParameter]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_objects(
    kind: Callable[[], nn.Module], step: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = setup(kind(), holdout=0.0)
    quiet = run.stages().train(run.pipeline)
    again = resumed(run, tmp_path, step)
    assert equal_weights(again.modules()["bank"], quiet.modules()["bank"])
    assert again.bases["bank"].state() == quiet.bases["bank"].state()
    assert "no checkpoint carries" not in caplog.text


def test_an_object_that_another_attribute_has_kept_is_named() -> None:
    module = Linear()
    vars(module)["one"] = vars(module)["other"] = Clock()
    built = Built.of(module)
    module.other.ticks += 1  # type: ignore[operator, union-attr]
    state, lost = built.changes(module, "")
    assert (state.values["attributes"], lost) == ({"one": {"object": {"ticks": 1}}, "other": {"same": "one"}}, [])
    vars(module)["other"] = Clock()
    assert [error.path for error in built.changes(module, "")[1]] == ["other"]


def test_what_shares_an_object_with_what_is_not_carried_is_carried_itself() -> None:
    module = Linear()
    vars(module).update(a=None, b=None, c=None)
    built = Built.of(module)
    shared = torch.ones(2)
    vars(module).update(a=[shared, object()], b=shared, c=[shared])
    state, lost = built.changes(module, "")
    assert [error.path for error in lost] == ["a[1]"]
    assert state.values["attributes"] == {"b": {"tensor": "b"}, "c": {"list": [{"same": "b"}]}}


def test_a_state_of_an_earlier_version_is_read_as_that_did() -> None:
    """It has the numbers of each name, and reads them into what the names hold, which may be one object."""
    module = Linear()
    shared = vars(module)["one"] = vars(module)["other"] = torch.zeros(2)
    built = Built.of(module)
    shared.add_(3)
    state, _ = built.changes(module, "")
    assert state.values == {"attributes": {"one": {"tensor": "one"}, "other": {"same": "one"}}, "apart": True}
    values = {"attributes": {"one": {"tensor": "one"}, "other": {"tensor": "other"}}}
    earlier = State({f"attributes/{name}": to_payload(shared) for name in ("one", "other")}, values)
    for each in (earlier, state):
        vars(module).update(one=torch.ones(1), other=None)
        built.load(module, each, "", "bank")
        assert module.one is module.other
        assert module.one is shared
        assert torch.equal(shared, torch.full((2,), 3.0))


def test_an_attribute_that_an_object_has_lost_is_lost_after_a_resume() -> None:
    module = Linear()
    vars(module)["held"] = SimpleNamespace(a=1, b=[2])
    built = Built.of(module)
    del module.held.b  # type: ignore[union-attr]
    state, _ = built.changes(module, "")
    built.load(module, state, "", "bank")
    assert module.held == SimpleNamespace(a=1)


class Lookahead(torch.optim.SGD):
    """Slow weights by their parameter, and a name for the newest."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.parameters(), lr=0.1)
        self.slow = {p: p.detach().clone() for p in module.parameters()}
        self.newest: Any = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for parameter, slow in self.slow.items():
            slow.lerp_(parameter.detach(), 0.5)
            parameter.data.copy_(slow)
            self.newest = slow
        self.newest.mul_(0.9)


def test_an_optimizer_resumes_with_the_same_objects() -> None:
    def built(module: nn.Module) -> BuiltOptimizer:
        return BuiltOptimizer.of(Lookahead(module), module, "optimizer", "here")

    def train(module: nn.Module, optimizer: BuiltOptimizer, steps: int) -> None:
        for _ in range(steps):
            module(torch.ones(2, 3)).sum().backward()
            optimizer.optimizer.step()

    one = nn.Linear(3, 4)
    other = copy.deepcopy(one)
    mine, theirs = built(one), built(other)
    train(one, mine, 2)
    state = mine.state()
    other.load_state_dict(one.state_dict())
    for parameter, twin in zip(one.parameters(), other.parameters(), strict=True):
        twin.grad = None if parameter.grad is None else parameter.grad.clone()
    theirs.load(state)
    for module, optimizer in ((one, mine), (other, theirs)):
        train(module, optimizer, 2)
    assert equal_weights(one, other)
    assert mine.state() == theirs.state()

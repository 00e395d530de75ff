"""Objects that a model changes in place: carried as they are, or named; and a trial leaves them as they were."""

import argparse
import enum
import logging
import random
from array import array
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue.compute.modules.snapshots import left_no_trace
from sl_queue.compute.modules.state import Built
from tests.compute.test_module_state import Linear, resumed, setup
from tests.support.resolved import train_joined
from tests.support.split import equal_weights

Step = Callable[[Any], Any]  # changes what it is given, and returns a number of it


class Log(list[int]):
    """A list that counts what is written into it, and does not let itself be written to otherwise."""

    def __init__(self) -> None:
        super().__init__([0])
        self.writes = 0

    def extend(self, _: Any) -> None:
        raise AssertionError

    def write(self) -> int:
        self.writes += 1
        self.append(self.writes)
        return len(self) + self.writes


class Settings(dict[str, int]):
    """Its items are its attributes."""

    def __init__(self) -> None:
        super().__init__(n=0)
        self.__dict__ = self


class Recent(OrderedDict[int, int]):
    def put(self) -> int:
        self[len(self) % 5] = len(self)
        self.move_to_end(0)
        return next(iter(self))


class Window(deque[int]):
    calls = 0

    def push(self) -> int:
        self.calls += 1
        self.append(self.calls)
        return sum(self)


class Drawing(random.Random):
    pass


class Scaled(Tensor):
    def new_empty(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().new_empty(*args, **kwargs).as_subclass(Scaled)


class Worker:
    """Holds what only the standard library knows."""

    def __init__(self) -> None:
        self.counts, self.about = Counter[str](), SimpleNamespace(n=0)

    def go(self) -> int:
        self.counts["n"] += 1
        self.about.n += 2
        return self.counts["n"] + self.about.n  # type: ignore[no-any-return]


def count(values: Any) -> int:
    values["n"] += 1
    return values["n"]  # type: ignore[no-any-return]


def tick(holder: Any) -> int:
    holder.n += 1
    return holder.n  # type: ignore[no-any-return]


def first(values: Any) -> int:
    values[0] = (int(values[0]) + 1) % 200
    return int(values[0])


def grow(tensor: Tensor) -> float:
    tensor.add_(0.1)
    return float(tensor.sum())


def rewrite(values: Any) -> int:
    values[0] = f"{int(values[0]) + 1}"
    return int(values[0])


def stretch(tensor: Tensor) -> float:
    tensor.mul_(1.1)
    return float(tensor.to_dense().sum())


def shift(distribution: Any) -> float:
    distribution.loc.add_(0.1)
    return float(distribution.mean)


def under_the_hood(tensor: Tensor) -> float:
    tensor.numpy()[:2] += 0.1
    return float(tensor[0])


CARRIED: dict[str, tuple[Callable[[], Any], Step]] = {
    "Counter": (Counter, count),
    "defaultdict": (lambda: defaultdict(partial(int, 0)), count),
    "UserDict": (lambda: UserDict(n=0), count),
    "ChainMap": (lambda: ChainMap({"n": 0}), count),
    "UserList": (lambda: UserList([0]), first),
    "dict of its own": (Settings, count),
    "list of its own": (Log, Log.write),
    "OrderedDict of its own": (Recent, Recent.put),
    "deque of its own": (lambda: Window([1], 4), Window.push),
    "SimpleNamespace": (lambda: SimpleNamespace(n=0), tick),
    "Namespace": (lambda: argparse.Namespace(n=0), tick),
    "object": (Worker, Worker.go),
    "bytearray": (lambda: bytearray(3), first),
    "array": (lambda: array("i", [0]), first),
    "objects": (lambda: np.array([0, None], object), first),
    "texts": (lambda: np.array(["0000"]), rewrite),
    "records": (lambda: np.zeros(1, [("n", int), ("x", float, 2)]), lambda a: first(a["n"])),
    "big-endian": (lambda: np.zeros(2, ">i4"), first),
    "bit generator": (lambda: np.random.PCG64(3), lambda g: g.random_raw() % 7),
    "generator of its own": (lambda: Drawing(3), lambda g: g.random()),
    "sparse": (lambda: torch.eye(3).to_sparse(), stretch),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), stretch),
    "tensor of its own": (lambda: torch.zeros(2).as_subclass(Scaled), grow),
    "distribution": (lambda: torch.distributions.Normal(torch.zeros(1), torch.ones(1)), shift),
    "large": (lambda: torch.zeros(2**22 + 1), under_the_hood),
}


class Changing(Linear):
    def __init__(self, make: Callable[[], Any], step: Step) -> None:
        super().__init__()
        self.held, self.inside, self.step = make(), [make()], step

    def forward(self, x: Tensor) -> Tensor:
        factor = 1 + 0.01 * (float(self.step(self.held)) + float(self.step(self.inside[0])) % 7)
        return super().forward(x) * factor


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("what", CARRIED)
def test_what_is_changed_in_place_is_carried(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = setup(lambda: Changing(*CARRIED[what]), holdout=0.0)
    with caplog.at_level(logging.WARNING, "sl_queue"):
        quiet = run.stages().train(run.pipeline)
        again = resumed(run, tmp_path, 3)
    assert "no checkpoint carries" not in caplog.text
    assert equal_weights(again.modules()["bank"], quiet.modules()["bank"])
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(run.n_rows))
    assert equal_weights(quiet.modules()["bank"], joined.bases["bank"])
    module, step = Changing(*CARRIED[what]), CARRIED[what][1]
    held = module.held
    with left_no_trace(module):
        module(torch.zeros(2, 3))
    assert module.held is held
    assert step(held) == step(CARRIED[what][0]())


class Phase(enum.Enum):
    FIRST = 1
    SECOND = 2


class Moving:
    def __init__(self) -> None:
        self.phase, self.items = Phase.FIRST, list(range(1001))


KEY = nn.Parameter(torch.zeros(2))
NAMED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "many": (lambda: list(range(1001)), lambda v: v.__setitem__(7, 0)),
    "many, moved": (lambda: deque(range(1001)), lambda v: v.rotate()),
    "many, replaced": (lambda: set(range(1001)), lambda v: v.add(v.pop() + 5000)),
    "lists in many": (lambda: {i: [0] for i in range(1001)}, lambda v: v[3].append(1)),
    "a Counter of many": (lambda: Counter(range(1001)), lambda v: v.update([3])),
    "keys that are no values": (lambda: {KEY: [0]}, lambda v: v[KEY].append(1)),
    "arguments": (lambda: partial(print, {}), lambda v: v.args[0].update(a=1)),
    "seeds": (lambda: np.random.SeedSequence(1), lambda v: v.spawn(1)),
    "phase of an object": (Moving, lambda v: setattr(v, "phase", Phase.SECOND)),
    "many of an object": (Moving, lambda v: v.items.append(1)),
}


@pytest.mark.parametrize("what", NAMED)
def test_what_is_changed_in_place_and_cannot_be_carried_is_named(what: str) -> None:
    make, change = NAMED[what]
    module = Linear()
    vars(module)["held"] = make()
    built = Built.of(module)
    assert built.changes(module, "")[1] == []
    with left_no_trace(module):
        change(module.held)
        (lost,) = built.changes(module, "")[1]
        assert lost.path.startswith("held")
    if what != "seeds":
        assert built.changes(module, "")[1] == []


def test_a_large_tensor_is_compared_by_its_numbers() -> None:
    """Its version counts no change through .data or .numpy()."""
    module = Linear()
    vars(module)["held"] = torch.zeros(2**22 + 1)
    built = Built.of(module)
    module.held.numpy()[0] = 1  # type: ignore[operator, union-attr]
    assert list(built.changes(module, "")[0].values["attributes"]) == ["held"]


def test_an_equal_value_is_no_change() -> None:
    module = Linear()
    vars(module)["held"] = {"many": [float("nan"), 10**30, *range(2000)], "few": Counter("aab")}
    built = Built.of(module)
    vars(module)["held"] = {"many": [module.held["many"][0], 10**15 * 10**15, *range(2000)], "few": Counter("aba")}
    assert built.changes(module, "")[1] == []

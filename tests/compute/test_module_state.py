"""A checkpoint holds what a module is now, whatever of it has changed; and what no checkpoint can hold is named."""

import itertools
import json
import logging
import random
import warnings
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue.compute.modules.shared_values import SharedValues
from sl_queue.errors import CheckpointError, JobError
from sl_queue.protocol.checkpoint import SAVABLE
from sl_queue.storage import tensor_file
from sl_queue.storage.checkpoints import Folder
from tests.support.resolved import train_joined
from tests.support.split import Concatenated, Parties, Stages, equal_weights, parties

ROWS = 20
MOMENTUM = {"name": "sgd", "lr": 0.1, "momentum": 0.9}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


class Clock:
    def __init__(self) -> None:
        self.ticks = 0


class Pace:
    __slots__ = ("_Pace__late", "steps")

    def __init__(self) -> None:
        self.steps = 0

    def go(self) -> int:
        self.steps, self.__late = self.steps + 1, self.steps
        return self.__late


class Pair(NamedTuple):
    first: int
    second: list[float]


class Counting(Linear):
    """Depends on plain attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.rate, self.on, self.word, self.last_shape = 0, 0.5, False, "", None
        self.recent: deque[float] = deque(maxlen=3)
        self.table: dict[int, list[int]] = {}
        self.clock, self.mean, self.array = Clock(), torch.zeros(4), np.zeros(2)
        self.numpy, self.python = np.random.default_rng(3), random.Random(3)
        self.torch = torch.Generator().manual_seed(3)
        self.pace, self.pair = Pace(), Pair(0, [])

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.calls, self.rate, self.on, self.word = self.calls + 1, self.rate * 1.01, not self.on, self.word + "x"
        self.recent.append(float(output.detach().mean()))
        self.table.setdefault(self.calls % 3, []).append(self.calls)
        self.clock.ticks += 1
        self.mean = self.mean * 0.9 + output.detach().mean(0)
        self.array += 0.1
        self.last_shape = x.shape
        self.pair = Pair(self.pair.first + self.pace.go(), [*self.pair.second, 0.1])
        numbers = [self.calls, self.rate, self.on, len(self.word), sum(self.recent), self.clock.ticks, self.array.sum()]
        numbers += [
            self.pair.first,
            len(self.pair.second),
            sum(map(sum, self.table.values())),
            self.numpy.random(),
            self.python.random(),
        ]
        noise = torch.rand((), generator=self.torch)
        return output * (1 + 0.01 * float(sum(numbers))) + self.mean + noise


class Bank(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(0, 4), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.bank = torch.cat([self.bank, output.detach()])[-17:]
        self.none = self.bank.mean(0)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(4))
        self.late = self.late * 0.5 + self.none
        return output + self.none + self.late


class Thawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.calls = nn.Linear(3, 4), nn.BatchNorm1d(4), 0
        self.linear.requires_grad_(False)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls == 5:
                self.linear.requires_grad_(True)
                self.norm.train()
        return self.norm(self.linear(x))  # type: ignore[no-any-return]


class Teacher(Linear):
    """Averages its weights into a module that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(3, 4)]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for mean, now in zip(self.hidden[0].parameters(), self.linear.parameters(), strict=True):
                mean.mul_(0.9).add_(now, alpha=0.1)
            taught = self.hidden[0](x)
        return super().forward(x) + taught


def setup(base: Any, fuse: Any = None, **changes: Any) -> Parties:
    draw = np.random.default_rng(5)
    features = {party: draw.normal(size=(ROWS, 3)).astype(np.float32) for party in ("bank", "insurer")}
    settings: dict[str, Any] = {
        "bases": {"bank": base, "insurer": nn.Linear(3, 2)},
        "fuse": fuse or Concatenated(6, 1),
        "features": features,
        "labels": draw.integers(0, 2, ROWS),
        "cuts": {"bank": [4], "insurer": [2]},
        "label_holder": "insurer",
        "batch_size": 4,
        "optimizer": MOMENTUM,
        "holdout": 0.2,
        "pipeline": {"micro_batches": 2, "checkpoint_every": 2},
    }
    return parties(**settings | changes)


def resumed(run: Parties, folder: Path, step: int) -> Stages:
    """Return the run, killed after `step` and started again from files."""
    first, again = run.stages().train(run.pipeline, stop_after=step), run.stages()
    for name, one, other in (("bank", first.bases["bank"], again.bases["bank"]), ("fuse", first.fuse, again.fuse)):
        with Folder(folder / name, job_digest="a", party=name, fingerprint={}) as checkpoints:
            checkpoints.save(step, one.state(), run="run", generation=0, values={})
        with Folder(folder / name, job_digest="a", party=name, fingerprint={}) as checkpoints:
            other.load(checkpoints.load(step).state)
    return again.train(run.pipeline, first_step=step + 1)


@pytest.mark.parametrize("kind", [Counting, Bank, Thawing, Teacher])
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_resumed_from_files_goes_on_with_what_its_model_has_become(
    kind: type[nn.Module], staleness: int, tmp_path: Path
) -> None:
    run = setup(kind(), pipeline={"micro_batches": 2, "depth": 4, "staleness": staleness, "checkpoint_every": 2})
    quiet = run.stages().train(run.pipeline)
    again = resumed(run, tmp_path, 3)
    assert again.evaluations == quiet.evaluations[-len(again.evaluations) :]
    for name, module in again.modules().items():
        assert equal_weights(module, quiet.modules()[name]), name
    assert again.bases["bank"].state() == quiet.bases["bank"].state()


@pytest.mark.parametrize("kind", [Counting, Bank, Thawing, Teacher])
def test_split_equals_joined_for_a_model_that_changes_itself(kind: type[nn.Module]) -> None:
    run = setup(kind())
    split = run.stages().train(run.pipeline)
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(run.n_rows))
    assert equal_weights(split.modules()["bank"], joined.bases["bank"])
    assert equal_weights(split.modules()["fuse"], joined.fuse)


@pytest.mark.parametrize("kind", [Counting, Bank, Thawing, Teacher])
def test_a_trial_leaves_no_trace_and_a_state_goes_back_to_the_beginning(kind: type[nn.Module]) -> None:
    run = setup(kind())
    stage = run.stages().bases["bank"]
    fresh = stage.state()
    assert not set(fresh.values) & {"base/attributes", "base/buffers", "base/modes", "base/learning"}
    assert getattr(stage.module, "calls", 0) == 0
    found = run.stages()
    found.train(run.pipeline, stop_after=3)
    assert found.bases["bank"].state() != fresh
    found.bases["bank"].load(fresh)
    assert found.bases["bank"].state() == fresh


def test_a_model_that_changes_nothing_but_its_weights_adds_nothing_to_a_checkpoint() -> None:
    run = setup(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1)))
    found = run.stages().train(run.pipeline)
    state = found.bases["bank"].state()
    assert set(state.values) == {"updates"}
    assert {name.split("/")[1] for name in state.tensors} == {"module", "optimizer"}
    assert set(found.fuse.state().values) == {"updates"}


def test_values_are_carried_as_json_gives_them_back() -> None:
    run = setup(Counting())
    state = run.stages().train(run.pipeline, stop_after=1).bases["bank"].state()
    assert json.loads(json.dumps(dict(state.values))) == state.values
    assert state.values["base/attributes"]["calls"] == 4


def test_a_buffer_of_another_model_is_still_refused() -> None:
    class Sized(Linear):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(size))

    state = setup(Sized(3)).stages().bases["bank"].state()
    with pytest.raises(CheckpointError, match=r"another model than .*: table differ"):
        setup(Sized(4)).stages().bases["bank"].load(state)


# What cannot be trained or saved --------------------------------------------------------------------------------


class Late(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "head"):
            self.head = nn.Linear(4, 4)
        return self.head(super().forward(x))  # type: ignore[no-any-return]


class LateInTraining(Late):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else self.linear(x)


class Replacing(Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.linear.bias = nn.Parameter(self.linear.bias.detach() * 0.9)
        return super().forward(x)


class InAList(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [torch.ones(4, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scales[0]


class InAListOfModules(InAList):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [nn.Linear(4, 4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.scales[0](self.linear(x))  # type: ignore[no-any-return]


class Iterating(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.schedule = itertools.count()


class Scaled(Linear):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)


class Holding(Linear):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer("held", tensor)


REFUSED: dict[str, tuple[Any, str]] = {
    "a late layer": (Late, "makes the parameters 'head.weight', 'head.bias' in its forward, .* make it in __init"),
    "a parameter replaced": (Replacing, "makes the parameter 'linear.bias' in its forward.* in place"),
    "a tensor in a list": (InAList, "the tensor in its attribute 'scales' requires a gradient"),
    "a module in a list": (InAListOfModules, "the parameter '(weight|bias)' of the module in its attribute 'scales'"),
    "an iterator": (Iterating, "the attribute 'schedule' is a count, and nothing can save where it stands"),
    "complex128": (lambda: Holding(torch.ones(2, dtype=torch.complex128)), "buffer 'held' is complex128 .2,., of a dt"),
    "sparse": (lambda: Holding(torch.eye(3).to_sparse()), "buffer 'held' is float32 .3, 3., sparse_coo"),
    "expanded": (lambda: Scaled(torch.ones(1).expand(4)), "numbers of the parameter 'scale' share one place in memory"),
    "exported": (lambda: torch.export.export(Linear(), (torch.ones(2, 3),)).module(), "has no training mode .NotImpl"),
    "meta": (lambda: Holding(torch.ones(2, device="meta")), "buffer 'held' is float32 .2,., without numbers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_trained_or_saved_is_named_before_training(what: str) -> None:
    make, complaint = REFUSED[what]
    run = setup(make)
    with pytest.raises(JobError, match=rf"party 'bank': \[base\] model = .*{complaint}"):
        run.stages()


def test_a_layer_that_is_made_in_the_first_training_step_ends_it() -> None:
    run = setup(LateInTraining)
    with pytest.raises(JobError, match=r"makes the parameters 'head.weight'"):
        run.stages().train(run.pipeline)


def test_a_model_that_cannot_run_on_older_weights_is_refused_with_staleness() -> None:
    class Aliased(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.rows = [self.linear.weight]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.rows[0].T

    setup(Aliased).stages()
    ahead = {"micro_batches": 1, "depth": 2, "staleness": 1}
    with pytest.raises(JobError, match=r"uses 'linear.weight' in another way than by name.*set staleness = 0"):
        setup(Aliased, pipeline=ahead).stages()
    with warnings.catch_warnings(action="ignore"):
        scripted = torch.jit.trace(nn.Linear(3, 4), torch.ones(2, 3))
    with pytest.raises(JobError, match="does not run on other weights, as staleness needs"):
        setup(lambda: scripted, pipeline=ahead).stages()


@pytest.mark.parametrize("after", [False, True])
def test_hooks_on_gradients_are_refused_with_staleness(after: bool) -> None:
    """A forward that runs ahead has a copy of the weights, whose gradients no hook would see."""

    def no_gradient(parameter: Tensor) -> None:
        parameter.grad = None

    class Pruned(Linear):
        def __init__(self) -> None:
            super().__init__()
            weight = self.linear.weight
            if after:
                weight.register_post_accumulate_grad_hook(no_gradient)
            else:
                weight.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]

    run = setup(Pruned())
    begun, trained = run.stages(), run.stages().train(run.pipeline)
    weights = [dict(each.bases["bank"].module.named_parameters())["linear.weight"] for each in (begun, trained)]
    assert torch.equal(*weights)
    complaint = r"party 'bank': .*hooks on the gradients of 'linear.weight'.*set staleness = 0"
    with pytest.raises(JobError, match=complaint):
        setup(Pruned(), pipeline={"micro_batches": 1, "depth": 2, "staleness": 1}).stages()


def test_a_change_that_no_checkpoint_carries_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Caching(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.cache: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.cache = Clock()
            return super().forward(x)

    run = setup(Caching())
    with caplog.at_level(logging.WARNING, "sl_queue"):
        found = run.stages().train(run.pipeline)
        state = found.bases["bank"].state()
    assert caplog.text.count("changes its attribute 'cache', a Clock, which no checkpoint carries") == 1
    assert "base/attributes" not in state.values


def test_a_list_of_submodules_that_grows_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Growing(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList()

        def forward(self, x: Tensor) -> Tensor:
            self.layers.append(nn.Identity())
            return super().forward(x) * len(self.layers)

    with caplog.at_level(logging.WARNING, "sl_queue"):
        setup(Growing()).stages()
    assert "changes its attribute 'layers', a ModuleList, which no checkpoint carries" in caplog.text


CALLS: list[int] = []


def test_what_a_module_changes_beside_itself_is_said_at_the_trial(caplog: pytest.LogCaptureFixture) -> None:
    seen, steps = {"rows": 0}, 0

    class Sharing(Linear):
        calls, names = 0, ("x",)

        def forward(self, x: Tensor) -> Tensor:
            nonlocal steps
            Sharing.calls += 1
            steps += 1
            seen["rows"] += len(x)
            CALLS.append(len(x))
            return super().forward(x)

    with caplog.at_level(logging.WARNING, "sl_queue"):
        setup(Sharing()).stages()
    for path, kind in (("Sharing.calls", "int"), ("seen of ", "dict"), ("steps of ", "int"), (".CALLS", "list")):
        (line,) = [line for line in caplog.messages if path in line]
        assert f"({kind}), which is no part of it and in no checkpoint" in line
    assert "Sharing.names" not in caplog.text


def test_a_module_that_leaves_what_is_beside_it_alone_is_said_nothing_of(caplog: pytest.LogCaptureFixture) -> None:
    scale = [2.0]

    class Scaled(Linear):
        width = 3

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * scale[0] * self.width * len(PREFIX)

    run = setup(Scaled())
    with caplog.at_level(logging.WARNING, "sl_queue"):
        run.stages().train(run.pipeline).bases["bank"].state()
    assert "no part of it" not in caplog.text


PREFIX = "xy"


def test_what_is_large_beside_a_module_is_not_copied_in_each_commit() -> None:
    table, tables = np.zeros(2**20), [np.zeros(3)]

    class Looking(Linear):
        rows, parts = list(range(2000)), {"a": [1]}

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + float(table[0]) + float(tables[0][0])

    found = SharedValues.of(Looking())
    assert not {name for name in found.before if name.startswith(("table", "Looking."))}


def test_the_dtypes_that_can_be_saved_are_those_of_the_files() -> None:
    assert set(SAVABLE) == set(tensor_file._DTYPES.values())

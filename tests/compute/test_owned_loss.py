"""A loss that is an object belongs to the label holder: its mode, buffers and counters, and what of it is saved."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn

import sl_queue
from sl_queue.errors import JobError
from tests.compute.test_module_state import resumed
from tests.support.resolved import train_joined
from tests.support.split import Concatenated, Parties, equal_weights, parties

ROWS = 20


def bce(output: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output.flatten(), labels.to(output.dtype).flatten())


class Ema(nn.Module):
    """Divides by a running mean of itself, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.register_buffer("weight", torch.ones(3))
        self.calls, self.modes = 0, set[bool]()

    def forward(self, output: Tensor, labels: Tensor) -> Tensor:
        value = bce(output, labels)
        self.modes.add(self.training)
        if self.training:
            self.mean = self.mean * 0.9 + 0.1 * value.detach()
            self.calls += 1
        return value / self.mean * (1 + 0.01 * self.calls)


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return bce(output, labels) * (1 + 0.1 * self.calls)


def setup(loss: Any, fuse: nn.Module | None = None, **changes: Any) -> Parties:
    draw = np.random.default_rng(5)
    settings: dict[str, Any] = {"batch_size": 4, "holdout": 0.2, "pipeline": {"micro_batches": 2}}
    return parties(
        {"bank": nn.Linear(3, 4)},
        fuse or Concatenated(4, 1),
        {"bank": draw.normal(size=(ROWS, 3)).astype(np.float32)},
        draw.integers(0, 2, ROWS),
        cuts={"bank": [4]},
        loss=loss,
        **settings | changes,
    )


LOSSES: dict[str, Callable[[], Any]] = {"a module": Ema, "an object": Counter, "a method of one": lambda: Ema().forward}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_with_state_is_resumed_and_equals_joined_training(kind: str, tmp_path: Path) -> None:
    run = setup(LOSSES[kind]())
    quiet = run.stages().train(run.pipeline)
    again = resumed(run, tmp_path, 3)
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(run.n_rows))
    for name, module in quiet.modules().items():
        assert equal_weights(module, again.modules()[name]), name
    assert equal_weights(quiet.modules()["fuse"], joined.fuse)
    assert [line["holdout"] for line in joined.history] == quiet.evaluations
    assert again.fuse.state() == quiet.fuse.state()
    assert "loss/attributes" in quiet.fuse.state().values
    assert not any("weight" in name for name in quiet.fuse.state().tensors if name.startswith("loss/"))


@pytest.mark.parametrize("kind", LOSSES)
def test_two_runs_with_one_loss_are_equal_and_give_it_back(kind: str) -> None:
    loss = LOSSES[kind]()
    run = setup(loss)
    files = [file.model_copy(update={"threads": 1}) for file in run.files.values()]
    first, second = sl_queue.run_local(run.job, files), sl_queue.run_local(run.job, files)
    assert first.history[-1]["loss"] == second.history[-1]["loss"]
    assert equal_weights(first.fuse, second.fuse)
    assert getattr(loss, "__self__", loss).calls == 0


def test_held_out_rows_go_through_a_loss_in_evaluation_mode() -> None:
    run = setup(Ema())
    found = run.stages()
    loss: Any = found.fuse.objective.loss.loss
    loss.modes.clear()
    found.train(run.pipeline)
    assert loss.modes == {True, False}
    assert loss.training
    assert loss.calls == 2 * found.fuse.batches.steps, "the trial is undone"


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, output: Tensor, labels: Tensor, factor: float = 1.0) -> Tensor:
        return bce(output, labels) * torch.exp(-self.scale) * factor + self.scale


def closing_over(scale: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, labels: bce(output, labels) * scale


LEARNING: dict[str, Callable[[], Any]] = {
    "a module": Weighted,
    "a method": lambda: Weighted().forward,
    "a partial": lambda: partial(Weighted(), factor=2.0),
    "a variable": lambda: closing_over(torch.ones((), requires_grad=True)),
}


@pytest.mark.parametrize("kind", LEARNING)
def test_a_loss_with_parameters_is_refused_with_the_remedy(kind: str) -> None:
    run = setup(LEARNING[kind]())
    with pytest.raises(JobError, match=r"party 'holder': the loss .* nothing trains.*to the fuse model"):
        run.stages()


def test_a_loss_whose_parameters_are_frozen_or_the_fuse_models_own_is_trained_with() -> None:
    frozen = Weighted()
    frozen.requires_grad_(False)
    run = setup(frozen)
    state = run.stages().train(run.pipeline).fuse.state()
    assert not any(name.startswith("loss/") for name in (*state.tensors, *state.values))

    class Fuse(Concatenated):
        def __init__(self) -> None:
            super().__init__(4, 1)
            self.scale = nn.Parameter(torch.zeros(()))

        def loss(self, output: Tensor, labels: Tensor) -> Tensor:
            return bce(output, labels) * torch.exp(-self.scale) + self.scale

    fuse = Fuse()
    run = setup(fuse.loss, fuse, rules=1)  # held out by position: these tables have no ids
    files = [file.model_copy(update={"threads": 1}) for file in run.files.values()]
    result: Any = sl_queue.run_local(run.job, files)
    joined: Any = train_joined(run.job, files, run.tables, run.job.batches(run.n_rows))
    assert result.fuse.scale.item() != 0.0 == fuse.scale.item()
    assert equal_weights(result.fuse, joined.fuse)

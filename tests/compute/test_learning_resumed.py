"""Whatever an optimizer, a schedule or an average has learned is in the checkpoint, and in the fingerprint."""

import itertools
from typing import Any

import pytest
import torch

from sl_queue.errors import CheckpointError
from sl_queue.protocol.fingerprints import differences
from tests.support.learning import (
    OPTIMIZERS,
    SCHEDULES,
    STEPS,
    parts,
    plain,
    require_equal,
    run_of,
    through_a_checkpoint,
    weights,
)
from tests.support.resolved import fingerprint


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("number", range(len(OPTIMIZERS)), ids=OPTIMIZERS)
def test_resumed_at_any_step_equals_undisturbed(number: int, staleness: int) -> None:
    """Each optimizer, with one schedule after the other: of these it gets nothing but a rate, by the step's number."""
    name, options = list(OPTIMIZERS.items())[number]
    schedule = list(SCHEDULES.values())[(number + staleness) % len(SCHEDULES)]
    run = run_of(staleness, optimizer={"name": name, **options}, schedule=schedule, ema=0.9, clip_norm=0.5)
    whole = weights(run.stages().train(run.pipeline))
    step = number % (STEPS - 1)
    begun = run.stages().train(run.pipeline, stop_after=step)
    assert weights(through_a_checkpoint(begun, run).train(run.pipeline, first_step=step + 1)) == whole


def test_resumed_at_every_step_equals_undisturbed() -> None:
    run = run_of(optimizer={"name": "adamw", "lr": 0.01}, schedule={"name": "one_cycle"}, ema=0.9, clip_norm=0.1)
    whole = weights(run.stages().train(run.pipeline))
    for step in range(STEPS - 1):
        begun = run.stages().train(run.pipeline, stop_after=step)
        assert weights(through_a_checkpoint(begun, run).train(run.pipeline, first_step=step + 1)) == whole


class Adaptive(torch.optim.Optimizer):
    """An optimizer that keeps what it learns in its groups, in attributes, and in lists of tensors."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05, "drift": (0, 1.0)})
        self.calls = 0
        self.norms: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            count, drift = group["drift"]
            group["drift"] = (count + 1, drift * 0.9)
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                history = state.setdefault("history", [])
                history.append(p.grad.clone())
                del history[:-2]
                state["calls"] = self.calls
                self.norms = [*self.norms[-3:], float(p.grad.norm())]
                p.sub_(sum(history) * group["lr"] * group["drift"][1] * self.calls**0.5 / (1 + self.norms[0]))


def test_what_an_optimizer_keeps_in_groups_lists_and_attributes_is_in_the_checkpoint() -> None:
    run = run_of(optimizer=lambda module: Adaptive(module.parameters()))
    whole = weights(run.stages().train(run.pipeline))
    for step in range(STEPS - 1):
        begun = run.stages().train(run.pipeline, stop_after=step)
        resumed = through_a_checkpoint(begun, run)
        optimizer: Any = resumed.fuse.model.optimizer
        assert optimizer.calls == step + 1
        assert type(optimizer.param_groups[0]["drift"]) is tuple
        assert weights(resumed.train(run.pipeline, first_step=step + 1)) == whole


class Accumulating(torch.optim.SGD):
    """Changes the weights in every other step, by the gradients of two."""

    calls = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        if self.calls % 2 == 0:
            super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % 2 == 0:
            super().zero_grad(set_to_none)


def test_gradients_that_an_optimizer_does_not_forget_are_in_the_checkpoint() -> None:
    def make(module: torch.nn.Module) -> torch.optim.Optimizer:
        return Accumulating(module.parameters(), lr=0.1)

    run = run_of(optimizer=make)
    whole = run.stages().train(run.pipeline)
    require_equal(whole, plain(run, make))
    for step in range(STEPS - 1):
        begun = run.stages().train(run.pipeline, stop_after=step)
        resumed = through_a_checkpoint(begun, run).train(run.pipeline, first_step=step + 1)
        assert weights(resumed) == weights(whole)


@pytest.mark.parametrize("kept", [True, False])
def test_a_scheduler_in_a_hook_is_resumed_as_an_attribute_and_warned_of_elsewhere(
    kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def make(module: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        optimizer.register_step_post_hook(lambda *about: scheduler.step())
        if kept:
            optimizer.scheduler = scheduler  # type: ignore[attr-defined]
        return optimizer

    run = run_of(optimizer=make)
    whole = weights(run.stages().train(run.pipeline))
    begun = run.stages().train(run.pipeline, stop_after=2)
    resumed = weights(through_a_checkpoint(begun, run).train(run.pipeline, first_step=3))
    assert (resumed == whole) is kept
    assert ("a hook of the optimizer uses a StepLR" in caplog.text) is not kept


def test_going_back_to_an_earlier_checkpoint_forgets_what_came_later() -> None:
    run = run_of(optimizer=lambda module: Adaptive(module.parameters()), ema=0.9)
    stages = run.stages().train(run.pipeline, stop_after=1)
    saved = {name: stage.state() for name, stage in parts(stages).items()}
    whole = weights(stages.train(run.pipeline, first_step=2))
    for name, stage in parts(stages).items():
        stage.load(saved[name])
    assert weights(stages.train(run.pipeline, first_step=2)) == whole


def test_a_checkpoint_of_a_version_that_saved_no_groups_is_resumed() -> None:
    run = run_of(optimizer={"name": "adam", "lr": 0.01})
    state = run.stages().train(run.pipeline, stop_after=2).fuse.state()
    assert not [name for name in (*state.tensors, *state.values) if ".more" in name or "average" in name]
    names = {name.split("/")[1] for name in state.tensors}
    assert names == {"module", "optimizer"}


def test_a_checkpoint_without_the_average_is_refused_where_one_is_asked_for() -> None:
    state = run_of().stages().fuse.state()
    with pytest.raises(CheckpointError, match=r"no average of the weights \(fuse/average\)"):
        run_of(ema=0.9).stages().fuse.load(state)


def test_another_way_of_learning_is_another_fingerprint() -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"schedule": {"name": "linear"}},
        {"schedule": {"name": "linear", "warmup": 3}},
        {"schedule": lambda step, steps: 1.0},
        {"groups": [{"match": "head.*", "lr": 1.0}]},
        {"clip_norm": 1.0},
        {"clip_value": 1.0},
        {"ema": 0.9},
        {"optimizer": lambda module: torch.optim.SGD(module.parameters(), lr=0.1)},
    ]
    prints = []
    for way in ways:
        run = run_of(**way)
        prints.append(fingerprint(run.job, run.files["a"]))
    for one, other in itertools.permutations(prints, 2):
        assert differences(one, other)
    assert differences(prints[0], prints[0]) == []
    plainly = fingerprint(run_of().job, run_of().files["a"])
    assert not [key for key in plainly if key.startswith(("base.groups", "base.schedule", "base.clip", "base.ema"))]

"""Schedules of the rate: those of PyTorch, for a job of any length."""

from typing import Any

import pytest
import torch
from torch import nn

from sl_queue.protocol.rates import Schedule
from tests.support.learning import ROWS, STEPS, run_of
from tests.support.resolved import fuse_stage


def rates(settings: dict[str, Any], steps: int, base: float = 0.1) -> list[float]:
    return [Schedule.of(settings).rate(base, step, steps) for step in range(steps)]


def of_torch(steps: int, make: Any, base: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("steps", [10, 97])
def test_schedules_are_those_of_torch(steps: int) -> None:
    lr = torch.optim.lr_scheduler
    assert rates({"name": "cosine", "min_lr": 0.01}, steps) == pytest.approx(
        of_torch(steps, lambda o: lr.CosineAnnealingLR(o, steps, eta_min=0.01))
    )
    assert rates({"name": "step", "every": 3, "gamma": 0.5}, steps) == pytest.approx(
        of_torch(steps, lambda o: lr.StepLR(o, 3, gamma=0.5))
    )
    assert rates({"name": "exponential", "gamma": 0.9}, steps) == pytest.approx(
        of_torch(steps, lambda o: lr.ExponentialLR(o, 0.9))
    )
    assert rates({"name": "linear"}, steps) == pytest.approx(
        of_torch(steps, lambda o: lr.LambdaLR(o, lambda step: 1 - step / steps))
    )
    found = of_torch(steps - 1, lambda o: lr.OneCycleLR(o, 0.1, steps, cycle_momentum=False))
    assert [Schedule.of({"name": "one_cycle"}).rate(0.1, step, steps) for step in range(steps - 1)] == found


def test_a_warm_up_goes_up_in_a_line_and_the_rest_begins_after_it() -> None:
    found = rates({"name": "cosine", "warmup": 4}, 12, base=1.0)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[8] == pytest.approx(0.5)
    assert rates({"name": "constant", "warmup": 2}, 4, base=1.0) == [0.5, 1.0, 1.0, 1.0]
    assert rates({"name": "linear", "warmup": 9}, 3, base=9.0) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step", "exponential", "one_cycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 1_000_000])
def test_no_length_of_a_job_makes_a_rate_that_is_none(name: str, steps: int) -> None:
    needed = {"step": {"every": 2}, "exponential": {"gamma": 0.999}}.get(name, {})
    schedule = Schedule.of({"name": name, **needed})
    for step in {0, steps // 2, steps - 1}:
        assert 0 <= schedule.rate(0.1, step, steps) <= 0.1 + 1e-12


def test_the_stage_is_built_with_the_steps_of_the_whole_job() -> None:
    run = run_of(schedule={"name": "linear"})
    stage = fuse_stage(run.job, run.files["holder"], run.tables["holder"], run.job.batches(ROWS))
    assert stage.model.learning is not None
    assert stage.model.learning.steps == STEPS

"""Pairs of optimizer, schedule and window, resumed. The whole product is `python -m tests.support.recipes`."""

import itertools

import pytest
import torch

from tests.support.recipes import OPTIMIZERS, SCHEDULES, STALENESS, STEPS, differing

PAIRS = [  # each optimizer with each schedule, in turns with and without running ahead
    (optimizer, schedule, STALENESS[(row + column) % 2])
    for (row, optimizer), (column, schedule) in itertools.product(enumerate(OPTIMIZERS), enumerate(SCHEDULES))
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_equals_undisturbed(optimizer: str) -> None:
    for number, (name, schedule, staleness) in enumerate(PAIRS):
        if name == optimizer:
            step = number % (STEPS - 1)
            assert differing(optimizer, schedule, staleness, range(step, step + 1)) == [], (schedule, staleness)


def test_all_of_torchs_optimizers_are_there_but_the_one_that_needs_a_closure() -> None:
    known = {
        name.lower()
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert known - {"lbfgs"} <= set(OPTIMIZERS)
    assert {(o, w) for o, _, w in PAIRS} == set(itertools.product(OPTIMIZERS, STALENESS))
    assert {(s, w) for _, s, w in PAIRS} == set(itertools.product(SCHEDULES, STALENESS))

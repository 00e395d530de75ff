"""Killed equals undisturbed, at every single operation: each role crashes before and after each thing it does."""

from concurrent.futures import Executor

import pytest

from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.state import EarlyStopping
from tests.support.toy_run import AtLast, AtOnce, CrashAt, ToyRun

VARIANTS = {
    "lock-step": {"micro_batches": 1, "depth": 1},
    "gpipe": {"micro_batches": 2, "depth": 2},
    "run-ahead": {"micro_batches": 1, "depth": 2, "staleness": 1},
    "early-stopping": {"epochs": 6, "early_stopping": EarlyStopping("loss", 1, 0.0, lower_is_better=True)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("victim", "committer"), [("a", AtOnce), ("a", AtLast), ("label", AtOnce), ("label", AtLast), (SCHEDULER, AtOnce)]
)
def test_a_crash_at_any_operation_of_any_role_changes_no_weight_and_nobody_else_repeats_a_step(
    victim: str, committer: type[Executor], variant: str
) -> None:
    settings = VARIANTS[variant] | {"committer": committer}
    quiet = ToyRun(**settings, crashes={victim: CrashAt()}).run()
    operations = quiet.crashes[victim].count
    assert operations > 20
    crashed = 0
    for operation in range(operations):
        crash = CrashAt(operation)
        run = ToyRun(**settings, crashes={victim: crash}).run()
        crashed += crash.count > operation  # how many reports the scheduler takes at once differs from run to run
        where = f"{victim} at operation {operation}, {crash.seen[operation:][:1]}"
        assert run.weights() == quiet.weights(), where
        assert [(e.epoch, e.loss, e.holdout) for e in run.state.history] == [
            (e.epoch, e.loss, e.holdout) for e in quiet.state.history
        ], where
        assert run.state.generation == 0, f"{where}: somebody was rolled back"
        assert run.broker.dead_letters == [], f"{where}: what an honest peer sent was refused"
        for party in {"a", "b", "label"} - {victim}:
            (stage,) = run.stages[party]
            assert len(stage.applied) == len(set(stage.applied)), f"{where}: {party} repeated a micro-batch"
    if victim == SCHEDULER:  # the busier the machine, the more statuses the quiet one told, which are operations too
        assert crashed > operations / 2
    else:
        assert crashed > 0.8 * operations


@pytest.mark.parametrize("committer", [AtOnce, AtLast])
def test_three_roles_that_crash_in_one_run_change_no_weight(committer: type[Executor]) -> None:
    quiet = ToyRun().run()
    for first in range(0, 100, 7):
        operations = {"a": first, "b": first // 2 + 3, "label": first + 11, SCHEDULER: first // 3}
        crashes = {role: CrashAt(operation) for role, operation in operations.items()}
        run = ToyRun(crashes=crashes, committer=committer).run()
        assert run.weights() == quiet.weights(), crashes
        assert run.broker.dead_letters == [], crashes

"""The second and the third line of recovery: what the broker lost is sent again, or everyone goes back together."""

import pytest

from sl_queue.transport.memory import MemoryBroker
from tests.support.toy_run import CrashAt, ToyRun


def lossy(victim: str, operation: int, *, survives: bool) -> ToyRun:
    broker = MemoryBroker()
    crash = CrashAt(operation, act=broker.crash, survives=survives)
    return ToyRun(broker=broker, crashes={victim: crash})


@pytest.mark.parametrize("victim", ["a", "label"])
def test_a_broker_that_loses_everything_at_any_moment_rolls_nobody_back(victim: str) -> None:
    quiet = ToyRun(crashes={victim: CrashAt()}).run()
    for operation in range(0, quiet.crashes[victim].count, 3):
        run = lossy(victim, operation, survives=True).run()
        assert run.weights() == quiet.weights(), operation
        assert run.state.generation == 0, f"operation {operation}: somebody was rolled back"
        assert run.broker.dead_letters == [], f"operation {operation}: what an honest peer sent was refused"
        for stages in run.stages.values():
            (stage,) = stages
            assert len(stage.applied) == len(set(stage.applied)), f"operation {operation}: a micro-batch was repeated"


@pytest.mark.parametrize("victim", ["a", "label"])
def test_a_broker_and_a_worker_lost_together_change_no_weight(victim: str) -> None:
    quiet = ToyRun(crashes={victim: CrashAt()}).run()
    for operation in range(1, quiet.crashes[victim].count, 3):
        run = lossy(victim, operation, survives=False).run()
        assert run.weights() == quiet.weights(), operation
        assert run.broker.dead_letters == [], operation


def test_when_nobody_has_a_message_any_more_everyone_goes_back_to_the_newest_common_checkpoint() -> None:
    quiet = ToyRun(epochs=3).run()
    broker = MemoryBroker()
    run = ToyRun(epochs=3, broker=broker)

    def lose_checkpoints() -> None:
        """As if the newest two checkpoints of party a were torn: what it needs has long been acknowledged."""
        for step in sorted(run.stores["a"].saved)[-2:]:
            del run.stores["a"].saved[step]

    run.crashes = {"a": CrashAt(100, act=lose_checkpoints)}
    run.run()
    assert run.weights() == quiet.weights()
    assert run.state.generation >= 1
    assert [e.loss for e in run.state.history] == [e.loss for e in quiet.state.history]


def test_a_party_that_lost_its_disk_makes_everyone_begin_anew_and_end_equal() -> None:
    quiet = ToyRun(epochs=3).run()
    run = ToyRun(epochs=3)
    run.crashes = {"b": CrashAt(90, act=lambda: run.stores["b"].saved.clear())}
    run.run()
    assert run.weights() == quiet.weights()
    assert run.state.bases[-1] == -1

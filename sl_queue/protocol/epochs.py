"""Which epoch may begin, which one was the best, and when a run is at its end.

The law of early stopping: an undefined metric (None, NaN) is not a worse one. Only epochs that define the metric can be
the best, and only they count against patience. If no epoch defines it, the run trains to its last epoch, whose weights
are final.
"""

from sl_queue.protocol.messages import EpochResult, Open
from sl_queue.protocol.run_state import EarlyStopping, Plan, RunState


def best_epoch(plan: Plan, history: tuple[EpochResult, ...]) -> int | None:
    """Return the epoch whose weights early stopping restores; None without early stopping, or if none is defined."""
    return _best_and_patience(plan, history)[0]


def _best_and_patience(plan: Plan, history: tuple[EpochResult, ...]) -> tuple[int | None, int]:
    """Return the best epoch, and the number of epochs since then that define the metric."""
    rule = plan.early_stopping
    if rule is None:
        return None, 0
    best: int | None = None
    best_value, since = 0.0, 0
    for result in history:
        value = _measured(rule, result)
        if value is None:
            continue
        gain = best_value - value if rule.lower_is_better else value - best_value
        if best is None or gain > rule.min_delta:
            best, best_value, since = result.epoch, value, 0
        else:
            since += 1
    return best, since


def _measured(rule: EarlyStopping, result: EpochResult) -> float | None:
    value = (result.holdout or {}).get(rule.metric)
    return None if value is None or value != value else value


def last_epoch(plan: Plan, history: tuple[EpochResult, ...]) -> int | None:
    """Return the epoch after which the run ends, once that is known."""
    _, since = _best_and_patience(plan, history)
    stops = plan.early_stopping is not None and since >= plan.early_stopping.patience
    return len(history) - 1 if stops or len(history) >= plan.epochs else None


def opening(plan: Plan, state: RunState, incarnation: str) -> Open:
    """Without early stopping an epoch is opened while the one before is trained, so that nobody waits."""
    last = last_epoch(plan, state.history)
    ahead = 0 if plan.early_stopping is not None else 1
    through = last if last is not None else min(len(state.history) + ahead, plan.epochs - 1)
    best = best_epoch(plan, state.history)
    return Open(incarnation, through, None if best is None else state.history[best].step)


def final_step(plan: Plan, state: RunState) -> int | None:
    """The step whose weights are final, once the last epoch is done."""
    last = last_epoch(plan, state.history)
    if last is None:
        return None
    best = best_epoch(plan, state.history)
    return state.history[last if best is None else best].step


def all_committed(plan: Plan, state: RunState) -> bool:
    """Whether every party has the last trained step on disk: only then nobody can need anything of anybody."""
    last = state.history[-1].step
    members = [state.members[p] for p in plan.parties]
    return all(m.finished is not None or m.committed >= last for m in members)

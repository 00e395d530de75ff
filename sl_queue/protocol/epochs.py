"""Which epoch may begin, which one was the best, and when a run is at its end."""

from sl_queue.protocol.messages import EpochResult, Open
from sl_queue.protocol.run_state import EarlyStopping, Plan, RunState


def best_epoch(plan: Plan, history: tuple[EpochResult, ...]) -> int | None:
    """The epoch whose weights early stopping restores; None without early stopping."""
    if plan.early_stopping is None or not history:
        return None
    best = 0
    for result in history[1:]:
        if _improves(plan.early_stopping, result, history[best]):
            best = result.epoch
    return best


def _improves(rule: EarlyStopping, result: EpochResult, best: EpochResult) -> bool:
    new, old = (_measured(rule, r) for r in (result, best))
    if new is None or old is None:
        return new is not None
    gain = old - new if rule.lower_is_better else new - old
    return gain > rule.min_delta


def _measured(rule: EarlyStopping, result: EpochResult) -> float | None:
    value = (result.holdout or {}).get(rule.metric)
    return None if value is None or value != value else value


def last_epoch(plan: Plan, history: tuple[EpochResult, ...]) -> int | None:
    """The epoch after which the run ends, once that is known."""
    best = best_epoch(plan, history)
    if best is not None and plan.early_stopping is not None and len(history) - 1 - best >= plan.early_stopping.patience:
        return len(history) - 1
    return len(history) - 1 if len(history) >= plan.epochs else None


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

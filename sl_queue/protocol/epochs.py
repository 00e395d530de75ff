"""Which epoch may begin, which one was the best, and when a run is at its end.

The law of early stopping: only an epoch whose metric is defined counts. One that is not (a metric that the held-out
rows do not define, NaN) is neither the best nor one without a gain; if no epoch is defined, the run goes to its last
epoch and keeps the weights of that.
"""

from collections.abc import Iterable
from dataclasses import replace

from sl_queue.protocol.messages import EpochResult, Open
from sl_queue.protocol.run_state import EarlyStopping, Plan, RunState, Standing


def standing_after(rule: EarlyStopping | None, standing: Standing, result: EpochResult) -> Standing:
    """Return where early stopping is after one more epoch."""
    value = None if rule is None else _measured(rule, result)
    if rule is None or value is None:
        return standing
    best = None if standing.best is None else _measured(rule, standing.best)
    if best is not None:
        gain = best - value if rule.lower_is_better else value - best
        if not gain > rule.min_delta:
            return replace(standing, without_gain=standing.without_gain + 1)
    return Standing(result)


def standing_of(plan: Plan, history: Iterable[EpochResult]) -> Standing:
    """Return where early stopping is after all of these epochs."""
    standing = Standing()
    if plan.early_stopping is not None:
        for result in history:
            standing = standing_after(plan.early_stopping, standing, result)
    return standing


def _measured(rule: EarlyStopping, result: EpochResult) -> float | None:
    value = (result.holdout or {}).get(rule.metric)
    return None if value is None or value != value else value


def best_epoch(plan: Plan, state: RunState) -> EpochResult | None:
    """The epoch whose weights early stopping restores; None without early stopping, or if none was defined."""
    return state.standing.best if plan.early_stopping is not None else None


def last_epoch(plan: Plan, state: RunState) -> int | None:
    """The epoch after which the run ends, once that is known."""
    done = len(state.history)
    rule = plan.early_stopping
    at_its_end = done >= plan.epochs or (rule is not None and state.standing.without_gain >= rule.patience)
    return done - 1 if done and at_its_end else None


def opening(plan: Plan, state: RunState, incarnation: str) -> Open:
    """Without early stopping an epoch is opened while the one before is trained, so that nobody waits."""
    last, known = last_epoch(plan, state), len(state.history)
    ahead = 0 if plan.early_stopping is not None else 1
    through = last if last is not None else min(known + ahead, plan.epochs - 1)
    best = best_epoch(plan, state)
    return Open(incarnation, through, None if best is None else best.step, known)


def final_step(plan: Plan, state: RunState) -> int | None:
    """The step whose weights are final, once the last epoch is done."""
    last = last_epoch(plan, state)
    if last is None:
        return None
    return (best_epoch(plan, state) or state.history[last]).step


def all_committed(plan: Plan, state: RunState) -> bool:
    """Whether every party has the last trained step on disk: only then nobody can need anything of anybody."""
    last = state.history[-1].step
    members = [state.members[p] for p in plan.parties]
    return all(m.finished is not None or m.committed >= last for m in members)

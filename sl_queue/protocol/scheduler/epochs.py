"""The epochs of a run: what was measured, which may begin, which was the best, and when a run is at its end.

The law of early stopping: only an epoch whose metric is defined counts. One that is not (a metric that the held-out
rows do not define, NaN) is neither the best nor one without a gain; if no epoch is defined, the run goes to its last
epoch and keeps the weights of that.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

from sl_queue.protocol.control import EpochResult, Finish, Open
from sl_queue.protocol.scheduler.state import Addressed, EarlyStopping, Plan, RunState, Standing, incarnations
from sl_queue.protocol.text import LONGEST_NAME, printable

MAX_METRICS = 100  # of one epoch
MAX_TABLES, MAX_ROWS = 5, 50  # of one epoch, and of one table; as many columns


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
    if rule.metric == "train_loss":
        value: float | None = result.loss
    elif rule.metric.startswith("train_"):
        value = (result.train or {}).get(rule.metric.removeprefix("train_"))
    else:
        value = (result.holdout or {}).get(rule.metric)
    return None if value is None or value != value else value


def best_epoch(plan: Plan, state: RunState) -> EpochResult | None:
    """Return the epoch whose weights early stopping restores; None without early stopping, or if none is defined."""
    return state.standing.best if plan.early_stopping is not None else None


def last_epoch(plan: Plan, state: RunState) -> int | None:
    """Return the epoch after which the run ends, once that is known."""
    done = len(state.history)
    rule = plan.early_stopping
    at_its_end = done >= plan.epochs or (rule is not None and state.standing.without_gain >= rule.patience)
    return done - 1 if done and at_its_end else None


def opening(plan: Plan, state: RunState, incarnation: str) -> Open:
    """Open the epochs that may be trained: without early stopping one ahead, so that nobody waits."""
    last, known = last_epoch(plan, state), len(state.history)
    ahead = 0 if plan.early_stopping is not None else 1
    through = last if last is not None else min(known + ahead, plan.epochs - 1)
    best = best_epoch(plan, state)
    return Open(incarnation, through, None if best is None else best.step, known)


def final_step(plan: Plan, state: RunState) -> int | None:
    """Return the step whose weights are final, once the last epoch is done."""
    last = last_epoch(plan, state)
    if last is None:
        return None
    return (best_epoch(plan, state) or state.history[last]).step


def all_committed(plan: Plan, state: RunState) -> bool:
    """Return True if every party has the last trained step on disk: only then nobody needs anything of anybody."""
    last = state.history[-1].step
    members = [state.members[p] for p in plan.parties]
    return all(m.finished is not None or m.committed >= last for m in members)


def recorded(plan: Plan, state: RunState, results: tuple[EpochResult, ...], now: float) -> tuple[RunState, Addressed]:
    """Append what is new to the history, and open what may follow.

    Where epochs are missing in between, the label holder hears again how many are known, and answers with those.
    """
    known = len(state.history)
    new = [r for r in results if r.epoch >= known]
    if new and new[0].epoch > known:
        return state, tuple(
            (p, opening(plan, state, i)) for p, i in incarnations(plan, state) if p == plan.label_holder
        )
    if not new or [r.epoch for r in new] != list(range(known, known + len(new))):
        return state, ()
    passed = 0.0 if state.epoch_began is None or len(new) > 1 else round(now - state.epoch_began, 3)
    history, standing = state.history, state.standing
    for result in new:
        history = history.after(
            replace(result, seconds=result.seconds or passed, **_bounded(result), leak=_leak(plan, result))
        )
        standing = standing_after(plan.early_stopping, standing, history[-1])
    state = replace(state, history=history, standing=standing, epoch_began=now)
    opened = tuple((p, opening(plan, state, i)) for p, i in incarnations(plan, state))
    return state, (*opened, *finishing(plan, state))


def _bounded(result: EpochResult) -> dict[str, Any]:
    """Take of a peer's measurements no more than a history can hold."""
    tables = result.tables
    if tables is not None and (len(tables) > MAX_TABLES or any(_is_large(rows) for rows in tables.values())):
        tables = None
    if tables is not None:
        tables = {printable(name, LONGEST_NAME): rows for name, rows in tables.items()}
    return {"holdout": _named(result.holdout), "train": _named(result.train), "tables": tables}


def _is_large(rows: list[list[float]]) -> bool:
    return len(rows) > MAX_ROWS or any(len(row) > MAX_ROWS for row in rows)


def _named(found: Mapping[str, float | None] | None) -> dict[str, float | None] | None:
    """Give metrics names that a log and a terminal can show."""
    if found is None:
        return None
    return {printable(name, LONGEST_NAME): value for name, value in list(found.items())[:MAX_METRICS]}


def _leak(plan: Plan, result: EpochResult) -> dict[str, dict[str, float]] | None:
    """Keep what a meter says of this run's parties, in numbers, under names that a log and a terminal can show."""
    if result.leak is None:
        return None
    return {party: _shown(found) for party, found in result.leak.items() if party in plan.feature_parties}


def _shown(numbers: Mapping[str, float]) -> dict[str, float]:
    found = list(numbers.items())[:MAX_METRICS]
    return {printable(name, LONGEST_NAME): value for name, value in found if isfinite(value)}


def finishing(plan: Plan, state: RunState) -> Addressed:
    """Order the end, once everyone has committed the last step."""
    step = final_step(plan, state)
    if step is None or not all_committed(plan, state):
        return ()
    return tuple((p, Finish(i, step)) for p, i in incarnations(plan, state))

"""A scheduler's reducer in the tests: its plan, what parties report, and a mind that hears it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeVar

from sl_queue.protocol.control import (
    Command,
    EpochResult,
    Finish,
    Join,
    Open,
    Report,
    Start,
    Stop,
)
from sl_queue.protocol.scheduler.reducer import reduce, standing_orders
from sl_queue.protocol.scheduler.state import (
    EarlyStopping,
    Plan,
    RunState,
    durable,
    restarted,
)

JOB: dict[str, Any] = {"name": "toy", "epochs": 4, "pipeline": {"depth": 2, "staleness": 0}}
PARTIES = ("a", "b", "label")
C = TypeVar("C", Start, Open, Finish, Stop)
STEPS = 2  # per epoch; every epoch ends with a commit


def plan(epochs: int = 4, early: EarlyStopping | None = None) -> Plan:
    return Plan(JOB, "label", ("a", "b"), epochs, patience_s=1.0, early_stopping=early)


def joined(incarnation: str, held: tuple[int, ...] = (), **changes: Any) -> Join:
    values: dict[str, Any] = {
        "job": JOB,
        "n_rows": 10,
        "rows_digest": "d",
        "id_type": "integer",
        "run": None,
        "generation": 0,
    }
    return Join(incarnation, held=held, **(values | ({"run": "r"} if held else {}) | changes))


def epoch(number: int, loss: float | None = 0.5, step: int | None = None) -> EpochResult:
    return EpochResult(number, STEPS * (number + 1) - 1 if step is None else step, 0.1, {"loss": loss})


@dataclass(slots=True)
class Mind:
    """A scheduler's state, and what it ordered last."""

    plan: Plan = field(default_factory=plan)
    state: RunState = field(default_factory=RunState)
    orders: tuple[tuple[str, Command], ...] = ()

    def hear(self, sender: str, *reports: Report, now: float = 0.0) -> "Mind":
        self.orders = ()
        for report in reports:
            self.state, orders = reduce(self.plan, self.state, sender, report, now, "r")
            self.orders += orders
        return self

    def everyone_joins(self, **changes: Any) -> "Mind":
        for party in PARTIES:
            self.hear(party, joined(f"{party}1", **changes))
        return self

    def ordered(self, kind: type[C]) -> dict[str, C]:
        return {party: order for party, order in self.orders if isinstance(order, kind)}

    def restart(self) -> "Mind":
        self.state = restarted(durable(self.state), 0.0)
        self.orders = standing_orders(self.plan, self.state)
        return self


def decide(rule: EarlyStopping, values: Sequence[float | None]) -> tuple[int, int]:
    """Written down again: (epochs trained, the epoch whose weights are final) of a run that measures `values`."""
    best: int | None = None
    without_gain = 0
    for number, value in enumerate(values):
        if value is None or value != value:  # undefined: neither a gain nor an epoch without one
            continue
        old = inf if best is None else values[best]
        assert old is not None
        gain = inf if best is None else (old - value if rule.lower_is_better else value - old)
        best, without_gain = (number, 0) if gain > rule.min_delta else (best, without_gain + 1)
        if without_gain == rule.patience:
            return number + 1, best if best is not None else number
    return len(values), len(values) - 1 if best is None else best

"""State of a run as the scheduler knows it, and what can be read from it. Values only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from sl_queue.protocol.control import Command, EpochResult, Lost, Waiting
from sl_queue.protocol.history import History
from sl_queue.protocol.messages import BEFORE_FIRST_STEP
from sl_queue.protocol.totals import Totals

GIVE_UP = 10  # patiences after which whoever waits for one that is silent ends with PeerSilent


class Phase(StrEnum):
    """The phase of a run."""

    GATHERING = "gathering"  # not every party has joined
    RUNNING = "running"
    STOPPING = "stopping"  # orderly, at the next commit
    STOPPED = "stopped"
    FAILED = "failed"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """End when `metric` on held-out rows has not improved by more than `min_delta` for `patience` epochs."""

    metric: str
    patience: int
    min_delta: float
    lower_is_better: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The scheduler's part of the job."""

    job: Mapping[str, Any]  # canonical
    label_holder: str
    feature_parties: tuple[str, ...]
    epochs: int
    patience_s: float
    early_stopping: EarlyStopping | None = None
    steps: Callable[[int], int | None] = lambda _: None  # of the whole run, from the number of rows

    @property
    def parties(self) -> tuple[str, ...]:
        return (*self.feature_parties, self.label_holder)


@dataclass(frozen=True, slots=True)
class Standing:
    """Early stopping so far."""

    best: EpochResult | None = None
    without_gain: int = 0  # epochs since the best one


@dataclass(frozen=True, slots=True)
class Agreed:
    """The rows on which all parties agreed when the run began."""

    n_rows: int
    rows_digest: str
    id_type: str


@dataclass(frozen=True, slots=True)
class Member:
    """One party as the scheduler knows it."""

    incarnation: str | None = None  # of the newest worker that joined
    here: bool = False  # it joined since the run was last begun or gathered
    n_rows: int = 0
    rows_digest: str = ""
    id_type: str = ""
    run: str | None = None
    generation: int = 0
    finished: Mapping[str, str] | None = None
    stopped: bool = False
    refused: str | None = None  # why its newest worker may not join a run that goes on
    # what follows is not written to disk: it describes a moment
    held: tuple[int, ...] | None = None  # None: it has not reported to this scheduler process yet
    step: int = BEFORE_FIRST_STEP
    loss: float | None = None
    samples: int = 0
    rules: int | None = None  # None: it has not reported to this scheduler process yet
    heard: float | None = None  # monotonic
    waiting: Waiting | None = None
    totals: Totals | None = None  # of its process, as it told last
    lost: Lost | None = None  # of what it waits for, as the sender said last
    epochs: tuple[EpochResult, ...] = ()  # the newest of the label holder's own history, when it joined
    refused_at: float | None = None  # monotonic
    version: str = ""  # of sl_queue; empty of those that do not say it
    weights: str | None = None  # the run whose trained weights it brings; None: it has not told this process yet

    @property
    def committed(self) -> int:
        """The newest step on its disk."""
        return max(self.held or (), default=BEFORE_FIRST_STEP)

    def durable(self) -> "Member":
        """Return it without what describes a moment."""
        return Member(
            self.incarnation,
            self.here,
            self.n_rows,
            self.rows_digest,
            self.id_type,
            self.run,
            self.generation,
            self.finished,
            self.stopped,
            self.refused,
        )

    def back_to(self, step: int) -> "Member":
        """Return it as everyone goes back to the checkpoint of `step`."""
        held = tuple(held for held in self.held or () if held <= step)
        epochs = tuple(epoch for epoch in self.epochs if epoch.step <= step)
        return replace(self, waiting=None, lost=None, held=held, epochs=epochs)


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything the scheduler knows; what `durable` leaves out is learned again."""

    phase: Phase = Phase.GATHERING
    run: str | None = None
    bases: tuple[int, ...] = ()  # one per generation after the first: the common checkpoint it began at
    history: History = field(default_factory=History)
    standing: Standing = Standing()  # follows from the history
    agreed: Agreed | None = None
    members: Mapping[str, Member] = field(default_factory=dict)
    stop_after: int | None = None  # while stopping: the step after which the label holder has stopped
    reason: str | None = None
    error: str | None = None  # class name
    failed: str | None = None  # the party whose error it is; None: the parties disagree
    epoch_began: float | None = None  # monotonic; not written to disk

    @property
    def generation(self) -> int:
        return len(self.bases)


Addressed = tuple[tuple[str, Command], ...]


def durable(state: RunState) -> RunState:
    """Return the part of the state that is written to disk: what no party would report again."""
    return replace(state, members={p: m.durable() for p, m in state.members.items()}, epoch_began=None)


def restarted(state: RunState, now: float) -> RunState:
    """Return the state with which a restarted scheduler goes on: a run that was stopped or failed gathers again."""
    state = replace(durable(state), epoch_began=now)
    if state.phase in (Phase.STOPPED, Phase.FAILED):
        members = {p: replace(m, here=False, stopped=False) for p, m in state.members.items()}
        gathering = replace(state, phase=Phase.GATHERING, members=members, stop_after=None)
        return replace(gathering, reason=None, error=None, failed=None)
    return state


def excused(state: RunState, seconds: float) -> RunState:
    """Count seconds in which the scheduler could hear nobody as nobody's silence."""
    heard = {p: m for p, m in state.members.items() if m.heard is not None}
    members = {p: replace(m, heard=m.heard + seconds) for p, m in heard.items() if m.heard is not None}
    return replace(state, members={**state.members, **members}) if seconds else state


def history_line(result: EpochResult) -> dict[str, Any]:
    """Format one line of history.jsonl; `holdout` is None without held-out rows, `leak` there if it was measured."""
    holdout = None if result.holdout is None else dict(result.holdout)
    leak = {} if result.leak is None else {"leak": {party: dict(found) for party, found in result.leak.items()}}
    return {
        "epoch": result.epoch,
        "step": result.step,
        "loss": result.loss,
        "holdout": holdout,
        "seconds": result.seconds,
        **leak,
        **({} if result.train is None else {"train": dict(result.train)}),
        **({} if result.tables is None else {"tables": dict(result.tables)}),
    }


def epoch_text(epoch: int, epochs: int, loss: float, holdout: Mapping[str, float | None] | None) -> str:
    """Write an epoch as people read it."""
    held_out = "".join(f"  held-out {name} {number_text(value)}" for name, value in (holdout or {}).items())
    return f"epoch {epoch + 1}/{epochs}  loss {number_text(loss)}{held_out}"


BASE_LINES = ("chance", "probe", "probe_raw", "response", "one_of_each")  # of a meter: no attacks on gradients


def worst_reading(found: Mapping[str, float]) -> float | None:
    """Return the AUC of the best attack that a meter has tried on one party's gradients; None without any."""
    return max((value for name, value in found.items() if name not in BASE_LINES), default=None)


def result_of(line: Mapping[str, Any]) -> EpochResult:
    """Read a line of history.jsonl again. Raises KeyError, TypeError for anything else."""
    holdout = None if line["holdout"] is None else dict(line["holdout"])
    leak = None if line.get("leak") is None else {party: dict(found) for party, found in line["leak"].items()}
    seconds = float(line.get("seconds", 0.0))
    more = (leak, line.get("train"), line.get("tables"))
    return EpochResult(int(line["epoch"]), int(line["step"]), line["loss"], holdout, seconds, *more)


def number_text(value: float | None) -> str:
    """Format a loss or a metric with four digits; a metric may have no value."""
    return "-" if value is None else f"{value:.4f}"


def with_member(state: RunState, party: str, member: Member) -> RunState:
    return replace(state, members={**state.members, party: member})


def changed(state: RunState, party: str, **changes: Any) -> RunState:
    return with_member(state, party, replace(state.members.get(party, Member()), **changes))


def incarnations(plan: Plan, state: RunState) -> list[tuple[str, str]]:
    """Return the parties that a command can be sent to, with the worker it is for."""
    members = ((p, state.members.get(p, Member())) for p in plan.parties)
    return [(p, m.incarnation) for p, m in members if m.incarnation is not None and m.here and m.finished is None]


def newest_common(state: RunState) -> int | None:
    """Return the newest step that all hold; the initial weights are always there. None: not all have reported."""
    held = [None if member.held is None else set(member.held) for member in state.members.values()]
    known = [steps for steps in held if steps is not None]
    return max(set.intersection(*known), default=BEFORE_FIRST_STEP) if len(known) == len(held) else None


def gone(state: RunState, member: Member) -> bool:
    """Return True if that party has ended, and rightly so."""
    return member.finished is not None or (state.phase is Phase.STOPPING and member.stopped)


def missing(plan: Plan, state: RunState) -> tuple[str, ...]:
    """Return the parties that the run waits for before it begins."""
    members = ((party, state.members.get(party, Member())) for party in plan.parties)
    return tuple(party for party, m in members if not m.here and m.finished is None)


def untold(plan: Plan, state: RunState) -> tuple[str, ...]:
    """Return the parties that may not know that the run has ended; if stopped or failed, also those yet to come."""
    if state.phase not in (Phase.FAILED, Phase.STOPPED, Phase.FINISHED):
        return ()
    members = ((party, state.members.get(party, Member())) for party in plan.parties)
    return tuple(p for p, m in members if m.finished is None and not m.stopped)


def silent(plan: Plan, state: RunState, since: float, now: float) -> dict[str, float]:
    """Return the parties that should be here, and their seconds of silence, where it is GIVE_UP patiences or more."""
    members = {party: state.members.get(party, Member()) for party in plan.parties}
    awaited = {p: m for p, m in members.items() if not gone(state, m)}
    ages = {p: now - (since if m.heard is None else m.heard) for p, m in awaited.items()}
    return {p: age for p, age in ages.items() if age > GIVE_UP * plan.patience_s}

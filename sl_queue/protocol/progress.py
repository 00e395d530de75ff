"""The scheduler's mind: a pure reducer (state, event, now) -> (state, commands).

Anything may arrive from anyone at any time, so the scheduler has no order of its own. Every report is an idempotent
statement about the present; every command follows from the state alone, so whoever joins again is told everything
anew. The state is written to disk before a command leaves and before a report is acknowledged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, assert_never

from sl_queue.protocol.messages import (
    BEFORE_FIRST_STEP,
    OPERATOR,
    Alive,
    Command,
    EpochDone,
    EpochResult,
    Failed,
    Finish,
    Finished,
    Joined,
    Lost,
    Open,
    Progress,
    Report,
    Start,
    Stop,
    Stopped,
    StopRequest,
    Waiting,
)

GIVE_UP = 10  # patiences after which a party that has not been heard of ends the scheduler with PeerSilent


class Phase(StrEnum):
    """Where a run is."""

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
    """What the scheduler knows of the job."""

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
    # what follows is not written to disk: it describes a moment
    held: tuple[int, ...] | None = None  # None: it has not told this scheduler process yet
    step: int = BEFORE_FIRST_STEP
    loss: float | None = None
    samples: int = 0
    heard: float | None = None  # monotonic
    waiting: Waiting | None = None
    lost: Lost | None = None
    epochs: tuple[EpochResult, ...] = ()  # the label holder's own memory of the history, when it joined

    @property
    def committed(self) -> int:
        """The newest step on its disk."""
        return max(self.held or (), default=BEFORE_FIRST_STEP)

    def durable(self) -> "Member":
        """Without what describes a moment."""
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
        )

    def back_to(self, step: int) -> "Member":
        """As everyone goes back to the checkpoint of `step`."""
        held = tuple(held for held in self.held or () if held <= step)
        epochs = tuple(epoch for epoch in self.epochs if epoch.step <= step)
        return replace(self, waiting=None, lost=None, held=held, epochs=epochs)


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything the scheduler knows; what `durable` leaves out is learned again."""

    phase: Phase = Phase.GATHERING
    run: str | None = None
    bases: tuple[int, ...] = ()  # one per generation after the first: the common checkpoint it began at
    history: tuple[EpochResult, ...] = ()
    members: Mapping[str, Member] = field(default_factory=dict)
    stop_after: int | None = None  # while stopping: the step after which the label holder has stopped
    reason: str | None = None
    error: str | None = None  # class name
    epoch_began: float | None = None  # monotonic; not written to disk

    @property
    def generation(self) -> int:
        return len(self.bases)


Orders = tuple[tuple[str, Command], ...]


def durable(state: RunState) -> RunState:
    """The part of the state that is written to disk: what no party would tell again."""
    return replace(state, members={p: m.durable() for p, m in state.members.items()}, epoch_began=None)


def restarted(state: RunState, now: float) -> RunState:
    """The state with which a scheduler that comes back goes on: a run that was stopped or failed gathers again."""
    state = replace(durable(state), epoch_began=now)
    if state.phase in (Phase.STOPPED, Phase.FAILED):
        members = {p: replace(m, here=False, stopped=False) for p, m in state.members.items()}
        return replace(state, phase=Phase.GATHERING, members=members, reason=None, error=None, stop_after=None)
    return state


def reduce(
    plan: Plan, state: RunState, sender: str, report: Report, now: float, fresh_run: str
) -> tuple[RunState, Orders]:
    """One report of one party (or of the operator). `fresh_run` names the run if this report begins one."""
    if isinstance(report, StopRequest):
        return _stop(plan, state)
    if sender == OPERATOR or sender not in plan.parties:
        return state, ()
    member = state.members.get(sender, Member())
    if isinstance(report, Joined):
        return _join(plan, _with(state, sender, replace(member, heard=now)), sender, report, now, fresh_run)
    if report.incarnation != member.incarnation or not (member.here or isinstance(report, Finished)):
        return state, ()  # of an earlier worker of that party; one that has finished will not join again
    state = _with(state, sender, replace(member, heard=now))
    match report:
        case Alive():
            return state, ()
        case Progress():
            return _progress(plan, state, sender, report)
        case EpochDone(_, generation, result):
            if generation != state.generation or sender != plan.label_holder:
                return state, ()
            return _epochs(plan, state, (result,), now)
        case Waiting():
            return _member(state, sender, waiting=report), ()
        case Lost():
            return _lost(plan, state, sender, report)
        case Failed(_, error, message):
            return _fail(plan, state, error, f"party {sender!r}: {message}", unless=sender)
        case Stopped(_, step):
            return _stopped(plan, state, sender, step)
        case Finished(_, digests):
            return _ended(plan, _member(state, sender, finished=digests, waiting=None)), ()
        case _:
            assert_never(report)


def standing_orders(plan: Plan, state: RunState) -> Orders:
    """What everyone should have been told by now; a scheduler that comes back may have been killed before it was."""
    return tuple(order for party in plan.parties for order in _all_orders(plan, state, party))


def silent(plan: Plan, state: RunState, since: float, now: float) -> dict[str, float]:
    """Parties that should be here and have not been heard of for GIVE_UP patiences, with the seconds of silence."""
    members = {party: state.members.get(party, Member()) for party in plan.parties}
    awaited = {p: m for p, m in members.items() if not _gone(state, m)}
    ages = {p: now - (since if m.heard is None else m.heard) for p, m in awaited.items()}
    return {p: age for p, age in ages.items() if age > GIVE_UP * plan.patience_s}


def history_line(result: EpochResult) -> dict[str, Any]:
    """One line of history.jsonl."""
    line: dict[str, Any] = {"epoch": result.epoch, "step": result.step, "loss": result.loss}
    if result.holdout is not None:
        line["holdout"] = dict(result.holdout)
    return line | {"seconds": result.seconds}


# Joining ------------------------------------------------------------------------------------------------------


def _join(
    plan: Plan, state: RunState, sender: str, joined: Joined, now: float, fresh_run: str
) -> tuple[RunState, Orders]:
    state = _member(
        state,
        sender,
        incarnation=joined.incarnation,
        here=True,
        n_rows=joined.n_rows,
        rows_digest=joined.rows_digest,
        id_type=joined.id_type,
        run=joined.run,
        generation=joined.generation,
        held=joined.held,
        epochs=joined.epochs,
        stopped=False,
        waiting=None,
        lost=None,
    )
    if state.phase in (Phase.FAILED, Phase.STOPPED):
        return state, ((sender, _at_once(state, joined.incarnation)),)
    problem = _disagreement(plan, state, sender, joined)
    if problem is not None:
        return _fail(plan, state, "AlignmentError", problem)
    if state.phase is Phase.GATHERING:
        members = [state.members.get(p, Member()) for p in plan.parties]
        if not all(m.here or m.finished is not None for m in members):
            return state, ()
        state = replace(_begin(state, fresh_run), epoch_began=now)
        state, _ = _remembered(plan, state, now)
        return state, standing_orders(plan, state)
    state, orders = _remembered(plan, state, now)
    return state, (*_all_orders(plan, state, sender), *orders, *_finish(plan, state))


def _remembered(plan: Plan, state: RunState, now: float) -> tuple[RunState, Orders]:
    """Add the epochs that the label holder remembers, as far as they belong to the present timeline."""
    label_holder = state.members.get(plan.label_holder, Member())
    timeline = Start("", "", state.bases)
    epochs = (e for e in label_holder.epochs if timeline.admits(label_holder.generation, e.step))
    return _epochs(plan, state, tuple(epochs), now)


def _disagreement(plan: Plan, state: RunState, sender: str, joined: Joined) -> str | None:
    """Why this party cannot train with the others, or None."""
    differing = differing_keys(joined.job, plan.job)
    if differing:
        pairs = sorted(differing.items())
        told = "; ".join(f"{key} = {a!r:.80} at {sender!r}, {b!r:.80} at the scheduler" for key, (a, b) in pairs)
        return f"the job files differ: {told}. Every party needs the same job file"
    for other in plan.parties:
        member = state.members.get(other, Member())
        if other == sender or not member.here or member.rows_digest == joined.rows_digest:
            continue
        if member.id_type != joined.id_type:
            return (
                f"the ids of {sender!r} are {joined.id_type} and those of {other!r} {member.id_type}: "
                "write them as the same type in both tables"
            )
        return (
            f"the rows differ: {sender!r} has {joined.n_rows} rows, {other!r} has {member.n_rows}, and their ids are "
            "not the same; align the tables (private set intersection) so that both hold exactly the same ids"
        )
    runs = {p: m.run for p, m in state.members.items() if m.run is not None}
    if state.run is not None:
        runs["the scheduler"] = state.run
    if len(set(runs.values())) > 1:
        held = ", ".join(f"{p} holds {r}" for p, r in sorted(runs.items()))
        return f"the state folders belong to different runs: {held}; use the folders of one run, or new ones everywhere"
    return None


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; None stands for a missing one."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in ours.keys() | theirs.keys():
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differing_keys(a, b, f"{path}{key}.")
        elif _plain(a) != _plain(b):
            found[f"{path}{key}"] = (a, b)
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _begin(state: RunState, fresh_run: str) -> RunState:
    """Everyone is here and agrees: go on with the run that is on disk, or begin one."""
    held = [m for m in state.members.values() if m.run is not None]
    if state.run is None and held:
        newest = max(m.generation for m in held)
        common = _newest_common(state)
        assert common is not None, "everyone has joined"
        # this scheduler's folder is new: it knows the generation, not where it began; what all hold is a safe base
        return replace(state, phase=Phase.RUNNING, run=held[0].run, bases=(common,) * (newest + 1))
    return replace(state, phase=Phase.RUNNING, run=state.run or fresh_run)


def _all_orders(plan: Plan, state: RunState, party: str) -> Orders:
    """Everything a party that (re)joins must know."""
    incarnation = dict(_incarnations(plan, state)).get(party)
    if incarnation is None or state.run is None or state.phase not in (Phase.RUNNING, Phase.STOPPING):
        return ()
    orders: list[Command] = [Start(incarnation, state.run, state.bases), _opening(plan, state, incarnation)]
    finish = _final_step(plan, state)
    if finish is not None and _all_committed(plan, state):
        orders.append(Finish(incarnation, finish))
    if state.phase is Phase.STOPPING and (party == plan.label_holder or state.stop_after is not None):
        orders.append(Stop(incarnation, state.reason or "stopped", after_step=state.stop_after))
    return tuple((party, order) for order in orders)


# Epochs -------------------------------------------------------------------------------------------------------


def _epochs(plan: Plan, state: RunState, results: tuple[EpochResult, ...], now: float) -> tuple[RunState, Orders]:
    """Append what is new to the history, and open what may follow."""
    known = len(state.history)
    new = [r for r in results if r.epoch >= known]
    if not new or [r.epoch for r in new] != list(range(known, known + len(new))):
        return state, ()
    seconds = 0.0 if state.epoch_began is None else round(now - state.epoch_began, 3)
    timed = (replace(r, seconds=r.seconds or seconds) for r in new)
    state = replace(state, history=(*state.history, *timed), epoch_began=now)
    opened = tuple((p, _opening(plan, state, i)) for p, i in _incarnations(plan, state))
    return state, (*opened, *_finish(plan, state))


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


def _last_epoch(plan: Plan, history: tuple[EpochResult, ...]) -> int | None:
    """The epoch after which the run ends, once that is known."""
    best = best_epoch(plan, history)
    if best is not None and plan.early_stopping is not None and len(history) - 1 - best >= plan.early_stopping.patience:
        return len(history) - 1
    return len(history) - 1 if len(history) >= plan.epochs else None


def _opening(plan: Plan, state: RunState, incarnation: str) -> Open:
    """Without early stopping an epoch is opened while the one before is trained, so that nobody waits."""
    last = _last_epoch(plan, state.history)
    ahead = 0 if plan.early_stopping is not None else 1
    through = last if last is not None else min(len(state.history) + ahead, plan.epochs - 1)
    best = best_epoch(plan, state.history)
    return Open(incarnation, through, None if best is None else state.history[best].step)


def _final_step(plan: Plan, state: RunState) -> int | None:
    """The step whose weights are final, once the last epoch is done."""
    last = _last_epoch(plan, state.history)
    if last is None:
        return None
    best = best_epoch(plan, state.history)
    return state.history[last if best is None else best].step


def _all_committed(plan: Plan, state: RunState) -> bool:
    """Whether every party has the last trained step on disk: only then nobody can need anything of anybody."""
    last = state.history[-1].step
    members = [state.members[p] for p in plan.parties]
    return all(m.finished is not None or m.committed >= last for m in members)


def _finish(plan: Plan, state: RunState) -> Orders:
    step = _final_step(plan, state)
    if step is None or not _all_committed(plan, state):
        return ()
    return tuple((p, Finish(i, step)) for p, i in _incarnations(plan, state))


def _progress(plan: Plan, state: RunState, sender: str, report: Progress) -> tuple[RunState, Orders]:
    if report.generation != state.generation:
        return state, ()
    committed = state.members[sender].committed
    loss = state.members[sender].loss if report.loss is None else report.loss
    state = _member(
        state, sender, step=report.step, held=report.held, generation=report.generation,
        run=state.run, loss=loss, samples=report.samples, waiting=None, lost=None,
    )  # fmt: skip
    return state, _finish(plan, state) if state.members[sender].committed > committed else ()


# The last line of recovery ------------------------------------------------------------------------------------


def _lost(plan: Plan, state: RunState, sender: str, report: Lost) -> tuple[RunState, Orders]:
    """A message is lost when its receiver asks for it again after its sender said that it no longer has it."""
    if report.generation != state.generation or state.phase not in (Phase.RUNNING, Phase.STOPPING):
        return state, ()
    waiting = state.members.get(report.receiver, Member()).waiting
    same = waiting is not None and (waiting.source, waiting.kind, waiting.step, waiting.index) == (
        sender, report.kind, report.step, report.index,
    )  # fmt: skip
    said = state.members[sender].lost
    asked_again = said is not None and said.asked_s < report.asked_s and replace(said, asked_s=report.asked_s) == report
    base = _newest_common(state)
    if base is None or not (same and asked_again):
        return _member(state, sender, lost=report), ()
    members = {p: m.back_to(base) for p, m in state.members.items()}
    history = tuple(result for result in state.history if result.step <= base)
    state = replace(state, bases=(*state.bases, base), members=members, history=history)
    return state, standing_orders(plan, state)


def _newest_common(state: RunState) -> int | None:
    """The newest checkpoint that all parties hold; the initial weights are always there. None: not all have told."""
    held = [None if member.held is None else set(member.held) for member in state.members.values()]
    known = [steps for steps in held if steps is not None]
    return max(set.intersection(*known), default=BEFORE_FIRST_STEP) if len(known) == len(held) else None


# Endings ------------------------------------------------------------------------------------------------------


def _fail(plan: Plan, state: RunState, error: str, reason: str, unless: str = "") -> tuple[RunState, Orders]:
    """Stop everyone at once; parties that disagree all end with AlignmentError, others with RunStopped."""
    if state.phase in (Phase.FAILED, Phase.FINISHED):
        return state, ()
    state = replace(state, phase=Phase.FAILED, reason=reason, error=error)
    return state, tuple((p, _at_once(state, i)) for p, i in _incarnations(plan, state) if p != unless)


def _at_once(state: RunState, incarnation: str) -> Stop:
    raised = state.error if state.error == "AlignmentError" else "RunStopped"
    return Stop(incarnation, state.reason or "stopped", error=raised)


def _stop(plan: Plan, state: RunState) -> tuple[RunState, Orders]:
    reason = "stopped by the operator; start the workers again to resume"
    if state.phase is Phase.GATHERING:
        state = replace(state, phase=Phase.STOPPED, reason=reason)
        return state, tuple((p, _at_once(state, i)) for p, i in _incarnations(plan, state))
    if state.phase is not Phase.RUNNING:
        return state, ()
    state = replace(state, phase=Phase.STOPPING, reason=reason)
    stops = tuple((p, Stop(i, reason)) for p, i in _incarnations(plan, state) if p == plan.label_holder)
    return state, stops


def _stopped(plan: Plan, state: RunState, sender: str, step: int) -> tuple[RunState, Orders]:
    """The label holder stops first, at its next commit; then everyone knows the step after which to stop."""
    state = _member(state, sender, stopped=True)
    if state.phase is not Phase.STOPPING:
        return state, ()  # a worker that was interrupted, not one that was told to stop
    if sender != plan.label_holder:
        return _ended(plan, state), ()
    state = replace(state, stop_after=step)
    reason = state.reason or "stopped"
    stops = tuple((p, Stop(i, reason, after_step=step)) for p, i in _incarnations(plan, state) if p != sender)
    return _ended(plan, state), stops


def _ended(plan: Plan, state: RunState) -> RunState:
    """Whether that was the last party."""
    members = [state.members.get(p, Member()) for p in plan.parties]
    if all(m.finished is not None for m in members):
        return replace(state, phase=Phase.FINISHED, reason=None)
    if state.phase is Phase.STOPPING and all(_gone(state, m) for m in members):
        return replace(state, phase=Phase.STOPPED)
    return state


def _gone(state: RunState, member: Member) -> bool:
    """Whether that party has ended, and rightly so."""
    return member.finished is not None or (state.phase is Phase.STOPPING and member.stopped)


# Small tools --------------------------------------------------------------------------------------------------


def _with(state: RunState, party: str, member: Member) -> RunState:
    return replace(state, members={**state.members, party: member})


def _member(state: RunState, party: str, **changes: Any) -> RunState:
    return _with(state, party, replace(state.members.get(party, Member()), **changes))


def _incarnations(plan: Plan, state: RunState) -> list[tuple[str, str]]:
    """The parties that a command can be sent to, with the worker it is for."""
    members = ((p, state.members.get(p, Member())) for p in plan.parties)
    return [(p, m.incarnation) for p, m in members if m.incarnation is not None and m.here and m.finished is None]

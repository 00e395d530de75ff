"""The scheduler's mind: a pure reducer (state, event, now) -> (state, commands).

Anything may arrive from anyone at any time, so the scheduler has no order of its own. Every report is an idempotent
statement about the present; every command follows from the state alone, so whoever joins again hears everything
again. The state is written to disk before a command leaves and before a report is acknowledged.
"""

from dataclasses import replace
from typing import assert_never

from sl_queue.errors import failure
from sl_queue.protocol.control import (
    Aligned,
    Aligning,
    Alive,
    Command,
    EpochDone,
    EpochResult,
    Epochs,
    Failed,
    Finish,
    Finished,
    Join,
    Lost,
    Offer,
    Progress,
    Report,
    Start,
    Stop,
    Stopped,
    StopRequest,
    Waiting,
)
from sl_queue.protocol.messages import OPERATOR
from sl_queue.protocol.scheduler.agreement import disagreement
from sl_queue.protocol.scheduler.endings import at_once, ended, fail, stop, stopped
from sl_queue.protocol.scheduler.epochs import all_committed, final_step, finishing, opening, recorded, standing_of
from sl_queue.protocol.scheduler.state import (
    Addressed,
    Agreed,
    Member,
    Phase,
    Plan,
    RunState,
    changed,
    incarnations,
    missing,
    newest_common,
    with_member,
)
from sl_queue.protocol.text import LONGEST, LONGEST_NAME, printable
from sl_queue.protocol.totals import bounded

_ALIGNED = (
    "the rows of all parties are aligned already, and party {!r} has lost what it knew of it: restore its state "
    "folder, or give every party and the scheduler a new one to align and train from scratch"
)


def reduce(
    plan: Plan, state: RunState, sender: str, report: Report, now: float, fresh_run: str, redelivered: bool = False
) -> tuple[RunState, Addressed]:
    """Take one report of one party (or of the operator). `fresh_run` names the run if this report begins one.

    What is delivered again says nothing of whether its sender is still alive.
    """
    if isinstance(report, StopRequest):
        return stop(plan, state)
    if sender == OPERATOR or sender not in plan.parties:
        return state, ()
    member = state.members.get(sender, Member())
    heard = member.heard if redelivered else now
    if isinstance(report, Join):
        return _join(plan, state, sender, report, heard, now, fresh_run)
    if isinstance(report, Offer):
        return state, ((sender, Stop(report.incarnation, _ALIGNED.format(sender), error="AlignmentError")),)
    if report.incarnation != member.incarnation or not (member.here or isinstance(report, Finished)):
        return state, ()  # of an earlier worker of that party; one that has finished will not join again
    return _taken(plan, with_member(state, sender, replace(member, heard=heard)), sender, report, now)


_OfAMember = Alive | Aligning | Aligned | Progress | EpochDone | Epochs | Waiting | Lost | Failed | Stopped | Finished


def _taken(plan: Plan, state: RunState, sender: str, report: _OfAMember, now: float) -> tuple[RunState, Addressed]:
    """Take what the live worker of a party reports."""
    match report:
        case Alive(totals=totals):
            return (state if totals is None else changed(state, sender, totals=bounded(totals, plan.parties))), ()
        case Aligning() | Aligned():
            return state, ()
        case Progress():
            return _progress(plan, state, sender, report)
        case EpochDone(_, generation, result):
            return _measured(plan, state, sender, generation, (result,), now)
        case Epochs(_, generation, results):
            return _measured(plan, state, sender, generation, results, now)
        case Waiting(source=source):
            return (changed(state, sender, waiting=report) if source in plan.parties else state), ()
        case Lost():
            return _lost(plan, state, sender, report)
        case Failed():
            return _failed(plan, state, sender, report)
        case Stopped(_, step):
            return stopped(plan, state, sender, step)
        case Finished(_, digests):
            return ended(plan, changed(state, sender, finished=digests, waiting=None)), ()
        case _:
            assert_never(report)


def _failed(plan: Plan, state: RunState, sender: str, report: Failed) -> tuple[RunState, Addressed]:
    state = changed(state, sender, stopped=True)
    who, said = f"party {sender!r}", printable(report.message, LONGEST)
    reason = said if said.startswith(who) else f"{who}: {said}"
    return fail(plan, state, failure(report.error), reason, failed=sender)


def standing_orders(plan: Plan, state: RunState) -> Addressed:
    """Return what everyone should have heard by now; a scheduler may have been killed before it was sent."""
    return tuple(order for party in plan.parties for order in _all_orders(plan, state, party))


# Joining ------------------------------------------------------------------------------------------------------


def _join(
    plan: Plan, state: RunState, sender: str, joined: Join, heard: float | None, now: float, fresh_run: str
) -> tuple[RunState, Addressed]:
    before = state
    state = _entered(state, sender, joined, heard)
    if state.phase in (Phase.FAILED, Phase.STOPPED):
        return state, ((sender, at_once(state, joined.incarnation)),)
    problem = disagreement(plan, before, sender, joined)
    if state.phase is Phase.FINISHED:
        return changed(state, sender, finished=None), _too_late(plan, state, sender, joined, problem)
    if problem is not None and (before.agreed is not None or before.phase is not Phase.GATHERING):
        return _refused(plan, before, sender, joined.incarnation, problem, now)
    if problem is not None:
        return fail(plan, state, "AlignmentError", problem)
    if state.phase is Phase.GATHERING:
        if missing(plan, state):
            return state, ()
        agreed = Agreed(joined.n_rows, joined.rows_digest, joined.id_type)
        state = replace(_begin(state, fresh_run), epoch_began=now, agreed=agreed)
        state, _ = _remembered(plan, state, now)
        return state, standing_orders(plan, state)
    state, orders = _remembered(plan, state, now)
    return state, (*_all_orders(plan, state, sender), *orders, *finishing(plan, state))


def _entered(state: RunState, sender: str, joined: Join, heard: float | None) -> RunState:
    """Note what a worker says of itself."""
    return changed(
        state,
        sender,
        incarnation=joined.incarnation,
        here=True,
        heard=heard,
        n_rows=joined.n_rows,
        rows_digest=joined.rows_digest,
        id_type=joined.id_type,
        rules=joined.rules,
        run=joined.run,
        generation=joined.generation,
        held=joined.held,
        epochs=joined.epochs,
        version=printable(joined.version, LONGEST_NAME),
        weights=printable(joined.weights, LONGEST_NAME),
        stopped=False,
        waiting=None,
        totals=None,
        lost=None,
        refused=None,
        refused_at=None,
    )


def _refused(
    plan: Plan, state: RunState, sender: str, incarnation: str, problem: str, now: float
) -> tuple[RunState, Addressed]:
    """Send a worker away that does not fit the run which the others are in; they wait for one that does.

    Nothing that was known of its party is forgotten, and it is no sign of life of the worker that is awaited. If all
    are refused, nobody is left to wait.
    """
    state = changed(state, sender, refused=problem, refused_at=now)
    if all(state.members.get(party, Member()).refused is not None for party in plan.parties):
        state, _ = fail(plan, state, "AlignmentError", problem)
    return state, ((sender, Stop(incarnation, problem, error="AlignmentError")),)


def _too_late(plan: Plan, state: RunState, sender: str, joined: Join, problem: str | None) -> Addressed:
    """Handle a party of a finished run: who holds the checkpoint of the final weights writes them again."""
    step = final_step(plan, state)
    if problem is not None:
        return ((sender, Stop(joined.incarnation, problem, error="AlignmentError")),)
    if state.run is not None and step is not None and step in joined.held:
        begin = Start(joined.incarnation, state.run, state.bases)
        return ((sender, begin), (sender, Finish(joined.incarnation, step)))
    lost = f"run {state.run!r} has finished, and party {sender!r} holds neither its final weights nor their checkpoint"
    scratch = "to train from scratch, give every party and the scheduler a new state folder"
    return ((sender, Stop(joined.incarnation, f"{lost}: they are lost; {scratch}", error="CheckpointError")),)


def _remembered(plan: Plan, state: RunState, now: float) -> tuple[RunState, Addressed]:
    """Add the epochs that the label holder remembers, as far as they belong to the present timeline."""
    label_holder = state.members.get(plan.label_holder, Member())
    timeline = Start("", "", state.bases)
    epochs = (e for e in label_holder.epochs if timeline.admits(label_holder.generation, e.step))
    return recorded(plan, state, tuple(epochs), now)


def _begin(state: RunState, fresh_run: str) -> RunState:
    """Go on with the run that is on disk, or begin one: everyone is here and agrees."""
    held = [m for m in state.members.values() if m.run is not None]
    if state.run is None and held:
        newest = max(m.generation for m in held)
        common = newest_common(state)
        assert common is not None, "everyone has joined"
        # this scheduler's folder is new: it knows the generation, not where it began; what all hold is a safe base
        return replace(state, phase=Phase.RUNNING, run=held[0].run, bases=(common,) * (newest + 1))
    return replace(state, phase=Phase.RUNNING, run=state.run or fresh_run)


def _all_orders(plan: Plan, state: RunState, party: str) -> Addressed:
    """Return everything a party that (re)joins must know."""
    incarnation = dict(incarnations(plan, state)).get(party)
    if incarnation is None or state.run is None or state.phase not in (Phase.RUNNING, Phase.STOPPING):
        return ()
    orders: list[Command] = [Start(incarnation, state.run, state.bases), opening(plan, state, incarnation)]
    finish = final_step(plan, state)
    if finish is not None and all_committed(plan, state):
        orders.append(Finish(incarnation, finish))
    if state.phase is Phase.STOPPING and (party == plan.label_holder or state.stop_after is not None):
        orders.append(Stop(incarnation, state.reason or "stopped", after_step=state.stop_after))
    return tuple((party, order) for order in orders)


# Epochs -------------------------------------------------------------------------------------------------------


def _measured(
    plan: Plan, state: RunState, sender: str, generation: int, results: tuple[EpochResult, ...], now: float
) -> tuple[RunState, Addressed]:
    """Take what the label holder measured in the present generation."""
    if generation != state.generation or sender != plan.label_holder:
        return state, ()
    return recorded(plan, state, results, now)


def _progress(plan: Plan, state: RunState, sender: str, report: Progress) -> tuple[RunState, Addressed]:
    if report.generation != state.generation:
        return state, ()
    committed = state.members[sender].committed
    loss = state.members[sender].loss if report.loss is None else report.loss
    state = changed(
        state, sender, step=report.step, held=report.held, generation=report.generation,
        run=state.run, loss=loss, samples=report.samples, waiting=None, lost=None,
    )  # fmt: skip
    return state, finishing(plan, state) if state.members[sender].committed > committed else ()


# The last line of recovery ------------------------------------------------------------------------------------


def _lost(plan: Plan, state: RunState, sender: str, report: Lost) -> tuple[RunState, Addressed]:
    """Go back to a checkpoint if a message is lost: its receiver asks again after its sender has said so.

    A receiver waits for one message at a time, while a sender may have lost those of several.
    """
    receiver = state.members.get(report.receiver)
    running = state.phase in (Phase.RUNNING, Phase.STOPPING)
    if receiver is None or report.generation != state.generation or not running:
        return state, ()
    waiting, said = receiver.waiting, receiver.lost
    same = waiting is not None and (waiting.source, waiting.kind, waiting.step, waiting.index) == (
        sender, report.kind, report.step, report.index,
    )  # fmt: skip
    asked_again = said is not None and said.asked_s < report.asked_s and replace(said, asked_s=report.asked_s) == report
    base = newest_common(state)
    if base is None or not (same and asked_again):
        return changed(state, report.receiver, lost=report), ()
    members = {p: m.back_to(base) for p, m in state.members.items()}
    history = state.history.until(base)
    standing = standing_of(plan, history)
    state = replace(state, bases=(*state.bases, base), members=members, history=history, standing=standing)
    return state, standing_orders(plan, state)

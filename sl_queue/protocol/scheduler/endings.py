"""Endings of a run before it has finished: a failure, an operator's stop, an unreadable party. Pure."""

from dataclasses import replace

from sl_queue.protocol.control import Stop
from sl_queue.protocol.scheduler.state import (
    Addressed,
    Member,
    Phase,
    Plan,
    RunState,
    changed,
    gone,
    incarnations,
)


def foreign(plan: Plan, state: RunState, sender: str, reason: str, now: float) -> tuple[RunState, Addressed]:
    """Refuse a sender of which nothing came for a while but messages of another version.

    Before the run goes on, a party that speaks one ends it for all: it would wait in vain. Later on that party alone is
    refused, and waited for like one that is silent.
    """
    if sender not in plan.parties or state.phase not in (Phase.GATHERING, Phase.RUNNING, Phase.STOPPING):
        return state, ()
    if state.phase is Phase.GATHERING:
        return fail(plan, state, "AlignmentError", reason)
    if state.members.get(sender, Member()).refused == reason:
        return state, ()
    return changed(state, sender, refused=reason, refused_at=now), ()


def fail(plan: Plan, state: RunState, error: str, reason: str, failed: str | None = None) -> tuple[RunState, Addressed]:
    """Stop everyone at once but the party that failed; without one the parties disagree."""
    if state.phase in (Phase.FAILED, Phase.FINISHED):
        return state, ()
    state = replace(state, phase=Phase.FAILED, reason=reason, error=error, failed=failed)
    return state, tuple((p, at_once(state, i)) for p, i in incarnations(plan, state) if p != failed)


def at_once(state: RunState, incarnation: str) -> Stop:
    return Stop(incarnation, state.reason or "stopped", error=ending(state))


def ending(state: RunState) -> str:
    """Name the error with which a run that failed or was stopped ends for who has not failed itself."""
    if state.error is None:
        return "RunStopped"
    return "PeerFailed" if state.failed is not None else state.error


def stop(plan: Plan, state: RunState) -> tuple[RunState, Addressed]:
    reason = "stopped by the operator; start the workers again to resume"
    if state.phase is Phase.GATHERING:
        state = replace(state, phase=Phase.STOPPED, reason=reason)
        return state, tuple((p, at_once(state, i)) for p, i in incarnations(plan, state))
    if state.phase is not Phase.RUNNING:
        return state, ()
    state = replace(state, phase=Phase.STOPPING, reason=reason)
    stops = tuple((p, Stop(i, reason)) for p, i in incarnations(plan, state) if p == plan.label_holder)
    return state, stops


def stopped(plan: Plan, state: RunState, sender: str, step: int) -> tuple[RunState, Addressed]:
    """Note that a worker has stopped. The label holder is first; then all others learn after which step to stop."""
    state = changed(state, sender, stopped=True)
    if state.phase is not Phase.STOPPING:
        return state, ()  # a worker that was interrupted, not one that was ordered to stop
    if sender != plan.label_holder:
        return ended(plan, state), ()
    state = replace(state, stop_after=step)
    reason = state.reason or "stopped"
    stops = tuple((p, Stop(i, reason, after_step=step)) for p, i in incarnations(plan, state) if p != sender)
    return ended(plan, state), stops


def ended(plan: Plan, state: RunState) -> RunState:
    """Return the state with the run ended if that was the last party."""
    members = [state.members.get(p, Member()) for p in plan.parties]
    if all(m.finished is not None for m in members):
        return replace(state, phase=Phase.FINISHED, reason=None)
    if state.phase is Phase.STOPPING and all(gone(state, m) for m in members):
        return replace(state, phase=Phase.STOPPED)
    return state

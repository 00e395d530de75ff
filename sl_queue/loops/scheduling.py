"""The scheduler: a thin loop around the reducer in protocol/progress. It sees reports, never a tensor."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from sl_queue.errors import AlignmentError, PeerSilent, named
from sl_queue.ports import SchedulerChannel
from sl_queue.protocol.control import Command, Report, Status
from sl_queue.protocol.messages import OPERATOR
from sl_queue.protocol.scheduler.endings import ending, foreign
from sl_queue.protocol.scheduler.epochs import standing_of
from sl_queue.protocol.scheduler.reducer import reduce, standing_orders
from sl_queue.protocol.scheduler.state import (
    Member,
    Phase,
    Plan,
    RunState,
    durable,
    excused,
    history_line,
    missing,
    restarted,
    silent,
    untold,
)

STATUS_EVERY_S = 0.25

log = logging.getLogger("sl_queue")


class Ledger(Protocol):
    """The scheduler's memory on disk."""

    def load(self) -> RunState | None:
        """What was saved last, or None."""

    def save(self, state: RunState) -> None:
        """Write durably, the new epochs to `history.jsonl`."""


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Starts the run, opens epochs, and ends it; any number of restarts change nothing."""

    plan: Plan
    channel: SchedulerChannel
    ledger: Ledger
    fresh_run: str
    clock: Callable[[], float]  # monotonic, seconds
    on_status: Callable[[Mapping[str, Any]], None]
    late_s: float = 0.0  # how long a run that had finished before waits for parties that have lost what it left
    wall: Callable[[], float] = time.time  # seconds since 1970: says when something was told, and decides nothing

    def serve(self) -> RunState:
        """Run until every party has finished. Raises PeerFailed, AlignmentError, RunStopped, or PeerSilent.

        It waits until everybody knows of an error, one patience at most: a worker that is just being started would
        find no scheduler.
        """
        began = told_at = self.clock()
        ended_at: float | None = None
        state = restarted(self.ledger.load() or RunState(), began)
        state = replace(state, standing=standing_of(self.plan, state.history))
        heard_since, deaf_s = began, 0.0
        ends_at = began + self.late_s if state.phase is Phase.FINISHED else began
        self._name_missing(state)
        saved = RunState()
        for party, command in standing_orders(self.plan, state):
            self.channel.command(party, command)
        while True:
            reports = self.channel.reports(timeout_s=STATUS_EVERY_S)
            now, before = self.clock(), state
            before_s, deaf_s = deaf_s, self.channel.outage_s()
            heard_since += deaf_s - before_s
            state, commands = self._reduce(excused(state, deaf_s - before_s), reports, now)
            for party, reason in self.channel.foreign().items():
                state, orders = foreign(self.plan, state, party, reason, now)
                commands += orders
            if durable(state) != saved:
                saved = durable(state)
                self.ledger.save(saved)
            for party, command in commands:
                self.channel.command(party, command)
            self.channel.acknowledge()
            self._log(before, state)
            ended = state.phase in (Phase.FINISHED, Phase.FAILED, Phase.STOPPED)
            if ended or commands or now - told_at >= STATUS_EVERY_S:
                told_at = now
                self._tell(state, now)
            if not ended:
                self._require_signs_of_life(state, heard_since, now)
                continue
            ended_at = ended_at or now
            all_know = not untold(self.plan, state) or now - ended_at >= self.plan.patience_s
            if all_know and now >= ends_at:
                return self._end(state)

    def _reduce(
        self, state: RunState, reports: Sequence[tuple[str, Report, bool]], now: float
    ) -> tuple[RunState, list[tuple[str, Command]]]:
        commands: list[tuple[str, Command]] = []
        for sender, report, redelivered in reports:
            state, orders = reduce(self.plan, state, sender, report, now, self.fresh_run, redelivered)
            commands += orders
        return state, commands

    def _tell(self, state: RunState, now: float) -> None:
        text = describe(self.plan, state, now, self.wall())
        self.channel.command(OPERATOR, Status(text))
        self.on_status(text)

    def _log(self, before: RunState, state: RunState) -> None:
        if state.phase is not before.phase:
            which = f"job {self.plan.job['name']}" if state.run is None else f"run {state.run}"
            log.info("scheduler: %s is %s%s", which, state.phase, f": {state.reason}" if state.reason else "")
        for party, member in state.members.items():
            if member.refused and member.refused_at != before.members.get(party, Member()).refused_at:
                log.warning("scheduler: party %r was refused, and the run waits for it: %s", party, member.refused)
        if missing(self.plan, state) != missing(self.plan, before):
            self._name_missing(state)
        if state.generation > before.generation:
            log.warning(
                "scheduler: messages were lost for good; generation %d begins after step %d, which all parties hold",
                state.generation,
                state.bases[-1],
            )

    def _name_missing(self, state: RunState) -> None:
        if state.phase is Phase.GATHERING:
            log.info("scheduler: waiting for %s", ", ".join(missing(self.plan, state)))

    @staticmethod
    def _end(state: RunState) -> RunState:
        if state.phase in (Phase.FAILED, Phase.STOPPED):
            raise named(ending(state))(state.reason or f"the run has {state.phase}")
        return state

    def _require_signs_of_life(self, state: RunState, began: float, now: float) -> None:
        gone = silent(self.plan, state, began, now)
        for party, reason in self.channel.foreign().items():
            if party in gone:
                raise AlignmentError(reason)
        strangers = sorted({*gone}.intersection(self.channel.unreadable_senders()))
        if strangers:  # not before: whoever runs the broker can put in what nobody can open
            raise AlignmentError(
                f"no message of {', '.join(strangers)} can be opened: their job and the scheduler's do not have the "
                "same [security]; every party needs the same job file"
            )
        if gone:
            named_gone = ", ".join(f"{party!r} for {age:.0f} s" for party, age in sorted(gone.items()))
            raise PeerSilent(
                f"nothing was heard of {named_gone}; start those workers and this one again: the run resumes"
            )


def describe(plan: Plan, state: RunState, now: float, wall: float) -> dict[str, Any]:
    """The status as the operator reads it; only plain values. `wall` is the time, in seconds since 1970."""
    label = state.members.get(plan.label_holder, Member())
    return {
        "job": plan.job["name"],
        "run": state.run,
        "generation": state.generation,
        "phase": state.phase.value,
        "epoch": len(state.history),
        "epochs": plan.epochs,
        "step": label.step,
        "steps": plan.steps(label.n_rows),
        "loss": label.loss,
        "samples": label.samples,
        "parties": {party: _party(plan, state, party, now) for party in plan.parties},
        "history": [history_line(r) for r in state.history.newest()],  # the file has them all
        "reason": state.reason,
        "error": state.error,
        "failed": state.failed,
        "told_at": datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds"),
    }


def _party(plan: Plan, state: RunState, party: str, now: float) -> dict[str, Any]:
    member = state.members.get(party, Member())
    age = None if member.heard is None else now - member.heard
    if member.finished is not None:
        phase = "finished"
    elif member.refused is not None:
        phase = "refused"
    elif member.stopped:
        phase = "stopped"
    elif not member.here:
        phase = "not joined"
    elif age is not None and age > plan.patience_s:
        phase = "silent"
    else:
        phase = "waiting" if member.waiting is not None else "here"
    waiting = member.waiting
    return {
        "phase": phase,
        "step": member.step,
        "committed": member.committed,
        "silent_s": None if age is None else round(age, 1),
        "version": member.version,
        "refused": member.refused,
        "refused_s": None if member.refused_at is None else round(now - member.refused_at, 1),
        "waiting_for": None
        if waiting is None
        else f"{waiting.kind} {waiting.step}.{waiting.index} of {waiting.source} for {waiting.seconds:.0f} s",
    }

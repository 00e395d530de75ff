"""The scheduler: a thin loop around the reducer in protocol/progress. It sees reports, never a tensor."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sl_queue.errors import AlignmentError, PeerSilent, named
from sl_queue.ports import SchedulerChannel
from sl_queue.protocol import events
from sl_queue.protocol.control import Command, Report, Status
from sl_queue.protocol.events import Observer, ignore
from sl_queue.protocol.history import History
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.protocol.scheduler.endings import ending, foreign
from sl_queue.protocol.scheduler.epochs import standing_of
from sl_queue.protocol.scheduler.past import Past
from sl_queue.protocol.scheduler.reducer import reduce, standing_orders
from sl_queue.protocol.scheduler.state import (
    Member,
    Phase,
    Plan,
    RunState,
    durable,
    excused,
    missing,
    restarted,
    silent,
    untold,
)
from sl_queue.protocol.scheduler.status import RunStatus, describe, on_the_wire

STATUS_EVERY_S = 0.25


class Ledger(Protocol):
    """The scheduler's memory on disk."""

    def load(self) -> RunState | None:
        """Return the state that was saved last, or None."""

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
    on_status: Callable[[RunStatus], None]
    late_s: float = 0.0  # how long a run that had finished before waits for parties that have lost what it left
    wall: Callable[[], float] = time.time  # seconds since 1970: says when something was reported, and decides nothing
    observe: Observer = ignore
    past: Callable[[History], Past | None] = lambda _: None  # of the run, whenever it is to be told

    def serve(self) -> RunState:
        """Run until every party has finished. Raises PeerFailed, AlignmentError, RunStopped, or PeerSilent.

        It waits until everybody knows of an error, one patience at most: a worker that is just being started would
        find no scheduler.
        """
        began = told_at = self.clock()
        ended_at: float | None = None
        state = restarted(self.ledger.load() or RunState(), began)
        state = replace(state, standing=standing_of(self.plan, state.history))
        heard_since, deaf_s, turned_at, saved = began, 0.0, began, RunState()
        ends_at = began + self.late_s if state.phase is Phase.FINISHED else began
        self._name_missing(state)
        for party, command in standing_orders(self.plan, state):
            self.channel.command(party, command)
        while True:
            reports = self.channel.reports(timeout_s=STATUS_EVERY_S)
            now, before = self.clock(), state
            before_s, deaf_s = deaf_s, self.channel.deaf_s()
            lost_s = min(deaf_s - before_s, now - turned_at)
            heard_since, turned_at = heard_since + lost_s, now
            state, commands = self._reduce(excused(state, lost_s), reports, now)
            if durable(state) != saved:
                saved = durable(state)
                self.ledger.save(saved)
            for party, command in commands:
                self.channel.command(party, command)
            self.channel.acknowledge()
            self._observe_changes(before, state)
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
        for party, reason in self.channel.foreign().items():
            state, orders = foreign(self.plan, state, party, reason, now)
            commands += orders
        return state, commands

    def _tell(self, state: RunState, now: float) -> None:
        status = replace(describe(self.plan, state, now, self.wall()), past=self.past(state.history))
        self.channel.command(OPERATOR, Status(on_the_wire(status)))
        self.on_status(status)

    def _observe_changes(self, before: RunState, state: RunState) -> None:
        job, reason = self.plan.job["name"], state.reason
        if state.phase is not before.phase:
            self.observe(events.PhaseChanged(SCHEDULER, job, state.run, state.phase.value, reason))
        for party, member in state.members.items():
            if member.refused and member.refused_at != before.members.get(party, Member()).refused_at:
                self.observe(events.Refused(SCHEDULER, party, member.refused))
        if missing(self.plan, state) != missing(self.plan, before):
            self._name_missing(state)
        if state.generation > before.generation:
            self.observe(events.GenerationBegan(SCHEDULER, state.generation, state.bases[-1]))

    def _name_missing(self, state: RunState) -> None:
        if state.phase is Phase.GATHERING:
            self.observe(events.Missing(SCHEDULER, missing(self.plan, state)))

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
                f"nothing was heard from {named_gone}; start those workers and this one again: the run resumes"
            )

"""Lifecycle that both data roles share: join, resume from their own last checkpoint, train, commit, finish.

Killed at any moment, a worker that starts again runs through the same lines; nothing else is needed.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from sl_queue.errors import CheckpointError, ComputeError, PeerFailed, RunStopped, SlQueueError, TransportError
from sl_queue.loops.record import Lack, Record, last_epoch
from sl_queue.ports import BaseStage, Channel, Checkpoints, FuseStage, Meter, Spending
from sl_queue.protocol import events
from sl_queue.protocol.checkpoint import Final, Saved, State
from sl_queue.protocol.control import (
    Command,
    EpochDone,
    EpochResult,
    Epochs,
    Failed,
    Finish,
    Finished,
    Join,
    Open,
    Progress,
    Start,
    Stopped,
)
from sl_queue.protocol.events import Observer, ignore
from sl_queue.protocol.messages import BEFORE_FIRST_STEP
from sl_queue.protocol.party.orders import Orders, Restarted
from sl_queue.protocol.schedule.pipeline import Pipeline

T = TypeVar("T", bound=Command)

log = logging.getLogger("sl_queue")


@dataclass(frozen=True, slots=True)
class Identity:
    """Description that a worker gives of itself when it joins."""

    incarnation: str
    job: Mapping[str, Any]  # canonical
    n_rows: int
    rows_digest: str
    id_type: str
    rules: int = 1  # how it computes what it chooses, see protocol/fingerprints
    version: str = ""  # of sl_queue
    weights: str = ""  # in a prediction: the run whose trained weights it brings
    party: str = ""  # its name, in events


@dataclass(slots=True)
class Worker:
    """One party's place in the run. Mutable: the run, the generation and what is committed move on."""

    identity: Identity
    channel: Channel
    stage: BaseStage | FuseStage
    checkpoints: Checkpoints
    pipeline: Pipeline
    run: str | None = None
    generation: int = 0
    committed: int = BEFORE_FIRST_STEP
    held: tuple[int, ...] = ()
    record: Record = field(default_factory=Record)
    meter: Meter | None = None  # if the party's file asks for one
    spending: Spending | None = None
    running: dict[str, float] = field(default_factory=dict)  # sums over the epoch so far that a checkpoint must hold
    samples: int = 0
    step: int = BEFORE_FIRST_STEP  # the newest trained
    on_final: Callable[[Final], None] | None = None  # with the final weights on disk, before anyone hears of them
    observe: Observer = ignore

    def serve(self, train: Callable[[int], None]) -> Final:
        """Take part in the run to its end; `train(first_step)` is the role's loop.

        Whatever ends it before, and would not be fixed by a restart, is reported to the scheduler.
        """
        try:
            final = self.checkpoints.finished() or self._train(train)
            if self.on_final is not None:
                self.on_final(final)
            self.channel.report(Finished(final.incarnation, final.digests))
            self.channel.flush()
            self.checkpoints.mark_reported()
            return final
        except (RunStopped, PeerFailed):
            self.channel.report(Stopped(self.identity.incarnation, self.committed))
            raise
        except TransportError:
            raise
        except SlQueueError as error:
            self.channel.report(Failed(self.identity.incarnation, type(error).__name__, str(error)))
            raise
        except (Exception, SystemExit) as error:  # of sys.exit nobody else would tell the others
            told = f"{type(error).__name__}: {error}"
            log.exception("an error in the model, loss or optimizer, or a bug")
            self.channel.report(Failed(self.identity.incarnation, "ComputeError", told))
            raise ComputeError(told) from error

    def _train(self, train: Callable[[int], None]) -> Final:
        try:
            return self._trained(train)
        except (RunStopped, PeerFailed):
            with suppress(RunStopped, PeerFailed, Restarted, TransportError):  # but a full disk is reported
                self.channel.wait_committed()
            raise

    def _trained(self, train: Callable[[int], None]) -> Final:
        fresh = self.stage.state()
        self._remember(self.checkpoints.newest())
        self.channel.announce(self._describe)
        start = self.channel.wait_for(lambda orders: orders.start)
        while True:
            self._resume(start, fresh)
            try:
                train(self.committed + 1)
                finish = self._until(lambda orders: orders.finish)
                return self._finish(finish.step)
            except Restarted as restarted:
                start = restarted.start
                with suppress(Restarted):
                    self.channel.wait_committed()

    def may_begin(self, epoch: int) -> bool:
        """Block until the scheduler opens the epoch; False if the run ends before it."""

        def decision(orders: Orders) -> Open | Finish | None:
            if orders.finish is not None:
                return orders.finish
            return orders.open if orders.open is not None and orders.open.through >= epoch else None

        order = self._until(decision)
        if isinstance(order, Open) and order.keep != self.checkpoints.kept:
            self.channel.wait_committed()  # not while another is being written
            self.checkpoints.keep(order.keep)
        if isinstance(order, Open) and self.spending is not None and self.run is not None:
            self.spending.begin(self.run, self.generation, epoch)  # before anything of the epoch is sent
        return isinstance(order, Open)

    def _until(self, decision: Callable[[Orders], T | None]) -> T:
        """Wait for the scheduler's word; meanwhile answer with the epochs that it lacks, a page a question."""

        def next_order(orders: Orders) -> T | Lack | None:
            return decision(orders) or self.record.lack(orders)

        while True:
            order: T | Lack = self.channel.wait_for(next_order)
            if not isinstance(order, Lack):
                return order
            self.channel.report(Epochs(self.identity.incarnation, self.generation, self.record.page(order.known)))

    def commit(self, step: int, ended: EpochResult | None = None) -> None:
        """Have what is here and now become the checkpoint of `step`, with the result of an epoch that `ended` in it.

        The scheduler hears of it when it is on disk.
        """
        assert self.run is not None
        self.channel.wait_committed()
        leak = self._measured(step)
        if ended is not None:
            ended = replace(ended, leak=leak)
        history = self.record.history if ended is None else self.record.history.after(ended)
        values = {"last_epoch": last_epoch(history), "running": dict(self.running)}
        state, run, generation = self._state(), self.run, self.generation

        def save() -> None:
            self.record.write(history)
            self.checkpoints.save(step, state, run=run, generation=generation, values=values)
            self.committed, self.held, self.record.history = step, self.checkpoints.steps(), history
            self.channel.report(self._progress(step, None))
            if ended is not None:
                self.channel.report(EpochDone(self.identity.incarnation, generation, ended))
                self.observe(events.EpochDone(self.identity.party, ended.epoch, step, ended.loss, ended.holdout))

        self.channel.commit(step, save)

    def _measured(self, step: int) -> Mapping[str, Mapping[str, float]] | None:
        """Return what others could read in the epoch that ends with `step`; None at other steps, or without a meter."""
        batches = self.pipeline.batches
        if self.meter is None or not batches.ends_epoch(step):
            return None
        found = self.meter.end_epoch()
        for party, numbers in found.items():
            told = ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())
            log.info("epoch %d: what party %r could read by what it was sent: %s", batches.epoch_of(step), party, told)
        return found

    def _state(self) -> State:
        """Return all that a checkpoint must hold of what is computed here."""
        state = self.stage.state()
        if self.meter is None:
            return state
        measured = self.meter.state()
        return State({**state.tensors, **measured.tensors}, {**state.values, **measured.values})

    def advance(self, step: int, rows: int, loss: float | None = None) -> None:
        """Report soon that an optimizer step is done."""
        self.samples += rows
        self.step = step
        self.channel.progress(self._progress(step, loss))

    def _progress(self, step: int, loss: float | None) -> Progress:
        return Progress(self.identity.incarnation, self.generation, step, self.held, loss, self.samples)

    def _describe(self) -> Join:
        me = self.identity
        about = (me.incarnation, me.job, me.n_rows, me.rows_digest, me.id_type)
        newest = self.record.history.newest()
        held = (self.run, self.generation, self.held, newest)
        return Join(*about, *held, version=me.version, rules=me.rules, weights=me.weights)

    def _remember(self, saved: Saved | None) -> None:
        """Become what a checkpoint says, or what nobody has trained yet."""
        self.held = self.checkpoints.steps()
        self.committed = BEFORE_FIRST_STEP if saved is None else saved.step
        self.record.recall(saved)
        self.running = {} if saved is None else dict(saved.values["running"])
        if saved is not None:
            self.run, self.generation = saved.run, saved.generation

    def _resume(self, start: Start, fresh: Any) -> None:
        """Load the newest checkpoint of the present timeline and enter it."""
        saved = None
        for step in reversed(self.checkpoints.steps()):
            candidate = self.checkpoints.load(step)
            if candidate.run != start.run:
                raise CheckpointError(
                    f"the state folder holds run {candidate.run!r}, the scheduler started run {start.run!r}; "
                    "use the state folder of this run, or a new one"
                )
            if start.admits(candidate.generation, step):
                saved = candidate
                break
        self.checkpoints.discard_after(BEFORE_FIRST_STEP if saved is None else saved.step)
        self._remember(saved)
        self.stage.load(fresh if saved is None else saved.state)
        if self.meter is not None:
            self.meter.load(fresh if saved is None else saved.state)
        self.run, self.generation = start.run, start.generation
        self.channel.enter(start, self.committed)
        self.channel.report(self._progress(self.committed, None))
        self.observe(events.Began(self.identity.party, start.run, start.generation, self.committed))

    def _finish(self, step: int) -> Final:
        """Write the final weights: those after `step`, which early stopping may have chosen."""
        assert self.run is not None
        self.channel.wait_committed()
        if step != self.committed:
            self.stage.load(self.checkpoints.load(step).state)
        if self.spending is not None:
            self.spending.finish(self.run)
        self.checkpoints.write_final(
            self.stage.weights(), run=self.run, step=step, incarnation=self.identity.incarnation
        )
        final = self.checkpoints.finished()
        assert final is not None
        return final

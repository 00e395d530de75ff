"""What both data roles share: join, resume from the own last checkpoint, train, commit, finish.

Killed at any moment, a worker that starts again runs through the same lines; nothing else is needed.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sl_queue.errors import CheckpointError, ComputeError, RunStopped, SlQueueError, TransportError
from sl_queue.ports import BaseStage, Channel, Checkpoints, Final, FuseStage, Restarted, Saved
from sl_queue.protocol.messages import (
    BEFORE_FIRST_STEP,
    EpochDone,
    EpochResult,
    Failed,
    Finish,
    Finished,
    Joined,
    Open,
    Progress,
    Start,
    Stopped,
)
from sl_queue.protocol.orders import Orders
from sl_queue.protocol.pipeline import Pipeline

log = logging.getLogger("sl_queue")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a worker says of itself when it joins."""

    incarnation: str
    job: Mapping[str, Any]  # canonical
    n_rows: int
    rows_digest: str
    id_type: str


@dataclass(slots=True)
class Worker:
    """One party's place in the run. Mutable: the run, the generation and the label holder's history move on."""

    identity: Identity
    channel: Channel
    stage: BaseStage | FuseStage
    checkpoints: Checkpoints
    pipeline: Pipeline
    run: str | None = None
    generation: int = 0
    committed: int = BEFORE_FIRST_STEP
    held: tuple[int, ...] = ()
    epochs: tuple[EpochResult, ...] = ()  # the label holder's history on its disk; empty elsewhere
    running: dict[str, float] = field(default_factory=dict)  # sums over the epoch so far that a checkpoint must hold
    samples: int = 0
    step: int = BEFORE_FIRST_STEP  # the newest trained

    def serve(self, train: Callable[[int], None]) -> Final:
        """Take part in the run to its end; `train(first_step)` is the role's loop.

        Whatever ends it before, and would not be mended by a restart, is told to the scheduler.
        """
        try:
            final = self.checkpoints.finished() or self._train(train)
            self.channel.report(Finished(final.incarnation, final.digests))
            self.channel.flush()
            self.checkpoints.mark_told()
            return final
        except RunStopped:
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
        except RunStopped:
            with suppress(RunStopped, Restarted, TransportError):  # but a disk that is full is told
                self.channel.settle()
            raise

    def _trained(self, train: Callable[[int], None]) -> Final:
        fresh = self.stage.state()
        self._remember(self.checkpoints.newest())
        self.channel.introduce(self._describe)
        start = self.channel.until(lambda orders: orders.start)
        while True:
            self._resume(start, fresh)
            try:
                train(self.committed + 1)
                finish = self.channel.until(lambda orders: orders.finish)
                return self._finish(finish.step)
            except Restarted as restarted:
                start = restarted.start
                with suppress(Restarted):
                    self.channel.settle()

    def may_begin(self, epoch: int) -> bool:
        """Block until the scheduler opens the epoch; False if the run ends before it."""

        def decision(orders: Orders) -> Open | Finish | None:
            if orders.finish is not None:
                return orders.finish
            return orders.open if orders.open is not None and orders.open.through >= epoch else None

        order = self.channel.until(decision)
        if isinstance(order, Open) and order.keep != self.checkpoints.kept:
            self.channel.settle()  # not while another is being written
            self.checkpoints.keep(order.keep)
        return isinstance(order, Open)

    def commit(self, step: int, ended: EpochResult | None = None) -> None:
        """Have what is here and now become the checkpoint of `step`, with the result of an epoch that `ended` in it.

        The scheduler is told when it is on disk.
        """
        assert self.run is not None
        self.channel.settle()
        epochs = self.epochs if ended is None else (*self.epochs, ended)
        values = {"epochs": [_as_json(e) for e in epochs], "running": dict(self.running)}
        state, run, generation = self.stage.state(), self.run, self.generation

        def save() -> None:
            self.checkpoints.save(step, state, run=run, generation=generation, values=values)
            self.committed, self.held, self.epochs = step, self.checkpoints.steps(), epochs
            self.channel.report(self._progress(step, None))
            if ended is not None:
                self.channel.report(EpochDone(self.identity.incarnation, generation, ended))

        self.channel.commit(step, save)

    def advance(self, step: int, rows: int, loss: float | None = None) -> None:
        """An optimizer step is done: tell the scheduler some time soon."""
        self.samples += rows
        self.step = step
        self.channel.progress(self._progress(step, loss))

    def _progress(self, step: int, loss: float | None) -> Progress:
        return Progress(self.identity.incarnation, self.generation, step, self.held, loss, self.samples)

    def _describe(self) -> Joined:
        me = self.identity
        about = (me.incarnation, me.job, me.n_rows, me.rows_digest, me.id_type)
        return Joined(*about, self.run, self.generation, self.held, self.epochs)

    def _remember(self, saved: Saved | None) -> None:
        """Become what a checkpoint says, or what nobody has trained yet."""
        self.held = self.checkpoints.steps()
        self.committed = BEFORE_FIRST_STEP if saved is None else saved.step
        self.epochs = () if saved is None else tuple(EpochResult(**e) for e in saved.values["epochs"])
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
        self.run, self.generation = start.run, start.generation
        self.channel.adopt(start, self.committed)
        self.channel.report(self._progress(self.committed, None))

    def _finish(self, step: int) -> Final:
        """Write the final weights: those after `step`, which early stopping may have chosen."""
        assert self.run is not None
        self.channel.settle()
        if step != self.committed:
            self.stage.load(self.checkpoints.load(step).state)
        self.checkpoints.write_final(
            self.stage.weights(), run=self.run, step=step, incarnation=self.identity.incarnation
        )
        final = self.checkpoints.finished()
        assert final is not None
        return final


def _as_json(result: EpochResult) -> dict[str, Any]:
    holdout = None if result.holdout is None else dict(result.holdout)
    return {"epoch": result.epoch, "step": result.step, "loss": result.loss, "holdout": holdout}

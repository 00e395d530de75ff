"""The label holder's record of epochs: kept with its checkpoints, and told to a scheduler that lost its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sl_queue.errors import CheckpointError
from sl_queue.ports import HistoryLog
from sl_queue.protocol.checkpoint import Saved
from sl_queue.protocol.control import EpochResult, Open
from sl_queue.protocol.history import History
from sl_queue.protocol.party.orders import Orders


@dataclass(frozen=True, slots=True)
class Lack:
    """The scheduler knows so many epochs, and the label holder more."""

    known: int


@dataclass(slots=True)
class Record:
    """Results of the epochs up to the committed step; empty at every other party. Mutable: epochs are added."""

    journal: HistoryLog | None = None  # the label holder's; nobody else has one
    history: History = field(default_factory=History)
    answered: Open | None = None  # what the scheduler asked last

    @property
    def epochs(self) -> int:
        """Number of epochs on disk."""
        return self.history[-1].epoch + 1 if self.history else 0

    def lack(self, orders: Orders) -> Lack | None:
        """Return how much the scheduler lacks, once for each time it says so."""
        asked = orders.asked
        if asked is None or asked is self.answered or asked.known is None or asked.known >= self.epochs:
            return None
        self.answered = asked
        return Lack(asked.known)

    def page(self, known: int) -> tuple[EpochResult, ...]:
        """Return the epochs that come after the `known` ones. Raises CheckpointError if they are lost."""
        page = self.history.page(known)
        if not page:
            raise CheckpointError(
                "the scheduler has lost its history, and that of the label holder begins with epoch "
                f"{self.history[0].epoch + 1}: nobody knows those before; restore history.jsonl in one of the two "
                "state folders, or give every party and the scheduler a new one to train from scratch"
            )
        return page

    def write(self, history: History) -> None:
        """Write the file that a checkpoint counts on, before that checkpoint."""
        if self.journal is not None:
            self.journal.write(history)

    def recall(self, saved: Saved | None) -> None:
        """Return to the epochs that belong to a checkpoint; without the file no more than its last one."""
        self.history = History() if saved is None else self._history_at(saved)

    def _history_at(self, saved: Saved) -> History:
        if "epochs" in saved.values:  # a checkpoint of an earlier version holds all of them
            return History.of(EpochResult(**e) for e in saved.values["epochs"])
        last = History.of(EpochResult(**e) for e in saved.values["last_epoch"])
        written = History() if self.journal is None or not last else self.journal.load().until(last[-1].step)
        return written if written and written[-1].epoch == last[-1].epoch else last


def last_epoch(history: History) -> list[dict[str, Any]]:
    """Return what a checkpoint itself holds of a history."""
    return [_as_json(result) for result in history.newest(1)]


def _as_json(result: EpochResult) -> dict[str, Any]:
    holdout = None if result.holdout is None else dict(result.holdout)
    leak = {} if result.leak is None else {"leak": {party: dict(found) for party, found in result.leak.items()}}
    more: Mapping[str, Mapping[str, Any] | None] = {"train": result.train, "tables": result.tables}
    kept = {name: dict(value) for name, value in more.items() if value is not None}
    return {"epoch": result.epoch, "step": result.step, "loss": result.loss, "holdout": holdout, **leak, **kept}

"""Findings of `sl-queue check`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from sl_queue.errors import SlQueueError

T = TypeVar("T")


class Level(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    DETAIL = "detail"  # for who runs the broker: names of queues
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the check looked at, and what it saw."""

    level: Level
    text: str
    exit_code: int = 0


@dataclass(slots=True)
class Check:  # mutable: it remembers the first error
    say: Callable[[Finding], None]
    exit_code: int = 0
    _told: set[str] = field(default_factory=set)  # errors: a model that fails does so wherever it is tried

    def ok(self, text: str) -> None:
        self.say(Finding(Level.OK, text))

    def note(self, text: str) -> None:
        self.say(Finding(Level.NOTE, text))

    def detail(self, text: str) -> None:
        self.say(Finding(Level.DETAIL, text))

    def warn(self, text: str) -> None:
        self.say(Finding(Level.WARNING, text))

    def error(self, error: SlQueueError) -> None:
        if str(error) not in self._told:
            self._told.add(str(error))
            self.say(Finding(Level.ERROR, str(error), error.exit_code))
        self.exit_code = self.exit_code or error.exit_code

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Return the result of the action, or None after its error has become a finding."""
        try:
            return action()
        except SlQueueError as error:
            self.error(error)
            return None

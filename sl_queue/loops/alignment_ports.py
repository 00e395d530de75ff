"""Protocols of what both sides of an alignment need; adapters in transport, security and storage provide it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sl_queue.protocol.comparison import Outcome
from sl_queue.protocol.control import Command, Message, Report, Status
from sl_queue.protocol.messages import Masked


@dataclass(frozen=True, slots=True)
class Ids:
    """A party's own ids, in canonical order."""

    count: int
    texts: Callable[[], Iterable[bytes]] = field(repr=False)  # with their type, so that 7 is not "7"
    type: str


class Arrival(Protocol):
    """A message that came."""

    @property
    def sender(self) -> str: ...
    @property
    def session(self) -> str: ...
    @property
    def message(self) -> Message: ...


class Channel(Protocol):
    """Channel of a role while rows are aligned; used by one thread."""

    reconnects: int  # how often what was on its way may have been lost

    def send(self, receiver: str, message: Masked, session: str) -> None:
        """Publish masked ids; they may be lost."""

    def tell(self, receiver: str, message: Report | Command | Status, *, lasting: bool = False) -> None:
        """Publish a statement about the present."""

    def next(self, timeout_s: float) -> Any | None:
        """Return the next Arrival; None if none came in time."""

    def done(self, arrival: Any) -> None:
        """Acknowledge a message: it was dealt with."""

    def flush(self) -> None:
        """Block until the broker has everything that was published."""

    def silent_s(self, sender: str) -> float:
        """Return the seconds since that role was heard of."""

    def foreign(self) -> Mapping[str, str]:
        """Name roles that speak another version, with what to do."""


class Secrets(Protocol):
    """A party's secrets; `pulse` is called every few milliseconds of work."""

    def own(self, texts: Iterable[bytes], fillers: int, pulse: Callable[[int], None]) -> bytes: ...
    def masked(self, points: bytes | memoryview, pulse: Callable[[int], None]) -> bytes: ...
    def finished(self, points: bytes | memoryview, pulse: Callable[[int], None]) -> bytes: ...


class Files(Protocol):
    """Files of a party until its rows are aligned."""

    def begin(self, session: str) -> set[int]:
        """Enter a session; returns the own chunks that came back in it."""

    def keep(self, session: str, chunk: int, masks: bytes) -> None:
        """Have a finished chunk of the own set on disk."""

    def finished(self, session: str, chunk: int) -> bytes:
        """Read a finished chunk."""

    def put_by(self, points: Iterable[bytes]) -> None:
        """Write the own points as they leave; a worker that comes again makes them again."""

    def points(self, first: int, size: int) -> bytes:
        """Read so many bytes of them."""

    def is_the_same(self, session: str, name: str, body: bytes | memoryview) -> bool:
        """Return True unless another chunk of that name was masked before."""


class OutcomeFile(Protocol):
    """The scheduler's memory on disk."""

    def load(self) -> Outcome | None:
        """Read the outcome; None if there is none yet."""

    def save(self, outcome: Outcome) -> None:
        """Write it durably; without masks the alignment is done."""

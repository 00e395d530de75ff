"""Messages that a link was given to publish and the broker has not confirmed, in order. Thread-safe.

Everything in here is published again after a reconnect. Messages wait, are sent, and leave when they are confirmed;
confirms come in any order. On a link without confirms they leave when they are handed to the network.
"""

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sl_queue.errors import SlQueueError
from sl_queue.transport.link import Tag


@dataclass(slots=True)
class Outgoing:  # mutable: it remembers its troubles
    """One message on its way out."""

    exchange: str
    routing_key: str
    body: bytes = field(repr=False)
    persistent: bool
    expires_at: float | None = None  # monotonic; a message that has expired is not published (again)
    headers: dict[str, str | int] | None = None
    answers: Tag | None = None  # a dead letter: once it is confirmed, the refused delivery is acknowledged
    troubles: int = 0  # how often the broker returned or refused it
    troubled_since: float | None = None

    @property
    def to(self) -> str:
        """The queue that it is for, by its exchange and the receiver that ends its routing key."""
        return f"{self.exchange} {self.routing_key.rpartition('.')[2]}"

    def expires_in_s(self) -> float | None:
        """Return the seconds until it is worth nothing, None for never."""
        return None if self.expires_at is None else self.expires_at - time.monotonic()


class Unconfirmed:
    """Messages by number, from publish to confirm. Mutable, thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._messages: dict[int, Outgoing] = {}  # by ascending number
        self._waiting: deque[int] = deque()
        self._last = 0
        self._failure: SlQueueError | None = None

    def add(self, message: Outgoing) -> bool:
        """Append a message; True if nothing else was waiting. Raises what `fail` was given."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._last += 1
            self._messages[self._last] = message
            self._waiting.append(self._last)
            return len(self._waiting) == 1

    def take(self, paused: Collection[str] = ()) -> tuple[int, Outgoing] | None:
        """Return the next message to publish that is not for a `paused` queue; it stays here until it is confirmed.

        None if none is waiting. The order of what is for one queue is kept.
        """
        with self._changed:
            passed: list[int] = []
            try:
                while self._waiting:
                    number = self._waiting.popleft()
                    message = self._messages[number]
                    if message.expires_at is not None and message.expires_at <= time.monotonic():
                        self._forget([number])
                    elif paused and message.to in paused:
                        passed.append(number)
                    else:
                        return number, message
                return None
            finally:
                if passed:
                    self._waiting.extendleft(reversed(passed))

    def confirm(self, numbers: Iterable[int]) -> list[Outgoing]:
        """Forget and return these: the broker has them."""
        with self._changed:
            return self._forget(numbers)

    def again(self, numbers: Iterable[int]) -> None:
        """Let these wait again, before all others."""
        with self._changed:
            self._waiting = deque(sorted({*numbers, *self._waiting}))

    def restart(self) -> None:
        """Let everything wait again, in order: the connection is gone."""
        with self._changed:
            self._waiting = deque(self._messages)

    @property
    def last(self) -> int:
        """The number of the newest message."""
        with self._changed:
            return self._last

    def flush(self, timeout_s: float | None, through: int | None = None) -> bool:
        """Block until everything added so far, or `through` that number, is confirmed; False after `timeout_s`.

        Raises what `fail` was given.
        """
        with self._changed:
            last = self._last if through is None else through
            flushed = self._changed.wait_for(lambda: self._failure or self._first > last, timeout_s)
            if self._failure is not None:
                raise self._failure
            return bool(flushed)

    def fail(self, error: SlQueueError) -> None:
        """Raise this at whoever publishes or flushes from now on; the first one given counts."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    @property
    def _first(self) -> int:
        """The number of the oldest message that is not confirmed, or of the next one that will be added."""
        return next(iter(self._messages), self._last + 1)

    def _forget(self, numbers: Iterable[int]) -> list[Outgoing]:
        gone = [self._messages.pop(number) for number in numbers if number in self._messages]
        if gone:
            self._changed.notify_all()
        return gone

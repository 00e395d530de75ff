"""Turns at the driver: pika may be used by one thread at a time, whichever it is."""

import selectors
import threading
from typing import Any


class Turns(selectors.DefaultSelector):
    """The I/O thread's selector: it holds the `turn` whenever it is awake."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = threading.Lock()

    def select(self, timeout: float | None = None) -> Any:
        """Select as every selector does; meanwhile the turn is free."""
        self.turn.release()
        try:
            return super().select(timeout)
        finally:
            self.turn.acquire()

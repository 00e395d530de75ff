"""A role's thread, which can be waited for after an interruption too."""

import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context


class RoleThread(threading.Thread):
    """A thread that sees the caller's context variables (NumPy's errstate, decimal's context).

    `threading.Thread.join` takes a thread for ended once somebody was interrupted while waiting for it (Python before
    3.13), and whoever then removed its folder removed it under a thread that still computes.
    """

    def __init__(self, run: Callable[[], None], name: str | None = None) -> None:
        super().__init__(target=copy_context().run, args=(run,), name=name)
        self._over = threading.Event()
        self._over.set()

    def start(self) -> None:
        self._over.clear()
        try:
            super().start()
        except RuntimeError:  # there are too many threads to start one more
            self._over.set()
            raise

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._over.set()

    def wait(self) -> None:
        """Block until what it runs has ended; at once if it was not started."""
        self._over.wait()


def run_all(threads: Sequence[RoleThread], interrupted: Callable[[], None]) -> None:
    """Start all, and return when all have ended. `interrupted` tells them to end if this thread is to."""
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.wait()
    except BaseException:  # KeyboardInterrupt: let nobody wait for who is gone
        interrupted()
        for thread in threads:
            thread.wait()
        raise

"""A role's thread, which can be waited for after an interruption too, and the error that it ends with."""

import logging
import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context

from sl_queue.errors import ComputeError, SlQueueError

log = logging.getLogger("sl_queue")


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


def ending(role: str, error: BaseException) -> SlQueueError:
    """Return what ended a role's thread as an error of sl_queue; any other Exception is logged as a bug."""
    if isinstance(error, SlQueueError):
        return error
    told = f"{role}: {type(error).__name__}: {error}"
    if isinstance(error, Exception):
        log.error("%s: a bug in sl_queue", role, exc_info=error)
        return SlQueueError(told)
    return ComputeError(f"{told}; code that a party runs must not end its thread")  # sys.exit and its like

"""Waiting in tests: for an event, looked for often, and never for a time."""

import time
from collections.abc import Callable

WAIT_S = 200.0  # only a test that fails waits so long, or one on a very slow machine


def await_that(
    holds: Callable[[], object], what: str | Callable[[], str] = "it did not come true", timeout_s: float = WAIT_S
) -> None:
    """Block until something is so; `what` was awaited is said if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.005)

"""Retries: bounded, exponential, jittered, and each one logged with what happens next.

Only what another attempt may fix is tried again: connections. Computation and protocol errors never are.

Jitter comes from the operating system. Python's global generator, which tenacity's own waits draw from, may at that
moment be the one that a model's forward pass draws from in another thread.
"""

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_before_delay,
)

T = TypeVar("T")

log = logging.getLogger("sl_queue")


@dataclass(frozen=True, slots=True)
class Limits:
    """For how long, in seconds, a link tries before it gives up."""

    first_s: float = 30.0  # to reach the broker for the first time
    lost_s: float = 300.0  # to reach it again; also for a broker that blocks publishers, and for a queue that is full
    busy_s: float = 20.0  # for the worker that serves the same party to end
    unroutable_s: float = 30.0  # for the queue of a receiver to be there


@dataclass(frozen=True, slots=True)
class Pauses:
    """The pauses between attempts: doubled each time, with jitter."""

    first_s: float
    longest_s: float


CONNECTING = Pauses(first_s=0.2, longest_s=3.0)
LOCKING = Pauses(first_s=0.2, longest_s=1.0)  # a killed worker's socket closes at once: its replacement gets in quickly
PUBLISHING = Pauses(first_s=0.1, longest_s=5.0)


async def persist(
    attempt: Callable[[], Awaitable[T]],
    *,
    on: type[Exception] | tuple[type[Exception], ...],
    limit_s: float,
    pauses: Pauses,
    say: str,
) -> T:
    """Return what `attempt` does, trying again when it raises `on`, until `limit_s` have passed; then raise that.

    `say` begins the log line of each retry: "party 'bank': no connection to the broker".
    """

    def before_sleep(state: RetryCallState) -> None:
        pause_s = state.next_action.sleep if state.next_action is not None else 0.0
        left_s = max(0.0, limit_s - (state.seconds_since_start or 0.0))
        why = state.outcome.exception() if state.outcome is not None else None
        log.warning("%s (%s); trying again in %.1f s, for at most %.0f s more", say, why, pause_s, left_s)

    def wait(state: RetryCallState) -> float:
        return _doubled(state.attempt_number, pauses) + random.SystemRandom().uniform(0, pauses.first_s)

    retrying = AsyncRetrying(
        retry=retry_if_exception_type(on),
        stop=stop_before_delay(limit_s),
        wait=wait,
        before_sleep=before_sleep,
        reraise=True,
    )

    async def awaited() -> T:  # tenacity looks at the function, not at what it returns
        return await attempt()

    return await retrying(awaited)


def pause_s(attempt: int, pauses: Pauses) -> float:
    """Return the pause after the attempt of that number (from 1), for callers that cannot loop."""
    return random.SystemRandom().uniform(0.5, 1.5) * _doubled(attempt, pauses)


def _doubled(attempt: int, pauses: Pauses) -> float:
    return min(pauses.longest_s, pauses.first_s * 2.0 ** min(attempt - 1, 64))

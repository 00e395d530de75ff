"""Roles as threads of this process that end together: the first error that one met itself ends all."""

from collections.abc import Callable, Sequence
from functools import partial

from sl_queue.errors import PeerFailed, RunStopped, SlQueueError
from sl_queue.launch.connect import Channels
from sl_queue.local.role_thread import RoleThread, run_all


def run_together(work: Sequence[Callable[[], None]], channels: Channels, interrupted: str) -> None:
    """Run all at once, each in a thread, and return when all have ended. Raises the error of the role that failed.

    `interrupted`: the reason for the others if this thread is interrupted meanwhile.
    """
    errors: list[SlQueueError] = []

    def guarded(serve: Callable[[], None]) -> None:
        try:
            serve()
        except SlQueueError as error:
            errors.append(error)
            if not isinstance(error, RunStopped):
                channels.fail(RunStopped(f"another role of this process failed: {error}"))

    threads = [RoleThread(partial(guarded, serve)) for serve in work]
    run_all(threads, interrupted=lambda: channels.fail(RunStopped(interrupted)))
    if errors:
        raise min(errors, key=lambda error: 2 * isinstance(error, RunStopped) + isinstance(error, PeerFailed))

"""Roles as threads of this process that end together: the first error that one met itself ends all."""

from collections.abc import Callable, Mapping
from functools import partial

from sl_queue.errors import PeerFailed, RunStopped, SlQueueError
from sl_queue.launch.connect import Channels
from sl_queue.local.role_thread import RoleThread, ending, run_all
from sl_queue.protocol.messages import SCHEDULER


def run_together(work: Mapping[str, Callable[[], None]], channels: Channels, interrupted: str) -> None:
    """Run all at once, each in a thread, and return when all have ended. Raises the error of the role that failed.

    `work`: by role. `interrupted`: the reason for the others if this thread is interrupted meanwhile.
    """
    errors: list[SlQueueError] = []

    def guarded(role: str, serve: Callable[[], None]) -> None:
        try:
            serve()
        except BaseException as error:  # of any kind, or the others would wait for whoever is gone
            errors.append(end := ending("the scheduler" if role == SCHEDULER else f"party {role!r}", error))
            if not isinstance(end, RunStopped):
                channels.fail(RunStopped(f"another role of this process failed: {end}"))

    threads = [RoleThread(partial(guarded, role, serve)) for role, serve in work.items()]
    run_all(threads, interrupted=lambda: channels.fail(RunStopped(interrupted)))
    if errors:
        raise min(errors, key=lambda error: 2 * isinstance(error, RunStopped) + isinstance(error, PeerFailed))

"""The recovery law at a commit, one at a time and beside what comes next.

Sends are confirmed, then the checkpoint is on disk, then receives are acknowledged.
"""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial

from sl_queue.protocol.events import Committed
from sl_queue.transport.shared import Shared
from sl_queue.transport.waiting import waiting


class Commits:
    """The commit that is under way, if any. Mutable; used by the worker's thread alone.

    `check` raises what ends a worker that waits; it is called with the lock held.
    """

    def __init__(self, shared: Shared, executor: Executor, check: Callable[[], None]) -> None:
        self._link, self._timeline, self._changed = shared.link, shared.timeline, shared.changed
        self._liveness, self._observe, self._patience_s = shared.liveness, shared.observe, shared.patience_s
        self._party = shared.party
        self._executor, self._check = executor, check
        self._under_way: Future[None] | None = None

    def begin(self, step: int, save: Callable[[], None]) -> None:
        """Commit `step` on the executor; the one before has been waited for."""
        self._under_way = self._executor.submit(partial(self._commit, step, save, self._link.mark()))
        self._under_way.add_done_callback(self._notify)

    @property
    def has_ended(self) -> bool:
        """True if one has ended that nobody has waited for."""
        return self._under_way is not None and self._under_way.done()

    def wait(self) -> None:
        """Block until the last one has ended. Raises what it raised, once."""
        commit, self._under_way = self._under_way, None
        if commit is not None:
            with waiting(self._observe, self._party, "disk", "commit"):
                commit.result()

    def flush(self) -> None:
        """Block until the broker has confirmed everything sent so far."""
        with waiting(self._observe, self._party, "broker", "confirm"):
            self._await_confirms(self._link.mark())

    def close(self) -> None:
        """Block until nothing runs any more."""
        self._executor.shutdown()

    def _commit(self, step: int, save: Callable[[], None], mark: int) -> None:
        began = time.monotonic()
        self._await_confirms(mark)
        save()
        with self._changed:
            tags = self._timeline.commit(step)
        self._link.acknowledge(tags)
        self._observe(Committed(self._party, self._timeline.generation, step, time.monotonic() - began))

    def _await_confirms(self, mark: int) -> None:
        """Block until what was sent up to the mark is confirmed: there is always more, and it would never end.

        A broker that is away is waited for as long as the link tries to reach it.
        """
        began, name_at = time.monotonic(), self._patience_s
        timeout_s, connected_s = min(1.0, self._patience_s), 0.0
        while not self._link.flush(timeout_s, mark):
            with self._changed:
                self._check()
            connected_s += timeout_s if self._link.connectivity.connected else 0.0
            waited = time.monotonic() - began
            if waited >= name_at:
                name_at += self._patience_s
                self._liveness.name_broker(waited, connected_s)

    def _notify(self, _: Future[None]) -> None:
        with self._changed:
            self._changed.notify_all()

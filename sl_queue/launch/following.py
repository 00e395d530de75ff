"""The statuses of a run for as long as somebody watches, over one connection to the broker."""

import threading
import time
from typing import Protocol

from sl_queue.config.job import Job
from sl_queue.errors import SlQueueError
from sl_queue.launch.connect import require_network
from sl_queue.launch.operator import Statuses, is_of, require_of
from sl_queue.protocol.scheduler.status import RunStatus
from sl_queue.security.sealing import Seal

SILENT_S = 3.0  # without news the connection is given up: the last status goes back for others who ask
PAUSE_S = 2.0  # before it is made again
ENDED_PAUSE_S = 5.0  # after the end of a run
STEP_S = 0.5


class Watcher(Protocol):
    """Takes what is heard, on the follower's thread."""

    def take(self, status: RunStatus, age_s: float = 0.0) -> None:
        """Take a status that the scheduler reported `age_s` ago."""

    def trouble(self, problem: str) -> None:
        """Note why nothing can be heard of the run."""


class Follower:
    """Follows a run in a thread of its own while the body runs.

    Beside it `sl-queue status` and `stop` go on to work: a status goes to one of those who listen, and the scheduler
    tells four a second.
    """

    def __init__(self, job: Job, broker: str, seal: Seal | None, watcher: Watcher) -> None:
        require_network(broker)
        self._job, self._broker, self._seal, self._watcher = job, broker, seal, watcher
        self._ended = threading.Event()
        self._told_at: str | None = None  # of the newest status that was passed on
        self._over = False
        self._thread = threading.Thread(target=self._follow, name="status", daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.is_set():
            try:
                statuses = Statuses(self._job, self._broker, self._seal)
                try:
                    self._listen(statuses)
                finally:
                    statuses.close()
            except SlQueueError as error:
                self._watcher.trouble(str(error))
            self._ended.wait(ENDED_PAUSE_S if self._over else PAUSE_S)

    def _listen(self, statuses: Statuses) -> None:
        """Pass on what comes until nothing more does. Raises as `Statuses.next`; JobError for another job's run."""
        began = heard = time.monotonic()
        while not self._ended.is_set():
            told = statuses.next(STEP_S)
            now = time.monotonic()
            if told is not None and told.run.told_at != self._told_at:
                first = heard == began  # it may have lain there for long
                heard = now
                if first and not is_of(self._job, told.run):
                    continue
                require_of(self._job, told.run)
                self._told_at, self._over = told.run.told_at, told.run.over
                self._watcher.take(told.run, (told.run.age_s(time.time()) or 0.0) if first else 0.0)
            elif now - heard >= SILENT_S:
                if self._told_at is None:
                    self._watcher.trouble("no scheduler has reported anything of this job at that broker yet")
                return

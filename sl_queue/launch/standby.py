"""A standby: a second worker of a party, which waits for the state folder of the first and goes on when that is gone.

The law: until the folder's lock is its own it neither writes there nor speaks to the broker, so nobody takes it for its
party. The kernel gives the lock away the moment its holder is gone, however that ended. A holder that ended for good,
or on purpose, has left its error in the folder; the standby ends with the same.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from sl_queue.config.job import Job
from sl_queue.errors import JobError, SlQueueError
from sl_queue.launch.prepared import Ahead
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol import events
from sl_queue.storage.ended_file import note_end, read_end
from sl_queue.storage.files import Held, lock, unusable

LOOK_S = 0.01  # between two looks at the lock
ELSEWHERE_S = 5.0  # within which a worker that has just taken the lock writes down where it runs


Prepare = Callable[[], Ahead | None]


@dataclass(frozen=True, slots=True)
class Turn:
    """The state folder's lock, and what was prepared while it was waited for."""

    locked: FileLock | None = None
    ahead: Ahead | None = None
    waited: bool = False


def await_turn(job: Job, party: str, place: Workplace, metrics: str | None, prepare: Prepare) -> Turn:
    """Wait until no other worker has the state folder; at once if none has.

    `prepare` makes what can be made ahead, None as long as nothing can. `metrics`: where a page says that this is a
    standby. Raises the error with which the other ended, and JobError for one on another machine.
    """
    try:
        place.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Turn(lock(place.state))
    except Held as held:
        place.observe(events.StandsBy(party, held.holder))
    except OSError as error:
        raise unusable(place.state, error) from error
    with _shown(metrics, job.name, party):
        turn = _wait(party, place, prepare)
    assert turn.locked is not None
    end = read_end(place.state)
    if end is not None:
        turn.locked.release()
        raise end
    return turn


def _wait(party: str, place: Workplace, prepare: Prepare) -> Turn:
    ahead, here = None, time.monotonic()  # when a worker of this machine was last seen
    while True:
        try:
            return Turn(lock(place.state), ahead, waited=True)
        except Held as held:
            now = time.monotonic()
            here = here if held.elsewhere else now
            if now - here > ELSEWHERE_S:
                raise _on_another_machine(party, place.state) from None
        except OSError as error:
            raise unusable(place.state, error) from error
        if ahead is None:
            ahead = prepare()
            if ahead is not None:
                place.observe(events.Prepared(party, "standby"))
        time.sleep(LOOK_S)


def _on_another_machine(party: str, state: Path) -> JobError:
    return JobError(
        f"party {party!r}: a worker on another machine has the state folder {state}, and a standby cannot see when it "
        "is gone; start it on the same machine, or without --standby when the other has ended"
    )


@contextmanager
def ending_noted(state: Path) -> Iterator[None]:
    """Leave the error with which the body ends in the state folder, which is locked, for a standby to end with."""
    try:
        yield
    except SlQueueError as error:
        note_end(state, error)
        raise


@contextmanager
def _shown(address: str | None, job: str, party: str) -> Iterator[None]:
    if address is None:
        yield
        return
    from sl_queue.observe.prometheus import serve_standby

    server = serve_standby(address, job, party)
    try:
        yield
    finally:
        server.close()

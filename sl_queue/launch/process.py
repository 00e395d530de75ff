"""Ends of every program of sl_queue: one clear message on stderr, and the exit code that a supervisor acts on.

The codes are those of `errors`; 130 after Ctrl-C. Anything else that is raised is a bug and keeps its traceback.
"""

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sl_queue.config.environment import DEBUG
from sl_queue.errors import RunStopped, SlQueueError

INTERRUPTED = 130


def say(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)


Say = Callable[[str], None]


@contextmanager
def leaving(
    on_interrupt: str = "interrupted", say: Say = say, on_end: Callable[[SlQueueError], None] = lambda _: None
) -> Iterator[None]:
    """Turn an error of the body into its message and exit code; `on_end` gets it before it is said."""
    try:
        yield
    except RunStopped as stopped:
        on_end(stopped)
        say(f"stopped: {stopped}")
        raise SystemExit(stopped.exit_code) from None
    except SlQueueError as error:
        if DEBUG.read():
            traceback.print_exc()
        on_end(error)
        say(f"error: {error}")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        say(on_interrupt)
        raise SystemExit(INTERRUPTED) from None


def leave_on_sigterm(say: Say = say, *, after: str = "") -> None:
    """Have SIGTERM end this process at once: by the recovery law nothing needs to be tidied up.

    `after` is said behind that: how it goes on.
    """

    def leave(number: int, _: FrameType | None) -> None:
        say(f"asked to end (SIGTERM){after}")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)  # the kernel spares a container's first process its default signals

    signal.signal(signal.SIGTERM, leave)


def keep_from_collector() -> None:
    """Have Python's collector never look again at what is here now.

    A look through all that a service is made of takes 0.1 s, in which nobody is answered.
    """
    gc.collect()
    gc.freeze()

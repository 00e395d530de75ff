"""How every program of sl_queue ends: one clear message on stderr, and the exit code that a supervisor acts on.

The codes are those of `errors`; 130 after Ctrl-C. Anything else that is raised is a bug and keeps its traceback.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sl_queue.config.environment import DEBUG
from sl_queue.errors import RunStopped, SlQueueError

INTERRUPTED = 130


@contextmanager
def leaving(on_interrupt: str = "interrupted") -> Iterator[None]:
    """Turn an error of the body into its message and exit code."""
    try:
        yield
    except RunStopped as stopped:
        _say(f"stopped: {stopped}")
        raise SystemExit(stopped.exit_code) from None
    except SlQueueError as error:
        if DEBUG.read():
            traceback.print_exc()
        _say(f"error: {error}")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        _say(on_interrupt)
        raise SystemExit(INTERRUPTED) from None


def leave_on_sigterm() -> None:
    """SIGTERM ends this process at once: by the recovery law nothing needs to be tidied up."""
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, _: FrameType | None) -> None:
    _say("asked to end (SIGTERM); a restart resumes from the last checkpoint")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the kernel spares a container's first process its default signals


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

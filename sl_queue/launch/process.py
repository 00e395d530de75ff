"""Ends of every program of sl_queue: one clear message on stderr, and the exit code that a supervisor acts on.

The codes are those of `errors`; 130 after Ctrl-C. Anything else that is raised is a bug and keeps its traceback.

The law: an exit code says how the work ended, also where nothing takes what is said of it: a full disk, a pipe that
nobody reads.
"""

import errno
import gc
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sl_queue.config.environment import DEBUG
from sl_queue.errors import RunStopped, SlQueueError

INTERRUPTED = 130
UNSHOWN = 74  # as EX_IOERR of sysexits.h


def say(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)


Say = Callable[[str], None]


class _Spared(io.FileIO):
    """A standard stream that never raises. Mutable: it keeps why it last took nothing."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # it does not block, and is full
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            self.lost = error
            return len(data)


def _spare(name: str) -> _Spared:
    """Put a stream that never raises in the place of one."""
    stream = getattr(sys, name)
    if stream is None:  # the program was started without it
        raw = _Spared(os.devnull, "w")
        raw.lost = OSError(errno.EBADF, os.strerror(errno.EBADF))
    else:
        try:
            raw = _Spared(stream.fileno(), "w", closefd=False)
        except (AttributeError, io.UnsupportedOperation):  # memory, which takes all
            return _Spared(os.devnull, "w")
    encoding, errors = getattr(stream, "encoding", "utf-8"), getattr(stream, "errors", "backslashreplace")
    by_line = getattr(stream, "line_buffering", False) or getattr(stream, "write_through", False)
    setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=by_line))
    return raw


def spare_stderr() -> None:
    """Have this program go on, and end with the same code, where stderr cannot be written."""
    _spare("stderr")


@contextmanager
def showing() -> Iterator[None]:
    """Exit with UNSHOWN where the body succeeds and stdout did not take what it showed; a failure keeps its code.

    Who closes a pipe has seen enough: then nothing is said of it.
    """
    raw = _spare("stdout")
    ended: SystemExit | None = None
    try:
        yield
    except SystemExit as end:
        ended = end
    sys.stdout.flush()
    if raw.lost is not None and (ended is None or not ended.code):
        if not isinstance(raw.lost, BrokenPipeError):
            say(f"error: stdout cannot be written ({raw.lost.strerror}): what this command found is not shown whole")
        raise SystemExit(UNSHOWN) from None
    if ended is not None:
        raise ended


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
        try:
            say(f"asked to end (SIGTERM){after}")
        finally:  # also where this came in the middle of another line
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

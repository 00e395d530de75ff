"""Events and log records as JSON, one a line: on stderr (SL_QUEUE_LOG_FORMAT=json) and in a file (SL_QUEUE_EVENTS)."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from sl_queue.errors import JobError
from sl_queue.protocol.event_json import as_json, from_json
from sl_queue.protocol.events import Event, PerMessage

log = logging.getLogger("sl_queue")

COUNTED = get_args(PerMessage)
UNWRITABLE = "%s cannot be written (%s): from now on it lacks the events of this process"


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON; that of an event has its fields besides its words."""

    def format(self, record: logging.LogRecord) -> str:
        event = getattr(record, "event", None)
        fields = {} if event is None else as_json(event)
        values = {**_stamp(record.created), "level": record.levelname.lower(), **fields, "message": record.getMessage()}
        if record.exc_info is not None:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values)


def error_line(text: str) -> str:
    """Write what a process says at its end as a line of the log."""
    return json.dumps({**_stamp(), "level": "error", "message": text})


class EventFile:
    """Appends events to a file, each with one write: what was written survives the process, however it ends.

    Events that come several times a step are left out. Several processes may share a file. Mutable: a file that cannot
    be written is given up.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise JobError(
                f"SL_QUEUE_EVENTS = {str(path)!r}: {error.strerror}; name a file that can be written"
            ) from None
        self._given_up = False

    def __call__(self, event: Event, /) -> None:
        """Append an event."""
        if isinstance(event, COUNTED) or self._given_up:
            return
        values = {**_stamp(), "clock": time.monotonic(), "pid": os.getpid(), **as_json(event)}
        try:
            os.write(self._descriptor, f"{json.dumps(values)}\n".encode())
        except OSError as error:
            self._given_up = True
            log.warning(UNWRITABLE, self._path, error.strerror)


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of an event file."""

    at_s: float  # by the machine's monotonic clock, the same for all of its processes
    pid: int
    event: Event


def entries(text: str) -> Iterator[Entry]:
    """Read the lines of an event file; what is no event of this version is passed over, as is a torn last line."""
    for line in text.splitlines():
        try:
            values = json.loads(line)
            event = from_json(values)
            if event is not None:
                yield Entry(float(values["clock"]), int(values["pid"]), event)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue


def _stamp(at_s: float | None = None) -> Mapping[str, Any]:
    now = datetime.now(UTC) if at_s is None else datetime.fromtimestamp(at_s, UTC)
    return {"at": now.isoformat(timespec="microseconds")}

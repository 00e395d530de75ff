"""Environment variables of a worker: what each means, what it may be, and what it is without one.

One table, so that a wrong value is one line that names variable, value and what is allowed, before anything starts.
Where a broker and a key are (SL_QUEUE_BROKER, SL_QUEUE_KEY) is read by those who use them: any text may be one.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sl_queue.errors import JobError

MOST_THREADS = 4096
LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable. `parse` raises ValueError for a text that is none of `allowed`."""

    name: str
    allowed: str
    default: Any
    parse: Callable[[str], Any]

    def read(self, environ: Mapping[str, str] = os.environ) -> Any:
        """Parse its value; the default where it is not set, or empty. Raises JobError."""
        text = environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError:
            raise JobError(f"{self.name} = {text[:80]!r}; it must be {self.allowed}") from None


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(text)
        return int(text)

    return parse


def _level(text: str) -> str:
    if text.lower() not in LEVELS:
        raise ValueError(text)
    return text.lower()


def _format(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError(text)
    return text


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if any(not character.isprintable() or character.isspace() for character in host):
        raise ValueError(text)
    _whole(1, 65535)(port)
    return text


THREADS = Variable(
    "SL_QUEUE_THREADS",
    f"a whole number from 1 to {MOST_THREADS}: torch's threads; 0 or nothing leaves them to torch",
    0,
    _whole(0, MOST_THREADS),
)
LOG = Variable("SL_QUEUE_LOG", f"{', '.join(LEVELS)}; debug has a line for every step", "info", _level)
LOG_FORMAT = Variable(
    "SL_QUEUE_LOG_FORMAT", "text or json: one event or log record a line, with its fields", "text", _format
)
EVENTS = Variable(
    "SL_QUEUE_EVENTS", "a path: a file to which the worker appends its events, one a line in JSON", None, Path
)
METRICS = Variable(
    "SL_QUEUE_METRICS_PORT", "[HOST:]PORT, the port from 1 to 65535: where Prometheus may ask", None, _address
)
FINAL_EXIT = Variable(
    "SL_QUEUE_FINAL_EXIT",
    "a whole number from 0 to 255: the exit code instead of those that no restart mends",
    None,
    _whole(0, 255),
)
LOCAL = Variable(
    "SL_QUEUE_LOCAL",
    "1 where one person holds the files of all parties, on one machine: draws follow from the job's seed alone; or 0",
    False,
    _flag,
)
PARENT = Variable(
    "SL_QUEUE_PARENT", "a process number: the process with which a worker ends", None, _whole(1, 999_999_999)
)

VARIABLES = (THREADS, LOG, LOG_FORMAT, EVENTS, METRICS, FINAL_EXIT, LOCAL, PARENT)


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Raise one JobError for everything that is wrong."""
    problems = []
    for variable in VARIABLES:
        try:
            variable.read(environ)
        except JobError as error:
            problems.append(str(error))
    if problems:
        raise JobError("\n  ".join(problems))

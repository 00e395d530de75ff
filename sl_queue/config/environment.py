"""Environment variables: the meaning, the allowed values and the default of every one that sl_queue reads.

One table, so that a wrong value is one line that names variable, value and what is allowed, before anything starts.
No other module reads a variable that begins with SL_QUEUE_; docs/reference.md is made of this table.
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
    """One environment variable. `parse` raises ValueError for a text that is not allowed."""

    name: str
    allowed: str
    default: Any
    parse: Callable[[str], Any]
    meaning: str = ""

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


def _truth(text: str) -> bool:
    return text != "0"


THREADS = Variable(
    "SL_QUEUE_THREADS",
    f"a whole number from 1 to {MOST_THREADS}: torch's threads; 0 or nothing leaves them to torch",
    0,
    _whole(0, MOST_THREADS),
    "Number of torch threads of a worker, where its party file says nothing.",
)
LOG = Variable(
    "SL_QUEUE_LOG",
    f"{', '.join(LEVELS)}; debug has a line for every step",
    "info",
    _level,
    "Level of a worker's log.",
)
LOG_FORMAT = Variable(
    "SL_QUEUE_LOG_FORMAT",
    "text or json: one event or log record a line, with its fields",
    "text",
    _format,
    "Form of a worker's log.",
)
EVENTS = Variable(
    "SL_QUEUE_EVENTS",
    "a path: a file to which the worker appends its events, one a line in JSON",
    None,
    Path,
    "File of a worker's events; several workers of one machine may share it.",
)
METRICS = Variable(
    "SL_QUEUE_METRICS_PORT",
    "[HOST:]PORT, the port from 1 to 65535: where Prometheus scrapes",
    None,
    _address,
    "Address of a worker's metrics and health, where --metrics-port is not given; without both there are none.",
)
FINAL_EXIT = Variable(
    "SL_QUEUE_FINAL_EXIT",
    "a whole number from 0 to 255: the exit code instead of those that no restart fixes",
    None,
    _whole(0, 255),
    "Exit code of a worker that no restart helps, for container engines that cannot tell codes apart.",
)
LOCAL = Variable(
    "SL_QUEUE_LOCAL",
    "1 where one person holds the files of all parties, on one machine: draws follow from the job's seed alone; or 0",
    False,
    _flag,
    "Set by `sl-queue local` and `sl-queue chaos` for the workers that they start.",
)
PARENT = Variable(
    "SL_QUEUE_PARENT",
    "a process number: the process with which a worker ends",
    None,
    _whole(1, 999_999_999),
    "Set by `sl-queue local` and `sl-queue chaos` for the workers that they start.",
)
BROKER = Variable(
    "SL_QUEUE_BROKER",
    "a URL like amqps://user:password@host:5671/vhost, or file:PATH of a file with one",
    None,
    str,
    "Broker of a worker or a command, where --broker is not given; comes before the `broker` of a party file.",
)
HANDS_BROKER = Variable(
    "SL_QUEUE_HANDS_BROKER",
    "a URL like amqps://user:password@host:5671/vhost, or file:PATH of a file with one",
    None,
    str,
    "Broker between a worker and its hands; comes before `broker` under [hands] in a party file.",
)
KEY = Variable(
    "SL_QUEUE_KEY",
    "the name of a file",
    None,
    str,
    "Private key of a worker or a command, where --key is not given; comes before the key of a party file.",
)
DEBUG = Variable("SL_QUEUE_DEBUG", "1 or 0", False, _truth, "Shows the traceback of every error, as --debug does.")
RABBITMQ_SERVER = Variable(
    "SL_QUEUE_RABBITMQ_SERVER",
    "the name of a program",
    None,
    str,
    "The rabbitmq-server that `sl-queue chaos` and sl_queue.testing start; without it, the one that is installed.",
)

VARIABLES = (
    *(THREADS, LOG, LOG_FORMAT, EVENTS, METRICS, FINAL_EXIT, LOCAL, PARENT),
    *(BROKER, HANDS_BROKER, KEY, DEBUG, RABBITMQ_SERVER),
)


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

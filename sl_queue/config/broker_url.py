"""A broker's URL in an option, a variable or a party file: checked, read where it lies, shown without its password."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from sl_queue.config.schema import Schema, redacted
from sl_queue.errors import JobError
from sl_queue.protocol.broker_url import fault
from sl_queue.security.private_file import read_secret

FORM = "memory:// or a URL like amqps://user:password@host:5671/vhost, or file:PATH of a file with one"
_IN_FILE = "file:"


def problem_of(url: str) -> str | None:
    """Describe what is wrong with a broker's URL, without its password; None if nothing is."""
    if url == "memory://" or url.startswith(_IN_FILE) or fault(url) is None:
        return None
    return f"{redacted(url)!r}: {fault(url)}; it must be {FORM}"


def _checked(url: str) -> str:
    problem = problem_of(url)
    if problem is not None:
        raise ValueError(f"= {problem}")
    return url


BrokerUrl = Annotated[str, AfterValidator(_checked)]


class HasBroker(Schema):
    """A table with a `broker`, whose password no repr shows."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, redacted(value) if name == "broker" and value is not None else value


def read_url(url: str, folder: Path | None = None, *, again: bool = False) -> str:
    """Read a broker's URL; file:PATH stands for what is in that file, so that no password stands anywhere else.

    Raises JobError for a file that cannot be read, or that others may read, as a private key.
    """
    if not url.startswith(_IN_FILE):
        return url
    path = (Path() if folder is None else folder) / url.removeprefix(_IN_FILE)
    try:
        return read_secret(path, "URL with its password", again=again).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise JobError(f"{url}: the broker's URL cannot be read: {reason}") from None

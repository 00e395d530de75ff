"""A broker's URL, read in words of our own.

The law: a secret never appears in a library's words. An exception of urllib or pika shows the piece that it could not
read, and where a password was not escaped, that piece is the password.
"""

import re
from urllib.parse import SplitResult, parse_qs, urlsplit

from sl_queue.errors import JobError

FORM = "amqp://USER:PASSWORD@HOST:PORT/VHOST, or amqps://"
ESCAPES = "in a password, write @ as %40, / as %2F, : as %3A, # as %23, ? as %3F"
TLS_OPTIONS = ("cacertfile", "certfile", "keyfile", "auth_mechanism")  # as in RabbitMQ's own URIs
OPTIONS = (  # pika's
    *("blocked_connection_timeout", "channel_max", "client_properties", "connection_attempts", "frame_max"),
    *("heartbeat", "locale", "retry_delay", "socket_timeout", "ssl_options", "stack_timeout", "tcp_options"),
)


def split(url: str) -> SplitResult:
    """Split a URL that has passed `fault`. Raises JobError for any other."""
    found = fault(url)
    if found is not None:
        raise unusable(found)
    return _parts(url)


def _parts(url: str) -> SplitResult:
    """Split a URL with any number of hosts: some versions of urlsplit refuse several with an IPv6 address."""
    scheme, _, rest = url.partition("://")
    netloc, mark, tail = re.fullmatch(r"([^/?]*)([/?]?)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    path, _, query = (mark + tail).partition("?")
    return SplitResult(scheme, netloc, path, query, "")


def unusable(why: str) -> JobError:
    """Make the error of a URL that cannot be used; `why` is in our words."""
    return JobError(f"the broker's URL cannot be used: {why}")


def fault(url: str) -> str | None:
    """Say what is wrong with a URL without showing any of it; None if nothing is."""
    if not re.match(r"amqps?://", url):
        return f"it must be {FORM}"
    if not url.isprintable() or " " in url:
        return f"it holds a space or a character that cannot be seen; {ESCAPES}"
    if "#" in url:
        return f"it holds a #, which ends it there; {ESCAPES}"
    try:
        parts = _parts(url)
        options = parse_qs(parts.query, keep_blank_values=True)
        found = _nodes_fault(parts) or _rest_fault(parts, options)
    except ValueError:
        found = "it cannot be read"
    return None if found is None else f"{found}; {ESCAPES}"


def _nodes_fault(parts: SplitResult) -> str | None:
    for node in parts.netloc.rpartition("@")[2].split(","):
        try:
            host, port = urlsplit(f"//{node}").hostname, urlsplit(f"//{node}").port
        except ValueError:
            return "the port is not a number from 1 to 65535"
        if not host:
            return f"a host is missing: it must be {FORM}"
        try:
            host.encode("idna")  # as a look-up does
        except UnicodeError:
            return "a host has an empty part between its dots, one of more than 63 characters, or one that no name has"
        if port == 0:
            return "the port is not a number from 1 to 65535"
    return None


def _rest_fault(parts: SplitResult, options: dict[str, list[str]]) -> str | None:
    if "@" in parts.path + parts.query:
        return "an @ stands after the host"
    if not options.keys() <= {*TLS_OPTIONS, *OPTIONS}:
        return f"what follows its ? is not an option; options are {', '.join(sorted((*TLS_OPTIONS, *OPTIONS)))}"
    twice = next((name for name, values in options.items() if len(values) > 1), None)
    return None if twice is None else f"the option {twice} is given twice"

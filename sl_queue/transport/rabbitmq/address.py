"""Addresses of a broker's nodes and the login there: a user's URL becomes what pika wants."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, urlencode, urlsplit

import pika

from sl_queue.protocol.broker_url import ESCAPES, FORM, TLS_OPTIONS, split, unusable

HEARTBEAT_S = 15  # a half-open connection is noticed after 20 s here, after 30 s at the broker
CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a broker node and a login; its text never shows a password."""

    url: str = field(repr=False)
    host: str
    port: int
    vhost: str
    user: str

    @classmethod
    def parse(cls, url: str) -> "tuple[Address, ...]":
        """Return the nodes of `amqp://USER:PASSWORD@HOST:PORT,HOST:PORT/VHOST`. Raises JobError for another text."""
        parts = split(url)
        login, at, hosts = parts.netloc.rpartition("@")
        try:
            return tuple(cls._of(parts._replace(netloc=f"{login}{at}{host}")) for host in hosts.split(","))
        except _Unusable as error:
            raise unusable(str(error)) from None
        except (ValueError, TypeError, SyntaxError, OSError):  # in words that may show a password
            raise unusable(f"{_wrong_option(parts)}; {ESCAPES}") from None

    @classmethod
    def _of(cls, parts: SplitResult) -> "Address":
        host, port = parts.hostname, parts.port or (5671 if parts.scheme == "amqps" else 5672)
        if not host:
            raise _Unusable(f"a host is missing: it must be {FORM}")
        if parts.username is not None and parts.password is None:  # pika wants one
            parts = parts._replace(netloc=f"{parts.username}:@{parts.netloc.rpartition('@')[2]}")
        vhost, user = unquote(parts.path[1:]) or "/", unquote(parts.username or "guest")
        address = cls(parts.geturl(), host, port, vhost, user)
        address.parameters("")
        return address

    def parameters(self, name: str) -> pika.URLParameters:
        """Return the parameters for pika; options in the URL's query are the user's own."""
        parts = urlsplit(self.url)
        own = parse_qs(parts.query)
        tls = {name: own.pop(name)[-1] for name in TLS_OPTIONS if name in own}  # pika does not know them
        parameters = pika.URLParameters(parts._replace(query=urlencode(own, doseq=True)).geturl())
        if tls:
            _secure(parameters, self.host, tls)
        if "heartbeat" not in own:
            parameters.heartbeat = HEARTBEAT_S
        if parameters.ssl_options is not None and parameters.ssl_options.server_hostname is None:
            parameters.ssl_options.server_hostname = self.host
        parameters.socket_timeout = parameters.stack_timeout = CONNECT_S
        parameters.connection_attempts = 1
        parameters.client_properties = {"connection_name": name}
        return parameters

    @property
    def files(self) -> Mapping[str, str]:
        """Certificates and keys by option: cacertfile, certfile, keyfile."""
        own = parse_qs(urlsplit(self.url).query)
        return {name: own[name][-1] for name in _FILES if name in own}

    def __str__(self) -> str:
        return f"{self.host}:{self.port}, virtual host {self.vhost!r}"


class _Unusable(ValueError):
    """A fault of a URL in words of our own, which show no secret."""


def _wrong_option(parts: SplitResult) -> str:
    """Name the options of which one has a value that pika does not take; never a value."""
    given = sorted(parse_qs(parts.query))
    return f"an option has a value that it cannot have; given are {', '.join(given)}" if given else "it cannot be read"


_FILES = ("cacertfile", "certfile", "keyfile")
_TLS_OPTIONS = (*_FILES, "auth_mechanism")  # as in RabbitMQ's own URIs


def _secure(parameters: pika.URLParameters, host: str, options: Mapping[str, str]) -> None:
    """Return whom to trust, and how to log in with a certificate. Raises ValueError, OSError."""
    for name in _FILES:
        if name in options and not Path(options[name]).is_file():
            raise _Unusable(f"{name} = {options[name]!r}: there is no such file")
    mechanism = options.get("auth_mechanism", "plain")
    if mechanism not in ("plain", "external"):
        raise _Unusable("auth_mechanism must be plain or external")
    try:
        context = ssl.create_default_context(cafile=options.get("cacertfile"))
        if "certfile" in options:
            context.load_cert_chain(options["certfile"], options.get("keyfile"))
    except OSError as error:
        why = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise _Unusable(f"cacertfile, certfile or keyfile cannot be used: {why}") from None
    if mechanism == "external":
        parameters.credentials = pika.credentials.ExternalCredentials()
    parameters.ssl_options = pika.SSLOptions(context, host)

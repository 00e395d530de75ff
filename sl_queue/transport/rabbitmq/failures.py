"""Failures of a connection, in our words: pika's exceptions end here."""

import ssl
from collections.abc import Iterator

from pika.exceptions import (
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from sl_queue.transport.rabbitmq.address import Address
from sl_queue.transport.rabbitmq.certificates import refused


class Lost(Exception):
    """There is no connection, or no longer: trying again may help."""


class Denied(Exception):
    """The broker will not have us: wrong password, missing virtual host, missing rights. Says what to do."""


class Refused(Exception):
    """The broker closed a channel because of what was asked there."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


def said(error: BaseException) -> str:
    """Describe a driver's exception in words."""
    if isinstance(error, ConnectionClosedByBroker | ChannelClosedByBroker):
        return str(error.reply_text)
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {cause.reason or cause}"
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused: nothing listens there"
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
    return str(causes[-1]) or type(causes[-1]).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Return the exception and those that it wraps, outermost first; pika has three ways to wrap one."""
    yield error
    inner = [*error.args, getattr(error, "exception", None), *getattr(error, "exceptions", ()), error.__cause__]
    for each in reversed(inner):  # of several attempts the last
        if isinstance(each, BaseException):
            yield from _causes(each)
            return


def why_not(error: BaseException, address: Address) -> Lost | Denied:
    """Explain why a connection could not be opened, and whether another attempt may help."""
    causes = list(_causes(error))
    text = " ".join(str(cause) for cause in causes)
    if any(isinstance(cause, ProbableAuthenticationError) for cause in causes) and "ACCESS_REFUSED" in text:
        return Denied(f"user {address.user!r} was refused: wrong user name or password in the broker's URL")
    if any(isinstance(cause, ProbableAccessDeniedError) for cause in causes) and "is down" not in text:
        if "not found" in text:
            return Denied(f"there is no virtual host {address.vhost!r}: rabbitmqctl add_vhost {address.vhost}")
        if "refused for user" in text:
            return Denied(
                f"user {address.user!r} has no rights on virtual host {address.vhost!r}: "
                f"rabbitmqctl set_permissions -p {address.vhost} {address.user} CONFIGURE WRITE READ"
            )
    for cause in causes:
        if isinstance(
            cause, ssl.SSLEOFError | ssl.SSLZeroReturnError
        ):  # it closed in the middle: it is busy, or being started or stopped
            return Lost("TLS failed: the broker closed the connection during the handshake")
        if isinstance(cause, ssl.SSLError):
            return Denied(refused(cause, address))
    return Lost(said(error))


def unusable(error: ValueError | OSError) -> Denied:
    """Describe files that the broker's URL names and that cannot be read any more: a certificate is being replaced."""
    what = (error.strerror if isinstance(error, OSError) else None) or error
    return Denied(f"the certificates that the broker's URL names cannot be used now: {what}")

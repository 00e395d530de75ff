"""Helpers for tests of a RabbitMQ link: short limits, logins, and a look at the broker from outside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pika

from sl_queue.transport.retry import Limits
from tests.support.links import Inbox

LIMITS = Limits(first_s=60.0, lost_s=120.0, busy_s=1.0, unroutable_s=60.0)  # what a slow machine never reaches
Connect = Callable[..., Inbox]


def with_login(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}").geturl()


def in_order(bodies: list[bytes]) -> list[bytes]:
    """Return what arrived, without what came again."""
    return list(dict.fromkeys(bodies))


@contextmanager
def at_the_broker(url: str) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        yield connection.channel()

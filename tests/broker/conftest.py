"""Fixtures of tests of a RabbitMQ link: a virtual host of their own, links to it, and a proxy before it."""

from collections.abc import Iterator

import pytest

from sl_queue.testing.proxy import Proxy
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.retry import Limits
from tests.support.broker import Broker
from tests.support.links import Inbox, two_parties
from tests.support.rabbit import LIMITS, Connect


@pytest.fixture
def vhost(private_broker: Broker, unique: str) -> Iterator[str]:
    """Yield a virtual host of a broker that may be treated badly."""
    private_broker.url(unique)
    yield unique
    private_broker.delete_vhost(unique)


@pytest.fixture
def url(private_broker: Broker, vhost: str) -> str:
    return private_broker.url(vhost)


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    """Open links, which are closed at the end."""
    links: list[RabbitLink] = []

    def connect(party: str, at: str = url, *, prefetch: int = 0, limits: Limits = LIMITS) -> Inbox:
        links.append(RabbitLink(at, party, two_parties(), prefetch, limits=limits))
        return Inbox(links[-1]).open()

    yield connect
    for link in links:
        link.close()


@pytest.fixture
def proxy(private_broker: Broker) -> Iterator[Proxy]:
    with Proxy(private_broker.port) as proxy:
        yield proxy

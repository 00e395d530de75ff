"""Whatever answers where a broker should, a person's command says what it is, as workers do, without a traceback."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from sl_queue.errors import BrokerUnreachable
from sl_queue.protocol.messages import OPERATOR
from sl_queue.transport.rabbitmq import connection
from sl_queue.transport.rabbitmq.address import Address
from sl_queue.transport.rabbitmq.blocking import connect
from sl_queue.transport.rabbitmq.housekeeping import Housekeeping
from sl_queue.transport.rabbitmq.rights import try_rights
from tests.support.links import two_parties

HOST = "127.0.0.1"
NAMES = two_parties()


def silent(there: socket.socket) -> None:
    while there.recv(1024):
        pass


def web(there: socket.socket) -> None:
    there.recv(1024)
    there.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def newer(there: socket.socket) -> None:
    there.recv(1024)
    there.sendall(b"AMQP\x03\x01\x00\x00")


def short(there: socket.socket) -> None:
    there.recv(1024)


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Answer at a port, one connection after the other."""
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    there, _ = listener.accept()
                    with there, suppress(OSError):
                        answer(there)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (silent, "no answer within 2 s"),
        (web, "what answers does not speak AMQP: a frame of "),
        (newer, "AMQP"),
        (short, "the broker closed the connection"),
    ],
    ids=["silent", "web server", "newer protocol", "closes"],
)
def test_what_is_no_broker_is_told_to_a_person_as_to_a_worker(
    answer: Callable[[socket.socket], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_S", 2.0)
    with answering(answer) as port:
        url = f"amqp://u:hunter2@{HOST}:{port}/v"
        for command in (lambda: Housekeeping(url, NAMES), lambda: try_rights(url, OPERATOR, NAMES)):
            with pytest.raises(BrokerUnreachable, match=f"{port}, virtual host 'v' cannot be used.*{what}") as raised:
                command()
            assert "hunter2" not in str(raised.value)


def test_a_notebook_that_runs_an_event_loop_connects_as_well(url: str) -> None:
    async def connected() -> bool:
        with connect(Address.parse(url), "test") as found:
            return bool(found.is_open)

    assert asyncio.run(connected())

"""Isolation of the metrics server: few connections, one thread, and an end to each, whatever watches a worker."""

import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing

import pytest

from sl_queue.observe.http_server import MOST, REQUEST_BYTES, Answer, HttpServer
from tests.support.shortage import no_descriptors_left
from tests.support.waiting import await_that

HOST = "127.0.0.1"
BIG = b"x" * 5_000_000
PATIENCE_S = 0.5  # of an impatient server


def fail(_: object) -> Answer:
    raise ValueError("no page")


@pytest.fixture
def server() -> Iterator[HttpServer]:
    pages = {"/": lambda _: Answer(b"here"), "/big": lambda _: Answer(BIG), "/bad": fail}
    with closing(HttpServer(HOST, 0, pages)) as server:
        yield server


@pytest.fixture
def impatient() -> Iterator[HttpServer]:
    pages = {"/": lambda _: Answer(b"here"), "/big": lambda _: Answer(BIG)}
    with closing(HttpServer(HOST, 0, pages, patience_s=PATIENCE_S)) as server:
        yield server


def get(server: HttpServer, path: str = "/") -> bytes:
    with urllib.request.urlopen(f"http://{HOST}:{server.port}{path}", timeout=60) as answer:
        return bytes(answer.read())


def connect(server: HttpServer) -> socket.socket:
    return socket.create_connection((HOST, server.port), timeout=60)


def ask(server: HttpServer, request: bytes) -> bytes:
    """Return the first line of the answer."""
    with connect(server) as peer:
        peer.sendall(request)
        return peer.makefile("rb").readline().strip()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def sockets_of(server: HttpServer) -> int:
    return len(server._connections)


def test_a_page_is_given_whole_to_who_asks_for_it(server: HttpServer) -> None:
    assert get(server) == get(server, "/?name[]=x") == b"here"
    assert get(server, "/big") == BIG


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /elsewhere HTTP/1.1\r\n\r\n", b"404"),
        (b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"405"),
        (b"DELETE / HTTP/1.1\r\n\r\n", b"405"),
        (b"GET / HTTP/2\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello of TLS \r\n\r\n", b"400"),
        (b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * (REQUEST_BYTES - 18), b"431"),
        (b"GET /bad HTTP/1.1\r\n\r\n", b"500"),
    ],
)
def test_whatever_else_is_asked_gets_an_answer_and_an_end(server: HttpServer, request_: bytes, status: bytes) -> None:
    assert status in ask(server, request_)
    assert get(server) == b"here"


def test_a_request_may_come_in_pieces(server: HttpServer) -> None:
    with connect(server) as peer:
        for piece in (b"GE", b"T / HTT", b"P/1.1\r\nHost: x\r", b"\n\r\n"):
            peer.sendall(piece)
        assert b"here" in peer.makefile("rb").read()


def test_idle_connections_take_each_others_place_and_the_watcher_is_served(server: HttpServer) -> None:
    threads, before = set(threading.enumerate()), descriptors()
    idle = [connect(server) for _ in range(300)]
    assert get(server) == b"here"
    assert set(threading.enumerate()) <= threads
    assert descriptors() - before - len(idle) <= MOST
    assert sockets_of(server) <= MOST
    for peer in idle:
        peer.close()


def test_a_connection_that_says_nothing_ends_after_its_patience(impatient: HttpServer) -> None:
    began = time.monotonic()
    with connect(impatient) as peer:
        assert peer.recv(1) == b""
    assert time.monotonic() - began > 0.8 * PATIENCE_S


def test_a_watcher_that_does_not_read_its_answer_ends_too(impatient: HttpServer) -> None:
    with connect(impatient) as peer:
        peer.sendall(b"GET /big HTTP/1.1\r\n\r\n")
        await_that(lambda: sockets_of(impatient) == 1, "it is being answered")
        assert get(impatient) == b"here"
        await_that(lambda: sockets_of(impatient) == 0, "it is given up")


@pytest.mark.usefixtures("without_collector")
def test_a_shortage_of_descriptors_neither_ends_it_nor_makes_it_spin(server: HttpServer) -> None:
    with socket.socket() as peer:
        peer.settimeout(60)
        with no_descriptors_left():
            peer.connect((HOST, server.port))  # by the kernel; the server cannot accept it
            peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
            await_that(lambda: server._listen_at is not None, "it has met the shortage")
            spent = time.process_time()
            peer.settimeout(0.4)
            with pytest.raises(TimeoutError):
                peer.recv(1)
            assert time.process_time() - spent < 0.2
        peer.settimeout(60)
        assert b"here" in peer.makefile("rb").read()
    assert get(server) == b"here"


def test_it_can_be_closed_while_connections_are_open_and_its_port_is_free_again(server: HttpServer) -> None:
    with connect(server) as peer:
        await_that(lambda: sockets_of(server) == 1, "it is accepted")
        server.close()
        assert peer.recv(1) == b""
    with closing(HttpServer(HOST, server.port, {"/": lambda _: Answer(b"next")})) as following:
        assert get(following) == b"next"
    with pytest.raises(urllib.error.URLError):
        get(server)

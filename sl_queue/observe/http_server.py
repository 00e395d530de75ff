"""An HTTP server for whoever watches a worker, which shares none of the worker's limits.

The law: it has one thread, at most `MOST` connections, and each for at most `patience_s`. Anybody who reaches the port
may hold connections without end; they take the place of each other, never one of the worker's own descriptors or
threads. Where all places are taken, the oldest connection that has not asked yet gives way to the newest: a watcher
asks in its first packet, so it is served beside any number of idle ones.
"""

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

MOST = 8  # connections at once
BACKLOG = 128  # at the kernel, without a descriptor of ours
PATIENCE_S = 5.0  # for one connection: its request and our answer
MOST_PORT = 65_535
REQUEST_BYTES = 8 * 1024
TARGET_BYTES = 1024
SHORTAGE_S = 0.5  # without accepting, after the system had no descriptor for another connection

log = logging.getLogger("sl_queue")


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer to a request for a page."""

    body: bytes
    status: str = "200 OK"
    content_type: str = "text/plain; charset=utf-8"


Page = Callable[[Mapping[str, str]], Answer]  # given the request's headers, by lower-case name


@dataclass(slots=True, eq=False)
class _Connection:  # mutable: what has come of the request, and what is left of the answer
    peer: socket.socket = field(repr=False)
    until: float  # monotonic
    request: bytes = b""
    answer: memoryview | None = None


class HttpServer:
    """Pages by path, at HOST:PORT, in a thread of its own from the constructor to `close`. Raises OSError.

    `clock`: monotonic seconds. `patience_s`: for one connection.
    """

    def __init__(
        self,
        host: str,
        port: int,
        pages: Mapping[str, Page],
        clock: Callable[[], float] = time.monotonic,
        patience_s: float = PATIENCE_S,
    ) -> None:
        if not 0 <= port <= MOST_PORT:  # getaddrinfo would take another one instead
            raise OSError(f"a port is a number up to {MOST_PORT}")
        self._pages, self._clock, self._patience_s = pages, clock, patience_s
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._listener = socket.create_server(where[:2], family=family, backlog=BACKLOG)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: dict[_Connection, None] = {}  # the oldest first
        self._listen_at: float | None = None  # when there may be descriptors again
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering. Idempotent."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()

    def _serve(self) -> None:
        try:
            while not self._closed:
                self._turn()
        finally:
            for connection in list(self._connections):
                self._drop(connection)
            self._selector.close()
            self._listener.close()

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        now = self._clock()
        times = [connection.until for connection in self._connections]
        times += [] if self._listen_at is None else [self._listen_at]
        ready = self._selector.select(max(0.0, min(times) - now) if times else None)
        for key, _ in ready:
            if key.fileobj is self._listener:
                self._accept()
            elif key.data in self._connections:  # it may have given way a moment ago
                self._go_on(key.data)
        now = self._clock()
        for connection in [each for each in self._connections if each.until <= now]:
            self._drop(connection)
        if self._listen_at is not None and self._listen_at <= now:
            self._listen_at = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    # Connections ------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            return  # it has left again
        except OSError:
            if not self._closed:
                self._wait_for_descriptors()
            return
        accepted.setblocking(False)
        if len(self._connections) >= MOST:
            self._drop(next((each for each in self._connections if each.answer is None), next(iter(self._connections))))
        connection = _Connection(accepted, self._clock() + self._patience_s)
        self._connections[connection] = None
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        self._go_on(connection)  # a watcher's request is often here already

    def _wait_for_descriptors(self) -> None:
        """Stop accepting for a moment: the connection stays in the backlog, so the listener would be ready for ever."""
        self._selector.unregister(self._listener)
        self._listen_at = self._clock() + SHORTAGE_S
        for connection in [each for each in self._connections if each.answer is None]:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection]
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection.peer)
        connection.peer.close()

    def _go_on(self, connection: _Connection) -> None:
        """Read what has come, or write what the peer takes."""
        try:
            if connection.answer is None:
                self._read(connection)
            if connection.answer is not None:
                self._write(connection)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._drop(connection)

    def _read(self, connection: _Connection) -> None:
        part = connection.peer.recv(REQUEST_BYTES + 1 - len(connection.request))
        if not part:
            raise ConnectionResetError
        connection.request += part
        if b"\r\n\r\n" not in connection.request and len(connection.request) <= REQUEST_BYTES:
            return
        answer = self._answer(connection.request)
        head = (
            f"HTTP/1.1 {answer.status}\r\nContent-Type: {answer.content_type}\r\nContent-Length: {len(answer.body)}\r\n"
            "Connection: close\r\nX-Content-Type-Options: nosniff\r\n\r\n"
        )
        connection.answer = memoryview(head.encode() + answer.body)
        self._selector.modify(connection.peer, selectors.EVENT_WRITE, connection)

    def _write(self, connection: _Connection) -> None:
        while connection.answer:
            connection.answer = connection.answer[connection.peer.send(connection.answer) :]
        self._drop(connection)

    # Requests ---------------------------------------------------------------------------------------------------

    def _answer(self, request: bytes) -> Answer:
        """Make the page that is asked for; whatever fails is an answer too."""
        head, complete, _ = request.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        method, _, rest = line.partition(" ")
        target, _, version = rest.rpartition(" ")
        if len(target) > TARGET_BYTES:
            return _failure("414 URI Too Long")
        if not complete:
            return _failure("431 Request Header Fields Too Large")
        if not version.startswith("HTTP/1."):
            return _failure("400 Bad Request")
        if method != "GET":
            return _failure("405 Method Not Allowed")
        page = self._pages.get(target.partition("?")[0])
        if page is None:
            return _failure("404 Not Found")
        headers = {name.strip().lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
        try:
            return page(headers)
        except Exception:
            log.exception("a metrics page could not be rendered")
            return _failure("500 Internal Server Error")


def _failure(status: str) -> Answer:
    return Answer(f"{status}\n".encode(), status)

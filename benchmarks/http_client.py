"""Many HTTP clients in one thread: a connection each, kept open; just enough of HTTP to ask our service."""

import json
import selectors
import socket
import threading
from collections import deque
from concurrent.futures import Future
from types import TracebackType
from typing import Any

HOST = "127.0.0.1"


class _Client:
    """One connection. Mutable: it waits for one answer at a time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.got = b""
        self.future: Future[Any] | None = None

    def read(self) -> Any:
        """Return an answer once it is whole, else None. Raises ConnectionError."""
        part = self.socket.recv(65536)
        if not part:
            raise ConnectionError("the service has closed a connection")
        self.got += part
        head, found, body = self.got.partition(b"\r\n\r\n")
        if not found:
            return None
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(body) < length:
            return None
        self.got = b""
        if not head.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(f"the service answers {body.decode()}")
        return json.loads(body)


class HttpClients:
    """Asks for one row after the other by whichever connection is free; opens more if none is. Thread-safe."""

    def __init__(self, port: int, clients: int) -> None:
        self._port, self._lock, self._row = port, threading.Lock(), 0
        self._selector = selectors.DefaultSelector()
        self._free: deque[_Client] = deque()
        for _ in range(clients):
            self._free.append(self._connected())
        self._closed = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _connected(self) -> _Client:
        client = _Client(self._port)
        self._selector.register(client.socket, selectors.EVENT_READ, client)
        return client

    def ask(self) -> "Future[Any]":
        """Ask for the next row."""
        with self._lock:
            client = self._free.popleft() if self._free else self._connected()
            self._row = (self._row + 7) % 12_000
            body = b'{"ids": [%d]}' % self._row
        future: Future[Any] = Future()
        client.future = future
        client.socket.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return future

    def _read(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(0.1):
                client: _Client = key.data
                future = client.future
                assert future is not None
                try:
                    answer = client.read()
                except (OSError, ValueError) as error:
                    self._selector.unregister(client.socket)
                    future.set_exception(error)
                    continue
                if answer is not None:
                    with self._lock:
                        self._free.append(client)
                    future.set_result(answer)

    def __enter__(self) -> "HttpClients":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed = True
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.data.socket.close()
        self._selector.close()

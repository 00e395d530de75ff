"""A link between two organisations: a TCP proxy with delay and bandwidth, in a process of its own.

A thread for each end of each direction: an event loop's own work would come on top of the delay, twice a round trip.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Queue
from urllib.parse import urlsplit, urlunsplit

from benchmarks.processes import background

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024
OWN_S = 0.25e-3  # that the proxy adds each way by itself: its two threads wake from a long sleep
BUFFER_CHUNKS = 4096  # on their way at once: a slow link stops its sender only after this


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of a link, the same in both directions."""

    rtt_ms: float = 0.0
    mbit_s: float | None = None  # None: as fast as this machine

    def __str__(self) -> str:
        bandwidth = "" if self.mbit_s is None else f", {self.mbit_s:g} Mbit/s"
        return f"{self.rtt_ms:g} ms{bandwidth}"


@contextmanager
def slowed(url: str, speed: Speed) -> Iterator[str]:
    """Yield the URL of the broker at `url`, reached over a link of that speed."""
    parts = urlsplit(url)
    with background(_proxy, parts.hostname, parts.port, speed) as port:
        user = parts.netloc.rpartition("@")[0]
        yield urlunsplit(parts._replace(netloc=f"{user}@{HOST}:{port}"))


def _proxy(ready: Connection, host: str, port: int, speed: Speed) -> None:
    server = socket.create_server((HOST, 0))
    ready.send(server.getsockname()[1])
    while True:
        near, _ = server.accept()
        far = socket.create_connection((host, port))
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            on_its_way: Queue[tuple[float, bytes]] = Queue(BUFFER_CHUNKS)
            threading.Thread(target=_enter, args=(one, on_its_way, speed), daemon=True).start()
            threading.Thread(target=_leave, args=(other, on_its_way), daemon=True).start()


def _enter(connection: socket.socket, on_its_way: "Queue[tuple[float, bytes]]", speed: Speed) -> None:
    """One direction: what comes in leaves half a round trip after the last bit of it is through the link."""
    free_at, chunk = 0.0, b"first"  # when the link has passed on all that it was given
    while chunk:
        with suppress(ConnectionError):
            chunk = b""
            chunk = connection.recv(CHUNK_BYTES)
        free_at = max(free_at, time.monotonic())
        if speed.mbit_s is not None:
            free_at += len(chunk) * 8 / (speed.mbit_s * 1e6)
        on_its_way.put((free_at + speed.rtt_ms / 2e3, chunk))


def _leave(connection: socket.socket, on_its_way: "Queue[tuple[float, bytes]]") -> None:
    """Its other end."""
    chunk = b"first"
    while chunk:
        due, chunk = on_its_way.get()
        time.sleep(max(0.0, due - OWN_S - time.monotonic()))
        with suppress(OSError):
            connection.sendall(chunk) if chunk else connection.shutdown(socket.SHUT_WR)

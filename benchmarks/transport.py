"""The way of a message alone: raw TCP, librabbitmq, pika as it comes, and our link; round trips and rates.

Everybody does the same: an echo process answers each message with one as long, then takes a row of messages and
answers the last.
"""

import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Protocol
from urllib.parse import urlsplit

import pika

from benchmarks import goals
from benchmarks.c_client import compiled
from benchmarks.processes import background, together
from benchmarks.report import table
from sl_queue.protocol.messages import Kind
from sl_queue.protocol.topology import Topology
from sl_queue.testing.private_broker import PrivateBroker
from sl_queue.transport.rabbitmq.link import RabbitLink
from sl_queue.transport.rabbitmq.names import QueueType

HOST = "127.0.0.1"
NAMES = Topology("b", ("a",))
SIZES = ((64 * 1024, 300, 600), (2 * 1024 * 1024, 60, 80))  # bytes, round trips, messages in a row
QUICK = ((64 * 1024, 12, 40), (2 * 1024 * 1024, 8, 12))
HOW = {
    "tcp": "raw TCP",
    "c": "librabbitmq (C), classic, no confirms",
    "pika": "pika as it comes, classic, no confirms",
    "link": "our link, classic, confirms",
    "quorum": "our link, quorum, confirms",
}


class End(Protocol):
    """One of two programs that exchange messages."""

    def send(self, body: bytes) -> None: ...
    def receive(self) -> bytes: ...


class TcpEnd:
    """A socket, and lengths before the messages."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection

    def send(self, body: bytes) -> None:
        self._connection.sendall(struct.pack(">I", len(body)))
        self._connection.sendall(body)

    def receive(self) -> bytes:
        (size,) = struct.unpack(">I", self._exactly(4))
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        buffer = bytearray(size)
        view, got = memoryview(buffer), 0
        while got < size:
            got += self._connection.recv_into(view[got:])
        return bytes(buffer) if size < 8 else memoryview(buffer)  # type: ignore[return-value]


class PikaEnd:
    """pika's BlockingConnection as its tutorials use it: no confirms, an acknowledgement a message."""

    def __init__(self, url: str, outbox: str, inbox: str) -> None:
        self._outbox = outbox
        self._channel: Any = pika.BlockingConnection(pika.URLParameters(url)).channel()
        for queue in (outbox, inbox):
            self._channel.queue_declare(queue, durable=True)
        self._channel.basic_qos(prefetch_count=100)
        self._messages = self._channel.consume(inbox)

    def send(self, body: bytes) -> None:
        self._channel.basic_publish("", self._outbox, body)

    def receive(self) -> bytes:
        method, _, body = next(self._messages)
        self._channel.basic_ack(method.delivery_tag)
        found: bytes = body
        return found


class LinkEnd:
    """Our link: confirms in the background, an acknowledgement a message."""

    def __init__(self, url: str, party: str, queue_type: QueueType) -> None:
        self._peer = "a" if party == "b" else "b"
        self._link = RabbitLink(url, party, NAMES, 200, queue_type=queue_type)
        self._deliveries: SimpleQueue[Any] = SimpleQueue()
        self._link.open(self._deliveries.put, lambda: None, lambda error: None)

    def send(self, body: bytes) -> None:
        self._link.publish(self._peer, Kind.ACTIVATION, "run", body, persistent=False)

    def receive(self) -> bytes:
        delivery = self._deliveries.get(timeout=60)
        self._link.acknowledge([delivery.tag])
        found: bytes = delivery.body
        return found


def _end(how: str, party: str, where: Any) -> End:
    match how:
        case "tcp":
            return TcpEnd(socket.create_connection((HOST, where)))
        case "pika":
            return PikaEnd(where, *(("a", "b") if party == "a" else ("b", "a")))
        case _:
            return LinkEnd(where, party, "quorum" if how == "quorum" else "classic")


def _ask(how: str, where: Any, size: int, trips: int, row: int) -> tuple[float, float]:
    """Median seconds of a round trip, and bytes a second in one direction."""
    end, body = _end(how, "a", where), bytes(size)
    seconds = []
    for _ in range(trips):
        began = time.perf_counter()
        end.send(body)
        end.receive()
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(row):
        end.send(body)
    end.receive()
    return median(seconds[trips // 4 :]), row * size / (time.perf_counter() - began)


def _answer(how: str, where: Any, trips: int, row: int) -> None:
    answering(_end(how, "b", where), trips, row)


def answering(end: End, trips: int, row: int) -> None:
    for _ in range(trips):
        end.send(end.receive())
    if row:
        for _ in range(row):
            last = end.receive()
        end.send(last)
    time.sleep(0.5)  # the way of the last answer out of this process


def _tcp_answer(ready: Connection, trips: int, row: int) -> None:
    server = socket.create_server((HOST, 0))
    ready.send(server.getsockname()[1])
    answering(TcpEnd(server.accept()[0]), trips, row)
    threading.Event().wait()


def measure_c(program: Path, size: int, trips: int, row: int, private: PrivateBroker) -> tuple[float, float]:
    """As `measure`, by the C programs."""
    parts = urlsplit(private.url("transport-c"))
    where = (str(parts.hostname), str(parts.port), str(parts.username), str(parts.password), "transport-c")
    numbers = (str(size), str(trips), str(row))
    with subprocess.Popen([str(program), "answer", *where, "b", "a", *numbers]) as answering:
        try:
            asking = [str(program), "ask", *where, "a", "b", *numbers]
            told = subprocess.run(asking, check=True, capture_output=True, text=True, timeout=120).stdout
            answering.wait(timeout=30)
        finally:
            answering.kill()
    private.delete_vhost("transport-c")
    seconds, rate = map(float, told.split())
    return seconds, rate


def measure(how: str, size: int, trips: int, row: int, private: PrivateBroker, number: int) -> tuple[float, float]:
    """(seconds of a round trip, bytes a second) of tcp, pika, link (classic) or quorum."""
    timeout_s = 120.0
    if how == "tcp":
        with background(_tcp_answer, trips, row) as port:
            found = together({"ask": (_ask, (how, port, size, trips, row))}, timeout_s)["ask"]
    else:
        vhost = f"transport{number}"
        url = private.url(vhost)
        works: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            "ask": (_ask, (how, url, size, trips, row)),
            "answer": (_answer, (how, url, trips, row)),
        }
        found = together(works, timeout_s)["ask"]
        private.delete_vhost(vhost)
    seconds, rate = found
    return float(seconds), float(rate)


def compare(private: PrivateBroker, quick: bool) -> str:
    """All of them, in turns."""
    with TemporaryDirectory(prefix="sl_queue-bench-") as folder:
        program = compiled(Path(folder))
        rows = [line for sizes in (QUICK if quick else SIZES) for line in _rows(*sizes, private, program, quick)]
    left_out = "" if program else "librabbitmq is left out: its headers or a C compiler are not here.\n\n"
    found = table(("", "message", "ms a round trip", "to TCP", "MB/s one way", "to C"), rows)
    return f"{left_out}{found}\n{goals.listed(_against_c(rows))}" if program else f"{left_out}{found}"


def _against_c(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Hold our link against the C client, which does nothing else and asks for no confirms: the broker's own limit."""
    found = {(how, size): (float(trip), float(rate)) for how, size, trip, _, _, rate in rows}
    for size, most in (("64 KB", 2.0), ("2048 KB", 1.1)):
        ours, theirs = found[HOW["link"], size][0], found[HOW["c"], size][0]
        yield goals.line(f"{size}, our round trip to C's", ours / theirs, most)
    yield goals.line("2 MB, our rate to C's", found[HOW["link"], "2048 KB"][1], 0.8, at_least=True)


def _rows(
    size: int, trips: int, row: int, private: PrivateBroker, program: Path | None, quick: bool
) -> Iterator[tuple[str, ...]]:
    """Yield the lines for one size."""
    found: dict[str, list[tuple[float, float]]] = {how: [] for how in HOW if program or how != "c"}
    for number, how in enumerate(list(found) * (1 if quick else 3)):
        if program and how == "c":
            found[how].append(measure_c(program, size, trips, row, private))
        else:
            found[how].append(measure(how, size, trips, row, private, number))
    tcp_s = median(seconds for seconds, _ in found["tcp"])
    c_rate = median(rate for _, rate in found["c"]) if program else None
    for how, results in found.items():
        trip_s, rate = median(s for s, _ in results), median(r for _, r in results)
        to_c = "" if c_rate is None else f"{rate / c_rate:.2f}"
        yield HOW[how], f"{size // 1024} KB", f"{trip_s * 1e3:.2f}", f"{trip_s / tcp_s:.1f}", f"{rate / 1e6:,.0f}", to_c

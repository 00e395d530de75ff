"""A link between two organisations: a TCP proxy with delay and bandwidth, in a process of its own."""

import asyncio
import selectors
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from urllib.parse import urlsplit, urlunsplit

from benchmarks.processes import background

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024
BUFFER_CHUNKS = 4096  # on their way at once: a slow link stops its sender only after this


@dataclass(frozen=True, slots=True)
class Speed:
    """What a link is like, the same in both directions."""

    rtt_ms: float = 0.0
    mbit_s: float | None = None  # None: as fast as this machine

    def __str__(self) -> str:
        bandwidth = "" if self.mbit_s is None else f", {self.mbit_s:g} Mbit/s"
        return f"{self.rtt_ms:g} ms{bandwidth}"


@contextmanager
def slowed(url: str, speed: Speed) -> Iterator[str]:
    """The broker at `url`, reached over a link of that speed."""
    parts = urlsplit(url)
    with background(_proxy, parts.hostname, parts.port, speed) as port:
        user = parts.netloc.rpartition("@")[0]
        yield urlunsplit(parts._replace(netloc=f"{user}@{HOST}:{port}"))


def _proxy(ready: Connection, host: str, port: int, speed: Speed) -> None:
    def loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(
            selectors.SelectSelector()
        )  # epoll would round every delay up to a millisecond

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_serve(ready, host, port, speed))


async def _serve(ready: Connection, host: str, port: int, speed: Speed) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(_carry(reader, far_writer, speed), _carry(far_reader, writer, speed))

    server = await asyncio.start_server(accept, HOST, 0)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, speed: Speed) -> None:
    """One direction: what comes in leaves half a round trip after the last bit of it is through the link."""
    loop = asyncio.get_running_loop()
    on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(BUFFER_CHUNKS)

    async def leave() -> None:
        while True:
            due, chunk = await on_its_way.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            if not chunk:
                writer.close()
                return
            writer.write(chunk)
            await writer.drain()

    leaving = asyncio.create_task(leave())
    free_at = 0.0  # when the link has passed on all that it was given
    try:
        chunk = b"first"
        while chunk:
            chunk = await reader.read(CHUNK_BYTES)
            free_at = max(free_at, loop.time())
            if speed.mbit_s is not None:
                free_at += len(chunk) * 8 / (speed.mbit_s * 1e6)
            await on_its_way.put((free_at + speed.rtt_ms / 2e3, chunk))
        await leaving
    except ConnectionError:
        leaving.cancel()
        writer.close()

"""A TCP proxy that misbehaves on demand: cuts, delays, stalls, refuses. For tests and `sl-queue chaos`."""

import socket
import struct
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from sl_queue.protocol.broker_url import split

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024


class Proxy:  # mutable: its attributes may be changed at any time
    """Forwards connections to a port of this machine; use it in a `with` statement."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.delay_s = 0.0  # before each chunk is passed on
        self.refusing = False  # new connections are closed at once
        self.cut_after_bytes: int | None = None  # sent by clients from now on, then every connection is cut
        self.accepted = 0  # connections so far
        self.sent_bytes = 0  # by clients so far
        threading.Thread(target=self._accept, name=f"proxy-{self.port}", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flowing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self.cut()

    def url(self, url: str) -> str:
        """Return the same URL, through this proxy."""
        parts = split(url)
        login = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{login}@{HOST}:{self.port}").geturl()

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)

    def stall(self) -> None:
        """Keep every connection open, and pass nothing on: half-open, as after a power cut or a lost route."""
        self._flowing.clear()

    def resume(self) -> None:
        """Pass on again."""
        self._flowing.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self.refusing:
                client.close()
                continue
            try:
                server = socket.create_connection((HOST, self._target_port))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(source, sink, source is client), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        with source, suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                time.sleep(self.delay_s)
                self._flowing.wait()
                if from_client and not self._may_pass(chunk):
                    return
                sink.sendall(chunk)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def _may_pass(self, chunk: bytes) -> bool:
        self.sent_bytes += len(chunk)
        if self.cut_after_bytes is not None:
            self.cut_after_bytes -= len(chunk)
            if self.cut_after_bytes < 0:
                self.cut_after_bytes = None
                self.cut()
                return False
        return True

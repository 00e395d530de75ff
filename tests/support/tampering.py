"""A proxy between workers and broker that knows AMQP's frames, keeps all that passes, and means harm."""

import queue
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType

import pika

from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.testing.proxy import CHUNK_BYTES, Proxy
from tests.support.frames import BODY, GREETING_BYTES, METHOD, PUBLISH, frame_size

HEADER, FRAME_END = 2, b"\xce"
BODY_BYTES = 64 * 1024
TRICKS = ("reorder", "edit", "cut", "replay", "reroute", "swap")


@dataclass(frozen=True)
class Published:
    """Publication of a worker: the method and the header as they came, and the body."""

    channel: bytes
    method: bytes
    header: bytes
    body: bytes

    @property
    def exchange(self) -> str:
        return _short(self.method, 6)

    @property
    def key(self) -> str:
        return _short(self.method, 7 + len(self.exchange))

    @property
    def names_scheduler(self) -> bool:
        """True if it is from or to the scheduler or the operator."""
        ends = {self.exchange.rpartition(".")[2], self.key.rpartition(".")[2]}
        return bool(ends & {SCHEDULER, OPERATOR})

    def frames(self) -> bytes:
        sized = self.header[:4] + struct.pack(">Q", len(self.body)) + self.header[12:]
        pieces = [self.body[at : at + BODY_BYTES] for at in range(0, len(self.body), BODY_BYTES)]
        parts = [(METHOD, self.method), (HEADER, sized), *((BODY, piece) for piece in pieces)]
        return b"".join(
            bytes([kind]) + self.channel + struct.pack(">I", len(payload)) + payload + FRAME_END
            for kind, payload in parts
        )


class Tampering(Proxy):  # mutable
    """Passes on what workers publish, and every now and then something else, or something more."""

    def __init__(self, target_port: int, url: str, seed: int, often: float, lose: float) -> None:
        self.tried: Counter[str] = Counter()
        self._seen: list[Published] = []
        self._often, self._lose, self._random, self._choosing = often, lose, random.Random(seed), threading.Lock()
        self._injected: queue.SimpleQueue[Published | None] = queue.SimpleQueue()
        self._injector = threading.Thread(target=self._inject, args=(url,))
        self._injector.start()
        super().__init__(target_port)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._injected.put(None)
        self._injector.join()

    def _inject(self, url: str) -> None:
        """Publish as who runs the broker may."""
        with pika.BlockingConnection(pika.URLParameters(url)) as connection:
            channel = connection.channel()
            while (each := self._injected.get()) is not None:
                channel.basic_publish(each.exchange, each.key, each.body)

    def _forward(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        if not from_client:
            super()._forward(source, sink, from_client)
            return
        held: list[bytes] = []  # overtaken by the next message
        with source, suppress(OSError):
            for passing in _messages(source):
                if isinstance(passing, bytes):
                    sink.sendall(passing)
                    continue
                with self._choosing:
                    now, later = self._tamper(passing)
                sink.sendall(b"".join([now, *held]))
                held = [later]
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def _tamper(self, message: Published) -> tuple[bytes, bytes]:
        """Return what is sent instead of this message, and what after the next one.

        Nothing that the scheduler says or hears is lost: who loses what was confirmed stops a run, sealed or not.
        """
        if message.key.startswith("rejected.dead."):
            return message.frames(), b""  # what was refused is not sealed again
        other = self._random.choice(self._seen) if self._seen else message
        self._seen.append(message)
        if self._random.random() > self._often:
            return message.frames(), b""
        trick = self._random.choice(TRICKS[message.names_scheduler :])
        self.tried[trick] += 1
        body, lost = message.body, not message.names_scheduler and self._random.random() < self._lose
        match trick:
            case "reorder":
                return b"", message.frames()
            case "replay":
                self._injected.put(other)
                return message.frames(), b""
            case "reroute":
                self._injected.put(replace(message, body=other.body))
                return message.frames(), b""
            case "edit":
                at = self._random.randrange(len(body))
                body = body[:at] + bytes([body[at] ^ self._random.randint(1, 255)]) + body[at + 1 :]
            case "cut":
                body = body[: self._random.randrange(1, len(body))]
            case _:
                body = other.body
        if lost:
            return replace(message, body=body).frames(), b""
        self._injected.put(replace(message, body=body))
        return message.frames(), b""


def _messages(source: socket.socket) -> Iterator[bytes | Published]:
    """Yield what a client sends: whole messages, and everything else frame by frame."""
    buffer, greeted = b"", False
    method: bytes | None = None
    header, body = b"", b""
    while chunk := source.recv(CHUNK_BYTES):
        buffer += chunk
        if not greeted and len(buffer) >= GREETING_BYTES:
            yield buffer[:GREETING_BYTES]
            buffer, greeted = buffer[GREETING_BYTES:], True
        while greeted and (size := frame_size(buffer)) is not None:
            frame, buffer = buffer[:size], buffer[size:]
            kind, payload = frame[0], frame[7:-1]
            if kind == METHOD and struct.unpack(">HH", payload[:4]) == PUBLISH:
                method, body = payload, b""
            elif kind == HEADER and method is not None:
                header = payload
            elif kind == BODY and method is not None:
                body += payload
                if len(body) == int.from_bytes(header[4:12]):
                    yield Published(frame[1:3], method, header, body)
                    method = None
            else:
                yield frame


def _short(payload: bytes, at: int) -> str:
    """Read a short string of AMQP."""
    return payload[at + 1 : at + 1 + payload[at]].decode()

"""A proxy that knows AMQP's frames, and kills a worker before or after a chosen one, from outside."""

import socket
from collections.abc import Callable
from contextlib import suppress

from sl_queue.testing.proxy import CHUNK_BYTES, Proxy

GREETING_BYTES = 8  # "AMQP0091"
METHOD, BODY = 1, 3
PUBLISH, DELIVER, ACKNOWLEDGE = (60, 40), (60, 60), (60, 80)  # basic.*; the broker's own acknowledgement is a confirm

# What passes by: (from the worker, the frame's type, its method)
POINTS = {
    "publish": (True, METHOD, PUBLISH),
    "the end of a publish": (True, BODY, None),
    "acknowledge": (True, METHOD, ACKNOWLEDGE),
    "confirm": (False, METHOD, ACKNOWLEDGE),
    "deliver": (False, METHOD, DELIVER),
}


class FrameProxy(Proxy):  # mutable: armed once, it acts once
    """Passes frames on one by one."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self._point: tuple[bool, int, tuple[int, int] | None] | None = None
        self._left, self._before = 0, True
        self._act: Callable[[], None] = lambda: None

    def arm(self, when: str, point: str, count: int, act: Callable[[], None]) -> None:
        """Do `act` at the count-th frame of that kind from now on; "before": the frame is never passed on."""
        self._left, self._before, self._act = count, when == "before", act
        self._point = POINTS[point]

    def _forward(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        buffer, greeting = b"", from_client
        with source, suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                buffer += chunk
                if greeting and len(buffer) >= GREETING_BYTES:
                    sink.sendall(buffer[:GREETING_BYTES])
                    buffer, greeting = buffer[GREETING_BYTES:], False
                while not greeting and (size := frame_size(buffer)) is not None:
                    frame, buffer = buffer[:size], buffer[size:]
                    here = self._is_here(frame, from_client)
                    if here and self._before:
                        self._act()
                        return
                    sink.sendall(frame)
                    if here:
                        self._act()
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def _is_here(self, frame: bytes, from_client: bool) -> bool:
        kind = frame[0]
        method = (int.from_bytes(frame[7:9]), int.from_bytes(frame[9:11])) if kind == METHOD else None
        if self._point != (from_client, kind, method):
            return False
        self._left -= 1
        if self._left == 0:
            self._point = None
            return True
        return False


def frame_size(buffer: bytes) -> int | None:
    """Of the first frame, if all of it is here: type, channel, size, payload, end."""
    if len(buffer) < 7:
        return None
    size = 7 + int.from_bytes(buffer[3:7]) + 1
    return size if len(buffer) >= size else None

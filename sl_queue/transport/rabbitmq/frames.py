"""The bytes that a broker sends become AMQP frames; the way out is in socket.py.

What is received stays where it was received until it is understood. The buffer grows to the largest message, so a body
is copied once, out of it, however many frames it came in.
"""

import struct
from collections.abc import Iterator
from typing import Any

from pika import frame, spec
from pika.exceptions import InvalidFrameError

READ_BYTES = 64 * 1024  # at once, while no body is on its way
MOST_BUFFERED = 64 * 1024 * 1024  # of a larger message the buffer holds parts

HEAD = struct.Struct(">BHI")  # kind of frame, channel, size
END = bytes([spec.FRAME_END])
_AROUND = HEAD.size + len(END)

Piece = bytes | memoryview


class Incoming:
    """Bytes become frames, and a body one frame, copied once. Mutable: it holds what is not complete yet."""

    def __init__(self, most_buffered: int = MOST_BUFFERED) -> None:
        self._most = most_buffered
        self._view = memoryview(bytearray(2 * READ_BYTES))
        self._start = self._end = 0  # what is received and not understood
        self._wanted = READ_BYTES
        self._bodies: dict[int, _Body] = {}  # by channel

    def space(self) -> memoryview:
        """Return the buffer to receive into: as much as the frames that have begun still lack."""
        if self._start == self._end and not self._bodies:
            self._start = self._end = 0
        if self._end + self._wanted > len(self._view):
            self._make_room()
        return self._view[self._end : self._end + self._wanted]

    def received(self, count: int, largest_frame: int) -> Iterator[Any]:
        """Return the frames that these bytes complete. Raises InvalidFrameError."""
        self._end += count
        self._wanted = READ_BYTES
        while self._end - self._start >= HEAD.size:
            kind, channel, size = HEAD.unpack_from(self._view, self._start)
            if size > largest_frame:
                raise InvalidFrameError(f"what answers does not speak AMQP: a frame of {size} bytes")
            missing = _AROUND + size - (self._end - self._start)
            body = self._bodies.get(channel) if kind == spec.FRAME_BODY else None
            if missing > 0:
                self._wanted = missing if body is None else self._lacking(body, largest_frame)
                return
            whole = self._view[self._start : self._start + _AROUND + size]
            if whole[-1] != spec.FRAME_END:
                raise InvalidFrameError("a frame without its end")
            self._start += len(whole)
            if body is None:
                yield from self._begun(channel, frame.decode_frame(bytes(whole))[1])
            elif body.complete(whole[HEAD.size : -1]):
                del self._bodies[channel]
                yield frame.Body(channel, body.joined())
            if body is not None and channel in self._bodies:
                self._wanted = self._lacking(body, largest_frame)

    def _begun(self, channel: int, found: Any) -> Iterator[Any]:
        if isinstance(found, frame.Header) and found.body_size:
            self._bodies[channel] = _Body(found.body_size)
        yield found

    def _lacking(self, body: "_Body", largest_frame: int) -> int:
        frames = -(-body.missing // (largest_frame - _AROUND))
        return max(READ_BYTES, body.missing + _AROUND * frames - (self._end - self._start))

    def _make_room(self) -> None:
        """Move what is there to the front of a buffer that is large enough."""
        for body in self._bodies.values():
            body.settle()
        rest = bytes(self._view[self._start : self._end])
        if len(rest) + self._wanted > len(self._view):
            self._view = memoryview(bytearray(min(2 * (len(rest) + self._wanted), self._most)))
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)
        self._wanted = min(self._wanted, len(self._view) - self._end)


class _Body:
    """A body on its way: parts of the buffer, and what had to leave it. Mutable."""

    def __init__(self, size: int) -> None:
        self.missing = size
        self._parts: list[Piece] = []

    def complete(self, part: memoryview) -> bool:
        self._parts.append(part)
        self.missing -= len(part)
        return self.missing <= 0

    def settle(self) -> None:
        self._parts = [b"".join(self._parts)]

    def joined(self) -> bytes:
        return b"".join(self._parts)

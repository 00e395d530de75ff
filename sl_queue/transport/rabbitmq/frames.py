"""The bytes that a broker sends become AMQP frames; the way out is in socket.py.

A body is received where it stays. Once one of its frames has begun, the next ones can be foreseen: a broker fills each
but the last. The kernel is given the places of their bodies, and between them places for their heads, so nothing is
copied. Whatever comes instead, a heartbeat or a frame of another channel, is moved to the buffer and understood there.

Deliveries and confirms, which come in every step, are read here; pika reads the rest. Its way to a callback is a few
hundred lines of Python a message, which the caches of a processor that trains a model do not hold.
"""

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pika import frame, spec
from pika.exceptions import InvalidFrameError

from sl_queue.protocol.memory import empty

READ_BYTES = 64 * 1024  # at once, while no body is on its way
MOST_AHEAD = 64 * 1024 * 1024  # of a longer body, memory is taken as it comes
MOST_FORESEEN = 16  # frames
SMALL_BYTES = 16 * 1024  # a body of at most that is handed on as bytes, a larger one as memory that is its own

HEAD = struct.Struct(">BHI")  # kind of frame, channel, size
END = bytes([spec.FRAME_END])
_AROUND = HEAD.size + len(END)
_METHOD = struct.Struct(">I")  # class and number
_DELIVER, _ACK, _NACK = (each.INDEX for each in (spec.Basic.Deliver, spec.Basic.Ack, spec.Basic.Nack))
_TAGGED = struct.Struct(">QB")  # a tag and flags
_SIZE = struct.Struct(">4xQ")  # in a content's header

Piece = bytes | memoryview


@dataclass(frozen=True, slots=True)
class _Foreseen:
    """A frame that should come after the one that has begun, and where it is received."""

    expected: bytes  # the end of the frame before it, and its head
    head: memoryview
    body: memoryview


class _Body:
    """A body on its way, in the place where it stays. Mutable."""

    def __init__(self, channel: int, size: int, most_ahead: int) -> None:
        self.channel, self.size, self.missing = channel, size, size
        self._memory = memoryview(bytearray(size)) if size <= SMALL_BYTES else empty(min(size, most_ahead))

    def place(self, most: int) -> memoryview:
        """Return where the next bytes belong, of `most` at most."""
        have = self.size - self.missing
        if have == len(self._memory):
            longer = empty(min(self.size, 2 * have))
            longer[:have] = self._memory
            self._memory = longer
        return self._memory[have : have + most]

    def foreseen(self, left: int, largest_frame: int) -> Iterator[_Foreseen]:
        """Foresee the frames after the one of which so many bytes are `left`."""
        start = self.size - self.missing + left
        for _ in range(MOST_FORESEEN):
            size = min(largest_frame - _AROUND, self.size - start)
            if not 0 < size <= len(self._memory) - start:
                return
            expected = END + HEAD.pack(spec.FRAME_BODY, self.channel, size)
            yield _Foreseen(expected, memoryview(bytearray(len(expected))), self._memory[start : start + size])
            start += size

    def whole(self) -> Piece:
        return bytes(self._memory) if self.size <= SMALL_BYTES else self._memory


class Delivered(NamedTuple):
    """A message for the consumer of a channel."""

    channel: int
    tag: int
    redelivered: bool
    body: Piece


class Confirmed(NamedTuple):
    """Answer of the broker to what was published on a channel."""

    channel: int
    tag: int
    and_before: bool
    accepted: bool


class Incoming:
    """Bytes become deliveries, confirms, and frames of pika's, a body one frame. Mutable: it holds what is incomplete.

    `scattered`: the bytes can be received into several places at once.
    """

    def __init__(self, most_ahead: int = MOST_AHEAD, *, scattered: bool = True) -> None:
        self._most_ahead, self._scattered = most_ahead, scattered
        self._view = memoryview(bytearray(2 * READ_BYTES))
        self._start = self._end = 0  # what is received and not understood
        self._wanted = READ_BYTES
        self._announced: dict[int, tuple[int, bool]] = {}  # by channel: a delivery's tag, and if it came before
        self._bodies: dict[int, _Body] = {}  # by channel
        self._into: _Body | None = None  # the body of which a frame has begun
        self._left = 0  # of that frame
        self._foreseen: deque[_Foreseen] = deque()  # after that frame, in order

    def spaces(self, largest_frame: int) -> Sequence[memoryview]:
        """Return the places to receive into, one after the other."""
        if self._into is None or not self._left:
            return [self._space()]
        first = self._into.place(self._left)
        if not self._scattered or len(first) < self._left:
            return [first]
        if not self._foreseen:
            self._foreseen.extend(self._into.foreseen(self._left, largest_frame))
        between = [place for each in self._foreseen for place in (each.head, each.body)]
        return [first, *between, self._space()]

    def received(self, count: int, largest_frame: int) -> Iterator[Any]:
        """Return the frames that these bytes complete. Raises InvalidFrameError."""
        self._settle(count)
        self._wanted = READ_BYTES
        while self._start < self._end:
            if self._into is not None:
                yield from self._continued(self._into)
            elif self._end - self._start < HEAD.size:
                return
            else:
                kind, channel, size = HEAD.unpack_from(self._view, self._start)
                if size > largest_frame:
                    raise InvalidFrameError(f"what answers does not speak AMQP: a frame of {size} bytes")
                missing = _AROUND + size - (self._end - self._start)
                if kind == spec.FRAME_BODY:
                    self._begin(channel, size)
                elif missing > 0:
                    self._wanted = max(READ_BYTES, missing)
                    return
                else:
                    marshaled = bytes(self._view[self._start : self._start + _AROUND + size])
                    self._start += len(marshaled)
                    if marshaled[-1:] != END:
                        raise InvalidFrameError("a frame without its end")
                    found = self._understood(kind, channel, marshaled)
                    if found is not None:
                        yield found

    def _understood(self, kind: int, channel: int, marshaled: bytes) -> Any:
        """Return what a frame that is not of a body says; None of a part of a delivery."""
        if kind == spec.FRAME_METHOD:
            (method,) = _METHOD.unpack_from(marshaled, HEAD.size)
            self._announced.pop(channel, None)
            if method == _DELIVER:
                after = HEAD.size + _METHOD.size
                tag, redelivered = _TAGGED.unpack_from(marshaled, after + 1 + marshaled[after])
                self._announced[channel] = tag, redelivered != 0
                return None
            if method in (_ACK, _NACK):
                tag, flags = _TAGGED.unpack_from(marshaled, HEAD.size + _METHOD.size)
                return Confirmed(channel, tag, flags & 1 != 0, method == _ACK)
        if kind == spec.FRAME_HEADER:
            (size,) = _SIZE.unpack_from(marshaled, HEAD.size)
            if size:
                self._bodies[channel] = _Body(channel, size, self._most_ahead)
            if channel in self._announced:
                return None if size else Delivered(channel, *self._announced.pop(channel), b"")
        return frame.decode_frame(marshaled)[1]

    def _begin(self, channel: int, size: int) -> None:
        """Begin a frame of a body, whose head is here."""
        body = self._bodies.get(channel)
        if body is None or size > body.missing:
            raise InvalidFrameError("a body longer than it was announced")
        self._start += HEAD.size
        self._into, self._left = body, size
        self._foreseen.clear()

    def _continued(self, body: "_Body") -> Iterator[Any]:
        """Move what the buffer has of a frame to its place, or end the frame; return the body if it is complete."""
        if self._left:
            here = body.place(min(self._left, self._end - self._start))
            here[:] = self._view[self._start : self._start + len(here)]
            self._start += len(here)
            self._note(body, len(here))
            return
        if self._view[self._start] != spec.FRAME_END:
            raise InvalidFrameError("a frame without its end")
        self._start += len(END)
        self._into = None
        if not body.missing:
            del self._bodies[body.channel]
            announced = self._announced.pop(body.channel, None)
            whole = body.whole()
            yield frame.Body(body.channel, whole) if announced is None else Delivered(body.channel, *announced, whole)

    def _note(self, body: "_Body", count: int) -> int:
        """Note that so many bytes, or fewer if the frame ends before, are in their place; return how many."""
        here = min(count, self._left)
        self._left -= here
        body.missing -= here
        return here

    def _settle(self, count: int) -> None:
        """Note which of the bytes that were received are in their place; the others are in the buffer after that."""
        body = self._into
        if body is not None and self._left:
            count -= self._note(body, count)
            while count and self._foreseen:
                each = self._foreseen[0]
                if count < len(each.head) or each.head != each.expected:
                    places = [place for other in self._foreseen for place in (other.head, other.body)]
                    self._hold(b"".join((*places, self._view[self._end : self._end + self._wanted]))[:count])
                    self._foreseen.clear()
                    return
                self._foreseen.popleft()
                self._left = len(each.body)
                count -= len(each.head)
                count -= self._note(body, count)
        self._end += count

    def _space(self) -> memoryview:
        """Return the part of the buffer to receive into, with room for what is wanted."""
        if self._start == self._end:
            self._start = self._end = 0
        if self._end + self._wanted > len(self._view):
            self._hold(bytes(self._view[self._start : self._end]))
        return self._view[self._end : self._end + self._wanted]

    def _hold(self, rest: bytes) -> None:
        """Have these bytes, not understood yet, at the front of a buffer with room for what is wanted."""
        if len(rest) + self._wanted > len(self._view):
            self._view = memoryview(bytearray(2 * (len(rest) + self._wanted)))
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)

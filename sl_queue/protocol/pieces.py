"""Messages of any size in pieces that a broker takes, and back. Pure."""

import struct
from collections.abc import Iterator

PIECE_BYTES = 4 * 1024 * 1024
MOST_SENDERS = 1024  # whose messages are put together at once; who fills that with noise makes others start again
_HEAD = struct.Struct(">8sQII")  # sender, number of the message, which piece, of how many


def pieces(sender: bytes, number: int, body: bytes, most: int = PIECE_BYTES) -> Iterator[bytes]:
    """Cut a message; pieces of one sender must arrive in order."""
    count = max(1, -(-len(body) // most))
    whole = memoryview(body)
    for place in range(count):
        yield _HEAD.pack(sender, number, place, count) + whole[place * most : (place + 1) * most]


class Assembly:
    """The messages that have arrived in part. Mutable; what is not put together in order is dropped."""

    def __init__(self) -> None:
        self._parts: dict[bytes, tuple[int, list[memoryview]]] = {}

    def add(self, piece: bytes | memoryview) -> bytes | None:
        """Take a piece; returns the message that it completes."""
        if len(piece) < _HEAD.size:
            return None
        sender, number, place, count = _HEAD.unpack_from(piece)
        part = memoryview(piece)[_HEAD.size :]
        if place == 0:
            self._parts.pop(sender, None)
            if count == 1:
                return bytes(part)
            if len(self._parts) >= MOST_SENDERS:
                self._parts.pop(next(iter(self._parts)))
            self._parts[sender] = number, [part]
            return None
        begun, parts = self._parts.get(sender, (-1, []))
        if begun != number or place != len(parts):
            self._parts.pop(sender, None)
            return None
        parts.append(part)
        if place < count - 1:
            return None
        del self._parts[sender]
        return b"".join(parts)

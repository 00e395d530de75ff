"""Frames that are sent in every step, as pika would write them, in a tenth of its lines; see frames.py for why.

Those before the body of a dead letter, which has headers, are left to pika.
"""

import struct
from functools import lru_cache

from pika import spec
from pika.exceptions import ShortStringTooLong

from sl_queue.transport.rabbitmq.frames import END, HEAD

CONTENT_TYPE = "application/msgpack"
_PUBLISH = struct.Struct(">IH")  # class and number, and nothing
_ACK = struct.Struct(">IQB")  # class and number, tag, flags
_HEADER = struct.Struct(">HHQH")  # class, nothing, size of the body, which properties there are
_CONTENT_TYPE, _DELIVERY_MODE, _EXPIRATION, _MESSAGE_ID = 1 << 15, 1 << 12, 1 << 8, 1 << 7
_MANDATORY = b"\x01"


def publication(
    channel: int, exchange: str, routing_key: str, size: int, number: int, persistent: bool, expires_in_s: float | None
) -> bytes:
    """Return the frames of a mandatory message with a body of `size` bytes, that `number` names to its sender."""
    there = _CONTENT_TYPE | _DELIVERY_MODE | _MESSAGE_ID
    expiration = b""
    if expires_in_s is not None:
        there |= _EXPIRATION
        expiration = _short(expiration_of(expires_in_s))
    header = b"".join((
        _HEADER.pack(spec.Basic.INDEX, 0, size, there), _short(CONTENT_TYPE), delivery_mode(persistent).to_bytes(),
        expiration, _short(str(number)),
    ))  # fmt: skip
    return b"".join((_method(channel, exchange, routing_key), _framed(spec.FRAME_HEADER, channel, header)))


def acknowledgement(channel: int, tag: int, and_before: bool) -> bytes:
    """Return the frame that acknowledges a delivery, or all up to it."""
    return _framed(spec.FRAME_METHOD, channel, _ACK.pack(spec.Basic.Ack.INDEX, tag, and_before))


def expiration_of(expires_in_s: float) -> str:
    """Return milliseconds, as AMQP has them."""
    return str(max(1, int(1000 * expires_in_s)))


def delivery_mode(persistent: bool) -> int:
    """Return AMQP's number of it."""
    return 2 if persistent else 1


@lru_cache(maxsize=1024)
def _method(channel: int, exchange: str, routing_key: str) -> bytes:
    where = _short(exchange) + _short(routing_key)
    return _framed(spec.FRAME_METHOD, channel, _PUBLISH.pack(spec.Basic.Publish.INDEX, 0) + where + _MANDATORY)


def _framed(kind: int, channel: int, payload: bytes) -> bytes:
    return b"".join((HEAD.pack(kind, channel, len(payload)), payload, END))


def _short(text: str) -> bytes:
    """Return a text of at most 255 bytes; ShortStringTooLong for a longer one, as with pika."""
    encoded = text.encode()
    if len(encoded) > 255:
        raise ShortStringTooLong(encoded)
    return len(encoded).to_bytes() + encoded

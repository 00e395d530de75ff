"""Frames that are sent in every step are those that pika writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import BasicProperties, frame, spec
from pika.exceptions import ShortStringTooLong

from sl_queue.transport.rabbitmq.sent_frames import acknowledgement, publication

names = st.text(max_size=60).filter(lambda text: len(text.encode()) <= 255)


@given(
    st.integers(1, 2**16 - 1),
    names,
    names,
    st.integers(0, 2**40),
    st.integers(0, 2**64),
    st.booleans(),
    st.none() | st.floats(-1, 1e6),
)
def test_they_are_what_pika_writes(
    channel: int, exchange: str, key: str, size: int, number: int, persistent: bool, expires_in_s: float | None
) -> None:
    properties = BasicProperties(
        content_type="application/msgpack",
        delivery_mode=2 if persistent else 1,
        message_id=str(number),
        expiration=None if expires_in_s is None else str(max(1, int(expires_in_s * 1000))),
    )
    method = spec.Basic.Publish(exchange=exchange, routing_key=key, mandatory=True)
    expected = frame.Method(channel, method).marshal() + frame.Header(channel, size, properties).marshal()
    assert publication(channel, exchange, key, size, number, persistent, expires_in_s) == expected


@given(st.integers(1, 2**16 - 1), st.integers(0, 2**64 - 1), st.booleans())
def test_so_is_an_acknowledgement(channel: int, tag: int, and_before: bool) -> None:
    expected = frame.Method(channel, spec.Basic.Ack(tag, and_before)).marshal()
    assert acknowledgement(channel, tag, and_before) == expected


def test_a_name_longer_than_amqp_allows_is_an_error() -> None:
    with pytest.raises(ShortStringTooLong):
        publication(1, "x" * 256, "key", 0, 1, persistent=False, expires_in_s=None)

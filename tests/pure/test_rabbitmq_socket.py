"""Bytes of a broker become frames, however they are cut; and what our connection relies on in pika."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import connection, frame, spec
from pika.exceptions import InvalidFrameError

from sl_queue.protocol.memory import is_given_away
from sl_queue.transport.rabbitmq.frames import MOST_AHEAD, SMALL_BYTES, Incoming
from sl_queue.transport.rabbitmq.socket import SocketConnection

FRAME_MAX = 4096


def patterned(size: int) -> bytes:
    """Return bytes in which no part looks like its neighbours."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


messages = st.lists(
    st.tuples(st.integers(1, 3), st.binary(max_size=64) | st.integers(0, 60_000).map(patterned)), min_size=1, max_size=5
)


def frames_of(channel: int, body: bytes, largest: int) -> list[bytes]:
    """Return a delivery as a broker would send it, its body in frames of at most `largest` bytes."""
    method = spec.Basic.Deliver("consumer", 7, False, "x.bank", "key")
    parts = [body[at : at + largest - 8] for at in range(0, len(body), largest - 8)]
    return [
        frame.Method(channel, method).marshal(),
        frame.Header(channel, len(body), spec.BasicProperties(message_id="1")).marshal(),
        *(frame.Body(channel, part).marshal() for part in parts),
    ]


def received(incoming: Incoming, stream: bytes, cuts: list[int]) -> list[object]:
    """Return what comes out when the stream arrives in these pieces, and no faster than there is space."""
    found: list[object] = []
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    for start, stop in pairwise(edges):
        piece = stream[start:stop]
        while piece:
            taken = piece
            for space in incoming.spaces(FRAME_MAX):
                here = min(len(space), len(piece))
                space[:here], piece = piece[:here], piece[here:]
            assert len(piece) < len(taken)
            found += incoming.received(len(taken) - len(piece), FRAME_MAX)
    return found


@given(
    messages,
    st.lists(st.integers(0, 200_000), max_size=40),
    st.sampled_from((64, 1000, FRAME_MAX)),
    st.booleans(),
    st.booleans(),
)
def test_every_body_arrives_whole_however_the_stream_is_cut(
    sent: list[tuple[int, bytes]], cuts: list[int], largest: int, small: bool, scattered: bool
) -> None:
    stream = b"".join(part for channel, body in sent for part in frames_of(channel, body, largest))
    found = received(Incoming(most_ahead=20_000 if small else MOST_AHEAD, scattered=scattered), stream, cuts)
    bodies = [(f.channel_number, f.fragment) for f in found if isinstance(f, frame.Body)]
    assert bodies == [(channel, body) for channel, body in sent if body]
    assert all(is_given_away(body[-(len(body) // 64 * 64) :]) for _, body in bodies if len(body) > SMALL_BYTES)
    headers = [f.body_size for f in found if isinstance(f, frame.Header)]
    assert headers == [len(body) for _, body in sent]


@given(
    st.integers(0, 60_000).map(patterned),
    st.integers(0, 20_000).map(patterned),
    st.sampled_from((500, FRAME_MAX)),
    st.lists(st.integers(0, 200_000), max_size=40),
    st.randoms(use_true_random=False),
)
def test_bodies_of_two_channels_and_heartbeats_may_come_mixed(
    one: bytes, other: bytes, largest: int, cuts: list[int], random: object
) -> None:
    heartbeats = [frame.Heartbeat().marshal()] * 5
    queues = [frames_of(1, one, largest), frames_of(2, other, 700), heartbeats]
    mixed = []
    while any(queues):
        queue = random.choice([queue for queue in queues if queue])  # type: ignore[attr-defined]
        mixed.append(queue.pop(0))
    stream = b"".join(mixed)
    found = received(Incoming(), stream, cuts)
    assert sum(isinstance(f, frame.Heartbeat) for f in found) == 5
    bodies = {f.channel_number: f.fragment for f in found if isinstance(f, frame.Body)}
    assert bodies == {channel: body for channel, body in ((1, one), (2, other)) if body}


def test_frames_are_foreseen_once_however_little_is_received_at_a_time() -> None:
    stream, incoming = b"".join(frames_of(1, patterned(60_000), FRAME_MAX)), Incoming()
    received(incoming, stream[:200], [])
    places: list[memoryview] = []
    for byte in range(200, 1200):
        first, *places = incoming.spaces(FRAME_MAX)
        assert places[0] is incoming.spaces(FRAME_MAX)[1]
        first[:1] = stream[byte : byte + 1]
        assert not list(incoming.received(1, FRAME_MAX))
    assert len(places) == 2 * 14 + 1


@pytest.mark.parametrize("missing", range(1, 10))
def test_a_foreseen_head_may_come_in_parts(missing: int) -> None:
    body = patterned(5 * (FRAME_MAX - 8) + 256)  # so the last head ends in a zero, as an empty place does
    stream = b"".join(frames_of(1, body, FRAME_MAX))
    found = received(Incoming(), stream, [2000, len(stream) - 1 - 256 - missing])
    assert [f.fragment for f in found if isinstance(f, frame.Body)] == [body]


def test_a_heartbeat_may_come_in_the_middle_of_a_body() -> None:
    method, header, *parts = frames_of(1, bytes(1000), 300)
    stream = b"".join((method, header, parts[0], frame.Heartbeat().marshal(), *parts[1:]))
    kinds = [type(found).__name__ for found in received(Incoming(), stream, [])]
    assert kinds == ["Method", "Header", "Heartbeat", "Body"]


@pytest.mark.parametrize(
    "stream",
    [
        frame.Heartbeat().marshal()[:-1] + b"\x00",
        frame.Body(1, bytes(FRAME_MAX + 1)).marshal(),
        b"HTTP/1.1 400 Bad Request\r\n",
    ],
    ids=["no end", "longer than agreed", "not AMQP"],
)
def test_what_is_no_frame_is_refused(stream: bytes) -> None:
    with pytest.raises(InvalidFrameError):
        received(Incoming(), stream, [])


def test_a_body_of_a_gigabyte_that_is_only_announced_takes_no_memory() -> None:
    incoming = Incoming()
    header = frame.Header(1, 1 << 30, spec.BasicProperties()).marshal()
    received(incoming, header + frame.Body(1, bytes(FRAME_MAX - 8)).marshal()[:-1], [])
    assert sum(map(len, incoming.spaces(FRAME_MAX))) <= MOST_AHEAD


def test_pika_still_calls_what_our_connection_replaces() -> None:
    assert "_send_message" in connection.Connection._send_method.__code__.co_names
    assert "_output_marshaled_frames" in connection.Connection._send_frame.__code__.co_names
    assert not SocketConnection.__abstractmethods__

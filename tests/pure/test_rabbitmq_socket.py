"""Bytes of a broker become what they say, however they are cut; and what our connection relies on in pika."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import amqp_object, connection, frame, spec
from pika.exceptions import InvalidFrameError

from sl_queue.protocol.memory import is_given_away
from sl_queue.transport.rabbitmq.frames import MOST_AHEAD, SMALL_BYTES, Confirmed, Delivered, Incoming
from sl_queue.transport.rabbitmq.socket import SocketConnection

FRAME_MAX = 4096


def patterned(size: int) -> bytes:
    """Return bytes in which no part looks like its neighbours."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


Content = tuple[int, int, bytes]  # channel, tag, body

contents = st.tuples(
    st.integers(1, 3), st.integers(0, 2**64 - 1), st.binary(max_size=64) | st.integers(0, 60_000).map(patterned)
)


def frames_of(channel: int, body: bytes, largest: int, tag: int = 7) -> list[bytes]:
    """Return a delivery as a broker would send it, its body in frames of at most `largest` bytes; with tag 0 a return.

    One with an odd tag came before.
    """
    method: amqp_object.Method = spec.Basic.Deliver("a consumer", tag, tag % 2 == 1, "x.bank", "key")
    method = method if tag else spec.Basic.Return(312, "NO_ROUTE", "x.bank", "key")
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


def contents_of(found: list[object]) -> list[Content]:
    """Return what came, of our own and of pika's frames."""
    came, headers = list[Content](), dict[int, frame.Header]()
    for each in found:
        match each:
            case Delivered(channel, tag, redelivered, body):
                assert redelivered == (tag % 2 == 1)
                came.append((channel, tag, bytes(body)))
                assert len(body) <= SMALL_BYTES or is_given_away(body[-(len(body) // 64 * 64) :])
            case frame.Header():
                headers[each.channel_number] = each
                if not each.body_size:
                    came.append((each.channel_number, 0, b""))
            case frame.Body():
                assert headers[each.channel_number].body_size == len(each.fragment)
                came.append((each.channel_number, 0, bytes(each.fragment)))
    return came


@given(
    st.lists(contents, min_size=1, max_size=5),
    st.lists(st.integers(0, 200_000), max_size=40),
    st.sampled_from((64, 1000, FRAME_MAX)),
    st.booleans(),
    st.booleans(),
)
def test_every_body_arrives_whole_however_the_stream_is_cut(
    sent: list[Content], cuts: list[int], largest: int, small: bool, scattered: bool
) -> None:
    stream = b"".join(part for channel, tag, body in sent for part in frames_of(channel, body, largest, tag))
    found = received(Incoming(most_ahead=20_000 if small else MOST_AHEAD, scattered=scattered), stream, cuts)
    assert contents_of(found) == sent


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
    answers = [frame.Heartbeat().marshal(), frame.Method(3, spec.Basic.Ack(5, multiple=True)).marshal()] * 3
    queues = [frames_of(1, one, largest), frames_of(2, other, 700, tag=0), answers]
    mixed = []
    while any(queues):
        queue = random.choice([queue for queue in queues if queue])  # type: ignore[attr-defined]
        mixed.append(queue.pop(0))
    stream = b"".join(mixed)
    found = received(Incoming(), stream, cuts)
    assert [f for f in found if isinstance(f, Confirmed)] == [Confirmed(3, 5, True, True)] * 3
    assert sum(isinstance(f, frame.Heartbeat) for f in found) == 3
    assert sorted(contents_of(found)) == [(1, 7, one), (2, 0, other)]


@given(st.integers(0, 2**64 - 1), st.booleans())
def test_answers_to_what_was_published_are_read_as_pika_writes_them(tag: int, multiple: bool) -> None:
    ack, nack = spec.Basic.Ack(tag, multiple), spec.Basic.Nack(tag, multiple, requeue=True)
    stream = b"".join(frame.Method(2, method).marshal() for method in (ack, nack))
    assert received(Incoming(), stream, []) == [Confirmed(2, tag, multiple, True), Confirmed(2, tag, multiple, False)]


def test_a_channel_that_is_closed_in_the_middle_of_a_delivery_forgets_it() -> None:
    method, _, *_ = frames_of(1, b"lost", FRAME_MAX)
    close = frame.Method(1, spec.Channel.Close(406, "PRECONDITION_FAILED", 60, 40)).marshal()
    stream = b"".join((method, close, *frames_of(1, b"returned", FRAME_MAX, tag=0)))
    found = received(Incoming(), stream, [])
    assert [type(each.method).__name__ for each in found if isinstance(each, frame.Method)] == ["Close", "Return"]
    assert contents_of(found) == [(1, 0, b"returned")]


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
    assert contents_of(found) == [(1, 7, body)]


def test_a_heartbeat_may_come_in_the_middle_of_a_body() -> None:
    method, header, *parts = frames_of(1, bytes(1000), 300)
    stream = b"".join((method, header, parts[0], frame.Heartbeat().marshal(), *parts[1:]))
    kinds = [type(found).__name__ for found in received(Incoming(), stream, [])]
    assert kinds == ["Heartbeat", "Delivered"]


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

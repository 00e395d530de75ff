"""Messages as bytes: what goes in comes out, anyone can read it, and nothing that a peer sends does harm."""

import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from math import prod
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.codec import (
    ITEM_BYTES,
    MAX_CONTROL_BYTES,
    MAX_CONTROL_ITEMS,
    MAX_HEADER_BYTES,
    OVERHEAD_BYTES,
    VERSION,
    decode,
    encode,
)
from sl_queue.protocol.control import (
    Alive,
    EpochDone,
    EpochResult,
    Failed,
    Finish,
    Finished,
    Join,
    Lost,
    Message,
    Open,
    Progress,
    Start,
    Status,
    Stop,
    Stopped,
    StopRequest,
    Waiting,
    kind_of,
)
from sl_queue.protocol.messages import Activation, Gradient, Header, Kind, MicroBatch, Payload

# Round trip ---------------------------------------------------------------------------------------------------

names = st.text(max_size=20)
counts = st.integers(0, 2**63)
steps = st.integers(-1, 2**40)
finite = st.floats(allow_nan=False)
kinds = st.sampled_from(Kind)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | finite | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
jobs = st.dictionaries(names, plain, max_size=4)
micro_batches = st.builds(MicroBatch, counts, counts)
results = st.builds(
    EpochResult, counts, steps, finite, st.none() | st.dictionaries(names, st.none() | finite, max_size=3), finite
)
held = st.lists(steps, max_size=4).map(tuple)


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=5)))
    size = prod(shape) * ITEM_BYTES[dtype]
    return Payload(dtype, shape, draw(st.binary(min_size=size, max_size=size)), draw(st.binary(max_size=64)))


messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Activation, micro_batches, payloads(), st.booleans()),
    st.builds(Gradient, micro_batches, payloads()),
    st.builds(
        Join,
        names,
        jobs,
        counts,
        names,
        names,
        st.none() | names,
        counts,
        held,
        st.lists(results, max_size=3).map(tuple),
    ),
    st.builds(Progress, names, counts, steps, held, st.none() | finite, counts),
    st.builds(EpochDone, names, counts, results),
    st.builds(Waiting, names, counts, names, kinds, steps, counts, finite, finite),
    st.builds(Lost, names, counts, names, kinds, steps, counts, finite),
    st.builds(Alive, names),
    st.builds(Failed, names, names, names),
    st.builds(Stopped, names, steps),
    st.builds(Finished, names, st.dictionaries(names, names, max_size=3)),
    st.just(StopRequest("s")),
    st.builds(Start, names, names, st.lists(steps, max_size=3).map(tuple)),
    st.builds(Open, names, steps, st.none() | steps),
    st.builds(Finish, names, steps),
    st.builds(Stop, names, names, st.none() | steps, st.none() | names),
    st.builds(Status, jobs),
)


@st.composite
def sent(draw: st.DrawFn) -> tuple[Header, Message]:
    message = draw(messages)
    where = message.micro_batch if isinstance(message, Activation | Gradient) else MicroBatch(0, 0)
    return Header(draw(names), draw(counts), kind_of(message), draw(names), draw(names), where, draw(steps)), message


@given(sent())
@settings(max_examples=150)
def test_every_message_comes_out_as_it_went_in(told: tuple[Header, Message]) -> None:
    assert decode(encode(*told)) == told


@given(sent())
def test_any_msgpack_reader_reads_it_and_the_last_element_is_the_tensor(told: tuple[Header, Message]) -> None:
    header, message = told
    *fields, data = msgpack.unpackb(encode(header, message))
    where = [header.micro_batch.step, header.micro_batch.index]
    assert fields[:6] == [VERSION, header.run, header.generation, header.kind, header.sender, header.receiver]
    assert fields[6:9] == [*where, header.committed]
    if isinstance(message, Activation | Gradient):
        payload = message.payload
        assert fields[9] == [payload.dtype, list(payload.shape), payload.rows]
        assert data == payload.data
    else:
        assert fields[9] is None
        values = msgpack.unpackb(msgpack.packb(asdict(message)))
        if isinstance(message, Start):
            values["bases"] = values.pop("rollback_steps")  # as the first version calls it
        assert msgpack.unpackb(data) == values


@given(sent())
def test_a_message_is_hardly_larger_than_its_tensor(told: tuple[Header, Message]) -> None:
    header, message = told
    if isinstance(message, Activation | Gradient):
        assert len(encode(header, message)) <= len(message.payload.data) + OVERHEAD_BYTES


HEADER = Header("r", 0, Kind.ACTIVATION, "bank", "insurer", MicroBatch(3, 1), 2)


def test_a_tensor_is_copied_once_when_encoded_and_never_when_decoded() -> None:
    tensor = np.arange(2 * 1024 * 1024, dtype=np.float32)
    message = Activation(MicroBatch(3, 1), Payload("float32", tensor.shape, memoryview(tensor)))
    tracemalloc.start()
    body = encode(HEADER, message)
    encoded = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    _, received = decode(body)
    decoded = tracemalloc.get_traced_memory()[1] - len(body)
    tracemalloc.stop()
    assert encoded < len(body) + 64 * 1024
    assert decoded < 64 * 1024
    assert isinstance(received, Activation)
    assert isinstance(received.payload.data, memoryview)
    assert received.payload.data.obj is body
    assert np.array_equal(np.frombuffer(received.payload.data, np.float32), tensor)


# What a peer may send -----------------------------------------------------------------------------------------


def samples() -> list[bytes]:
    """One encoded message of each kind."""
    where, payload = MicroBatch(3, 1), Payload("float32", (2, 3), bytes(range(24)), b"rowsrows")
    result = EpochResult(0, 9, 0.5, {"loss": 0.25, "auroc": None})
    told: list[Message] = [
        Activation(where, payload),
        Activation(where, payload, holdout=True),
        Gradient(where, payload),
        Join("i", {"name": "toy", "parties": {"a": {"cut": [3]}}}, 9, "d", "integer", "r", 1, (1, 3), (result,)),
        Progress("i", 0, 4, (1, 3), 0.5, 9),
        EpochDone("i", 0, result),
        Waiting("i", 0, "a", Kind.GRADIENT, 3, 1, 0.5, 0.25),
        Failed("i", "ComputeError", "why"),
        StopRequest("s"),
        Start("i", "r", (1, 2)),
        Stop("i", "why", 3),
        Status({"phase": "running", "history": [{"loss": 0.5}]}),
    ]
    return [encode(Header("r", 0, kind_of(m), "bank", "insurer", where, 2), m) for m in told]


def harmless(body: bytes) -> bool:
    """Return True if it is refused; what is not refused must be consistent in itself."""
    try:
        header, message = decode(body)
    except RemoteProtocolError as error:
        return len(str(error)) < 400  # it tells what is wrong, not what was sent
    assert kind_of(message) is header.kind
    if isinstance(message, Activation | Gradient):
        payload = message.payload
        assert prod(payload.shape) * ITEM_BYTES[payload.dtype] == len(payload.data)
        assert message.micro_batch == header.micro_batch
    return False


def test_every_truncated_and_every_padded_message_is_refused() -> None:
    for body in samples():
        assert not harmless(body)
        assert all(harmless(body[:length]) for length in range(len(body)))
        assert all(harmless(body + padding) for padding in (b"\0", b"\xc0", body, bytes(1000)))


def mutated(rng: random.Random, body: bytes, other: bytes) -> bytes:
    """Return the message with a few things wrong with it."""
    changed = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, length = rng.randrange(len(changed)), rng.randrange(1, 9)
        match rng.randrange(6):
            case 0:
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place] = rng.choice(
                    b"\x00\x80\x90\xa0\xc0\xc1\xc4\xc6\xc7\xc9\xcf\xd3\xd6\xd9\xdb\xdc\xdd\xde\xdf\xff"
                )
            case 2:
                changed[place:place] = rng.randbytes(length)
            case 3:
                del changed[place : place + length]
            case 4:
                changed[place : place + length] = other[place : place + length]
            case _:
                changed[place : place + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\0"))
        if not changed:
            return b""
    return bytes(changed)


def test_thousands_of_mutated_messages_raise_nothing_but_a_protocol_error_in_bounded_memory() -> None:
    rng, bodies = random.Random(7), samples()
    cases = [mutated(rng, body, rng.choice(bodies)) for _ in range(600) for body in bodies]
    assert len(cases) == 7_200
    tracemalloc.start()
    refused = sum(map(harmless, cases))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 4_800
    assert peak < 2 * 1024 * 1024


@given(st.binary(max_size=300))
def test_any_bytes_raise_nothing_but_a_protocol_error(body: bytes) -> None:
    assert harmless(body)
    harmless(b"\x9b\x01" + body)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=5)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(anything, min_size=9, max_size=13))
def test_any_document_of_any_types_raises_nothing_but_a_protocol_error(fields: list[Any]) -> None:
    harmless(msgpack.packb(fields))
    harmless(msgpack.packb([VERSION, *fields]))


@given(st.integers(0, 9), anything, st.sampled_from(samples()))
def test_a_field_of_the_wrong_type_is_refused(place: int, value: Any, body: bytes) -> None:
    fields = msgpack.unpackb(body)
    right = fields[place]
    fields[place] = value
    if not harmless(msgpack.packb(fields)):
        assert place == 9 or type(value) is type(right)


@given(st.sampled_from(samples()[3:]), st.dictionaries(st.text(max_size=8), anything, max_size=3), st.data())
def test_a_report_or_command_of_wrong_fields_raises_nothing_but_a_protocol_error(
    body: bytes, extra: dict[str, Any], data: st.DataObject
) -> None:
    *fields, control = msgpack.unpackb(body)
    values = msgpack.unpackb(control) | extra
    values[data.draw(st.sampled_from(sorted(values)))] = data.draw(anything)
    harmless(msgpack.packb([*fields, msgpack.packb(values)]))
    harmless(msgpack.packb([*fields, msgpack.packb(data.draw(anything))]))


def tensor_message(dtype: Any, shape: Any, data: bytes, rows: Any = b"", kind: str = "activation") -> bytes:
    description = [dtype, shape, rows]
    return bytes(msgpack.packb([VERSION, "r", 0, kind, "bank", "insurer", 3, 1, 2, description, data]))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (tensor_message("float32", [2, 3], bytes(20)), r"float32 \(2, 3\) does not take 20 bytes"),
        (tensor_message("float64", [2, 3], bytes(24)), "does not take 24 bytes"),
        (tensor_message("float32", [2**63, 2**63], b""), "does not take 0 bytes"),
        (tensor_message("float32", [2**63, 0], b""), "malformed"),
        (tensor_message("float32", [-2, -3], bytes(24)), "malformed"),
        (tensor_message("float32", [True, 6], bytes(24)), "malformed"),
        (tensor_message("float32", [2.0, 3.0], bytes(24)), "malformed"),
        (tensor_message("float32", [1] * 16, bytes(4)), ""),
        (tensor_message("float32", [1] * 17, bytes(4)), "unreadable header"),
        (tensor_message("float32", "23", bytes(24)), "malformed"),
        (tensor_message("object", [3], bytes(24)), "dtype 'object' is not one of"),
        (tensor_message("O" * 400, [3], bytes(24)), "dtype 'OOOOOOOOOOOOOOOOOOOO' is not one of"),
        (tensor_message(b"float32", [6], bytes(24)), "malformed"),
        (tensor_message("float32", [6], bytes(24), rows="text"), "malformed"),
        (tensor_message("float32", [6], bytes(24), rows=bytes(65)), "unreadable header"),
        (tensor_message("float32", [6], bytes(24), kind="report"), "a report with a tensor"),
        (tensor_message("float32", [6], bytes(24), kind="pickle"), "out of range"),
    ],
)
def test_a_description_that_does_not_fit_its_tensor_is_told(body: bytes, reason: str) -> None:
    if not reason:
        assert not harmless(body)
        return
    with pytest.raises(RemoteProtocolError, match=reason):
        decode(body)


@pytest.mark.parametrize("version", [0, 2, True, 1.0, None, "1"])
def test_another_version_of_the_protocol_is_told(version: Any) -> None:
    fields = msgpack.unpackb(samples()[0])
    with pytest.raises(RemoteProtocolError, match="this program speaks 1"):
        decode(msgpack.packb([version, *fields[1:]]))


# Bombs --------------------------------------------------------------------------------------------------------

GIB = (2**30).to_bytes(4, "big")
HEAD = msgpack.packb([VERSION, "r", 0, "report", "bank", "scheduler", 0, 0, -1, None, b""])[:-2]
JOINED = asdict(Join("i", {}, 1, "", "", None, 0, ()))


def control(data: bytes, kind: str = "report") -> bytes:
    head = HEAD.replace(b"\xa6report", msgpack.packb(kind))
    return bytes(head + struct.pack(">BI", 0xC6, len(data)) + data)


def with_list(key: str, item: bytes, count: int) -> bytes:
    """Encode a Join whose `key` is a list of `count` times `item`."""
    rest = msgpack.packb({k: v for k, v in JOINED.items() if k != key})
    array = b"\xdd" + count.to_bytes(4, "big") + item * count
    return control(bytes([rest[0] + 1]) + rest[1:] + msgpack.packb(key) + array)


def bombs() -> Iterator[tuple[str, bytes]]:
    for name, marker in (("array", b"\xdd"), ("map", b"\xdf"), ("bin", b"\xc6"), ("str", b"\xdb"), ("ext", b"\xc9")):
        declared = marker + GIB + (b"\x05" if name == "ext" else b"")
        yield f"{name} of a gibibyte as the message", declared + bytes(64)
        yield f"{name} of a gibibyte as a field", b"\x9b\x01" + declared + bytes(64)
        yield f"{name} of a gibibyte as the last field", HEAD + declared + bytes(64)
        yield f"{name} of a gibibyte as a report", control(declared + bytes(64))
        yield f"{name} of a gibibyte in a report", control(b"\x81\xa4type" + declared + bytes(64))
        yield f"{name} in {name} in {name}", control((declared + (b"\xa1a" if name == "map" else b"")) * 1000)
    yield "deep nesting", b"\x91" * 100_000
    yield "deep nesting in the header", b"\x9b\x01" + b"\x91" * 3000 + b"\xc0" * 10
    yield "deep nesting in a report", control(b"\x91" * 100_000 + b"\xc0")
    yield "deep maps in a report", control(b"\x81\xa1a" * 100_000 + b"\xc0")
    yield "deep job", control(msgpack.packb(JOINED).replace(b"\xa3job\x80", b"\xa3job" + b"\x81\xa1a" * 2000 + b"\xc0"))
    yield "a header without an end", b"\x9b\x01" + b"\xd9\xff" + b"a" * 255 + b"\xdb\0\1\0\0" + b"a" * 65536
    yield "many fields", msgpack.packb(list(range(100_000)))
    yield "a report of too many bytes", control(bytes(MAX_CONTROL_BYTES + 1))
    yield "bytes for text", control(b"\x81\xc4\x04type\xa5alive")
    yield "text that is none", control(b"\x82\xa4type\xa5alive\xabincarnation\xa2\xff\xfe")
    yield "a timestamp", control(b"\x82\xa4type\xa5alive\xabincarnation\xd6\xff\0\0\0\0")
    for key in ("held", "epochs"):
        yield f"too many {key}", with_list(key, b"\xc0", 1_000_000)
        yield f"the most wrong {key}", with_list(key, b"\xc0", MAX_CONTROL_ITEMS)
        yield f"the most empty {key}", with_list(key, b"\x80", MAX_CONTROL_ITEMS)


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in bombs()])
def test_a_bomb_is_refused_quickly_in_little_memory(body: bytes) -> None:
    tracemalloc.start()
    began = time.process_time()
    refused = harmless(body)
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused
    assert peak < 24 * 1024 * 1024
    assert seconds < 5.0


def test_the_longest_list_that_is_allowed_is_read() -> None:
    _, message = decode(with_list("held", b"\x01", MAX_CONTROL_ITEMS))
    assert isinstance(message, Join)
    assert len(message.held) == MAX_CONTROL_ITEMS


def test_a_header_is_never_larger_than_what_is_read_of_it() -> None:
    longest = Header("r" * 512, 2**63, Kind.ACTIVATION, "s" * 512, "r" * 512, MicroBatch(2**63, 2**63), 2**63)
    body = encode(longest, Activation(longest.micro_batch, Payload("bfloat16", (1,) * 16, bytes(2), bytes(64))))
    assert len(body) < MAX_HEADER_BYTES
    assert decode(body)[0] == longest

"""Tensors made shorter for their way: nothing lost that is not rounded away, and every run as exact as without."""

from dataclasses import replace
from hashlib import sha256
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import sl_queue
from sl_queue.cut.crossing import payload_view
from sl_queue.cut.packing import Cast, Compress, Dtype, Wire, nonzero, plain_cast
from sl_queue.cut.relu import gradient_mask
from sl_queue.cut.tensors import cast
from sl_queue.errors import RemoteProtocolError
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.messages import Activation, Gradient, Header, Kind, MicroBatch, Payload
from tests.support.split import Concatenated, Parties, equal_weights, parties

WIRES = [Wire(dtype, compress) for dtype, compress in product(get_args(Dtype), get_args(Compress))]
LOSSLESS = [Wire(compress=compress) for compress in get_args(Compress)]
WORST = {"bfloat16": 2**-8, "float16": 2**-10, "int8": 1 / 254}  # float16: also of what is small beside the largest
DIGESTS = {"bfloat16": "60b39cc9a577b13c", "float16": "262f3ee3d897d191", "int8": "34939858a022184b"}

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=9)


@st.composite
def payloads(draw: Any, dtypes: Any = ("float32", "float64", "float16", "bfloat16")) -> Payload:
    """Finite numbers of any size, about half of them zeros."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(SHAPES)
    exponent, seed = draw(st.integers(-30, 30)), draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=shape) * 10.0 ** (exponent if dtype not in ("float16",) else exponent % 4)
    numbers[rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0.0
    tensor = torch.from_numpy(numbers).to(getattr(torch, dtype))
    raw = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor
    return Payload(dtype, tuple(shape), raw.numpy().tobytes(), b"rows")


def numbers(payload: Payload) -> Any:
    assert not payload.packing
    raw = torch.frombuffer(bytearray(payload.data), dtype=getattr(torch, payload.dtype))
    return raw.double().numpy().reshape(payload.shape)


def travelled(message: Activation | Gradient) -> Payload:
    """As the receiver's codec reads it."""
    header = Header("run", 0, message.kind, "bank", "insurer", message.micro_batch)
    _, arrived = decode(encode(header, message))
    assert isinstance(arrived, Activation | Gradient)
    return arrived.payload


@pytest.mark.parametrize("wire", LOSSLESS, ids=str)
@settings(max_examples=60, deadline=None)
@given(payload=payloads())
def test_without_a_narrower_dtype_every_bit_arrives(wire: Wire, payload: Payload) -> None:
    packed = wire.pack(payload)
    arrived = wire.unpack(travelled(Activation(MicroBatch(0, 0), packed)))
    assert arrived == payload
    assert memoryview(packed.data).nbytes <= memoryview(payload.data).nbytes


@pytest.mark.parametrize("wire", [wire for wire in WIRES if wire.dtype != "float32"], ids=str)
@settings(max_examples=60, deadline=None)
@given(payload=payloads(("float32", "float64")))
def test_narrower_numbers_are_near_and_zeros_stay_zeros(wire: Wire, payload: Payload) -> None:
    packed = wire.pack(payload)
    arrived = numbers(wire.unpack(travelled(Activation(MicroBatch(0, 0), packed))))
    exact = numbers(payload)
    largest = np.abs(exact).max(initial=0.0)
    if wire.dtype == "int8":
        largest = np.abs(exact.reshape(len(exact), -1)).max(axis=1).reshape(-1, *[1] * (exact.ndim - 1))
        allowed = np.broadcast_to(largest * WORST["int8"] * 1.01, exact.shape)
    else:
        allowed = np.abs(exact) * WORST[wire.dtype] + (largest * 2.0**-38 if wire.dtype == "float16" else 0)
    assert (np.abs(arrived - exact) <= allowed + 1e-37).all()
    assert (arrived[exact == 0] == 0).all()
    assert wire.pack(payload).data == packed.data
    assert memoryview(packed.data).nbytes <= wire.bytes_of(payload.dtype, payload.shape)


@pytest.mark.parametrize("wire", [wire for wire in WIRES if wire.compress == "bitmap"], ids=str)
@settings(max_examples=40, deadline=None)
@given(payload=payloads(("float32",)), seed=st.integers(0, 2**32))
def test_gradients_of_a_relus_zeros_stay_at_home_and_the_others_are_those_that_travel_without(
    wire: Wire, payload: Payload, seed: int
) -> None:
    activation = wire.pack(payload, relu=True)
    wanted = gradient_mask(activation)
    if wanted is None:
        assert not activation.packing.endswith("relu")
        return
    assert (wanted == nonzero(np.frombuffer(payload.data, np.float32))).all()
    dense = np.random.default_rng(seed).normal(size=payload.shape).astype(np.float32)
    gradient = Payload("float32", payload.shape, dense.tobytes(), b"rows")
    packed = wire.pack(gradient, wanted=wanted)
    arrived = numbers(wire.unpack(travelled(Gradient(MicroBatch(0, 0), packed)), wanted)).reshape(-1)
    masked = Payload("float32", payload.shape, np.where(wanted.reshape(dense.shape), dense, 0).tobytes(), b"rows")
    expected = numbers(Wire(wire.dtype).unpack(Wire(wire.dtype).pack(masked))).reshape(-1)
    assert (arrived == expected).all()
    assert memoryview(packed.data).nbytes <= memoryview(Wire(wire.dtype).pack(gradient).data).nbytes


@pytest.mark.parametrize("wire", WIRES[1:], ids=str)
@settings(max_examples=60, deadline=None)
@given(payload=payloads(("float32",)), data=st.data())
def test_what_was_altered_on_its_way_is_refused_or_fills_no_more_than_was_promised(
    wire: Wire, payload: Payload, data: Any
) -> None:
    packed = wire.pack(payload, relu=True)
    body = bytearray(packed.data)
    for place in data.draw(st.lists(st.integers(0, max(len(body) - 1, 0)), max_size=3)) if body else ():
        body[place] ^= data.draw(st.integers(1, 255))
    body = body[: data.draw(st.integers(0, len(body)))] + data.draw(st.binary(max_size=4))
    how = data.draw(
        st.sampled_from([packed.packing, "int8/relu", "float32/wanted", "float16/zstd", "float64/none", "/"])
    )
    altered = Payload(payload.dtype, payload.shape, bytes(body), payload.rows, how)
    try:
        arrived = wire.unpack(altered)
    except RemoteProtocolError:
        return
    assert memoryview(arrived.data).nbytes == memoryview(payload.data).nbytes or not how


def test_more_bytes_than_the_declared_tensor_can_take_are_refused_when_they_are_read() -> None:
    header = Header("run", 0, Kind.ACTIVATION, "bank", "insurer", MicroBatch(0, 0))
    payload = Payload("float32", (2, 3), bytes(40), b"", "int8/none")
    with pytest.raises(RemoteProtocolError, match="does not take 40 bytes"):
        decode(encode(header, Activation(MicroBatch(0, 0), payload)))


# Whole runs -----------------------------------------------------------------------------------------------------


def relu_parties(last: type[nn.Module] = nn.ReLU, **job: Any) -> Parties:
    draw = np.random.default_rng(5)
    features = {name: draw.normal(size=(30, 3 + i)).astype(np.float32) for i, name in enumerate(("a", "b"))}
    torch.manual_seed(3)
    bases = {name: nn.Sequential(nn.Linear(3 + i, 8), last()) for i, name in enumerate(features)}
    labels = draw.integers(0, 2, 30)
    cuts = {name: [8] for name in features}
    return parties(bases, Concatenated(16, 1), features, labels, cuts=cuts, optimizer={"name": "adam"}, **job)


PIPELINES = [{"micro_batches": 3, "depth": 2}, {"micro_batches": 1, "depth": 2, "staleness": 1}]


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
@pytest.mark.parametrize("last", [nn.ReLU, nn.Tanh, nn.Identity])
@pytest.mark.parametrize("wire", LOSSLESS[1:], ids=str)
def test_leaving_zeros_out_changes_no_weight(wire: Wire, last: type[nn.Module], pipeline: dict[str, int]) -> None:
    table = {"dtype": wire.dtype, "compress": wire.compress}
    plain, shorter = relu_parties(last, pipeline=pipeline), relu_parties(last, pipeline=pipeline, wire=table)
    expected, found = plain.stages().train(plain.pipeline), shorter.stages().train(shorter.pipeline)
    for name, module in found.modules().items():
        assert equal_weights(module, expected.modules()[name]), name


def test_a_relus_zeros_cost_an_eighth_of_a_byte_and_their_gradients_nothing() -> None:
    run = relu_parties(wire={"compress": "bitmap"})
    stages = run.stages()
    first = MicroBatch(0, 0)
    sent = {name: base.forward(first) for name, base in stages.bases.items()}
    back = stages.fuse.forward_backward(first, sent)
    for name, activation in sent.items():
        kept = int(nonzero(np.frombuffer(Wire(compress="bitmap").unpack(activation).data, np.float32)).sum())
        assert 0 < kept < 12 * 8
        assert len(activation.data) == 12 + 4 * kept
        assert len(back[name].data) == 4 * kept


@pytest.mark.parametrize("wire", [Wire("int8", "bitmap"), Wire("float16", "zstd"), Wire("bfloat16")], ids=str)
def test_a_run_resumed_with_narrower_numbers_has_the_bits_of_an_uninterrupted_one(wire: Wire) -> None:
    table = {"dtype": wire.dtype, "compress": wire.compress}
    run = relu_parties(pipeline={"micro_batches": 2, "checkpoint_every": 2}, wire=table)
    quiet = run.stages().train(run.pipeline)
    first = run.stages().train(run.pipeline, stop_after=2)
    resumed = run.stages()
    for name, base in resumed.bases.items():
        base.load(first.bases[name].state())
    resumed.fuse.load(first.fuse.state())
    resumed.train(run.pipeline, first_step=3)
    exact = relu_parties(pipeline={"micro_batches": 2, "checkpoint_every": 2})
    exactly = exact.stages().train(exact.pipeline)
    for name, module in resumed.modules().items():
        assert equal_weights(module, quiet.modules()[name]), name
        assert not equal_weights(module, exactly.modules()[name]), f"{name}: nothing was rounded"


def test_a_whole_run_learns_with_a_byte_a_number() -> None:
    draw = np.random.default_rng(1)
    x = draw.normal(size=(400, 6)).astype(np.float32)
    run = parties(
        {name: nn.Sequential(nn.Linear(3, 8), nn.ReLU()) for name in ("a", "b")},
        Concatenated(16, 1),
        {"a": x[:, :3], "b": x[:, 3:]},
        (x.sum(axis=1) > 0).astype(np.int64),
        cuts={"a": [8], "b": [8]},
        optimizer={"name": "adam", "lr": 0.02},
        metrics=["auroc"],
        epochs=8,
        batch_size=50,
        holdout=0.25,
        wire={"dtype": "int8", "compress": "bitmap"},
    )
    files = list(run.files.values())
    last = sl_queue.run_local(run.job, files).history[-1]["holdout"]
    assert last["auroc"] > 0.98


def test_a_peer_that_sends_narrower_numbers_than_agreed_is_named() -> None:
    run, narrow = relu_parties(), relu_parties(wire={"dtype": "float16"})
    sent = {name: base.forward(MicroBatch(0, 0)) for name, base in narrow.stages().bases.items()}
    with pytest.raises(
        RemoteProtocolError, match=r"activation of party 'a': .* travelled as float16, the job says float32"
    ):
        run.stages().fuse.forward_backward(MicroBatch(0, 0), sent)


def filled(by: Cast, source: Any, dtype: Any) -> Any:
    target = np.empty(source.shape, dtype)
    by(source, target)
    return target


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (7,), (200, 129)])
@pytest.mark.parametrize("narrow", [np.float16, np.uint16], ids=["float16", "bfloat16"])
def test_torch_rounds_to_two_bytes_and_back_as_numpy_does(shape: tuple[int, ...], narrow: Any) -> None:
    draw = np.random.default_rng(0)
    numbers = (draw.standard_normal(shape) * 10.0 ** draw.integers(-9, 5, shape)).astype(np.float32)
    numbers.setflags(write=False)
    for source in (numbers, numbers.T.copy().T):
        short = filled(cast, source, narrow)
        assert np.array_equal(short, filled(plain_cast, source, narrow))
        short.setflags(write=False)
        assert np.array_equal(filled(cast, short, np.float32), filled(plain_cast, short, np.float32))
    if narrow is np.float16:
        wide = numbers.astype(np.float64)
        assert np.array_equal(filled(cast, wide, narrow), wide.astype(np.float16))


def test_the_bytes_of_narrower_numbers_are_what_they_always_were() -> None:
    """Read what an older version left in flight, and go on from its state with the same bits."""
    draw = np.random.default_rng(1)
    values = (draw.standard_normal((5, 3)) * 10.0 ** draw.integers(-3, 4, (5, 3))).astype(np.float32)
    payload = payload_view(torch.from_numpy(values), b"12345678")
    digests = {dtype: sha256(replace(Wire(dtype), cast=cast).pack(payload).data).hexdigest()[:16] for dtype in WORST}
    assert digests == DIGESTS

"""Limits of messages, known to the job: whatever a valid job can make, every reader accepts."""

from math import prod
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sl_queue.config.job import MAX_PARTIES, Job
from sl_queue.cut.packing import Compress, Dtype, unused
from sl_queue.errors import JobError, LocalProtocolError
from sl_queue.protocol.codec import MAX_RANK, MAX_TENSOR_BYTES, decode, encode
from sl_queue.protocol.control import EpochResult, Join, Message, kind_of
from sl_queue.protocol.messages import SCHEDULER, Activation, Gradient, Header, Kind, MicroBatch, Payload
from tests.support.resolved import base_stage
from tests.support.split import Concatenated, parties

WORDS = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789_-", min_size=1, max_size=64)
LARGE = 2**63 - 1
FIRST = MicroBatch(0, 0)


def job(cut: list[int], role: str = "feature", **more: Any) -> Job:
    others = {"label": {"b": {"role": "feature", "cut": [1]}}, "feature": {"holder": {"role": "label"}}}[role]
    roles: dict[str, Any] = {"a": {"role": role, "cut": cut}, **others}
    return Job(**{"name": "t", "seed": 7, "epochs": 1, "batch_size": 8, "parties": roles} | more)


def refused(cut: list[int], **more: Any) -> str:
    with pytest.raises(JobError) as caught:
        job(cut, **more)
    return str(caught.value)


# The cut ----------------------------------------------------------------------------------------------------------


def test_a_cut_has_as_many_axes_as_a_message_carries_beside_the_rows() -> None:
    assert job([1] * (MAX_RANK - 1)).cut("a") is not None
    for axes in (MAX_RANK, 40):
        assert f"parties.a.cut has {axes} numbers; it must have at most {MAX_RANK - 1}" in refused([1] * axes)


def test_a_row_of_a_cut_fits_into_a_message() -> None:
    assert job([2**31 - 1]).cut("a") is not None  # in a model of halves
    assert "parties.a.cut = [2147483648]: one row takes at least 4294967296 bytes" in refused([2**31])
    assert job([2**31], wire={"dtype": "int8"}).cut("a") is not None
    assert "one row takes at least" in refused([2**16, 2**16], wire={"dtype": "int8"})
    assert "one row takes at least" in refused([LARGE] * 3)


def test_the_label_holders_own_activations_are_not_sent_and_may_be_anything() -> None:
    assert job([1] * 20, role="label").cut("a") is not None
    assert job([LARGE, LARGE], role="label").cut("a") is not None


def test_a_job_has_no_more_parties_than_a_status_can_name() -> None:
    roles = {f"p{i}": {"role": "feature", "cut": [1]} for i in range(MAX_PARTIES)}
    with pytest.raises(JobError, match=f"there are {MAX_PARTIES + 1}; a job has at most {MAX_PARTIES}"):
        Job(name="t", seed=7, epochs=1, batch_size=8, parties=roles | {"holder": {"role": "label"}})


def test_a_micro_batch_whose_activations_fit_into_no_message_is_named_before_training() -> None:
    class Huge(nn.Module):
        def forward(self, x: Any) -> Any:
            return x[:, :1].expand(-1, 2**27)  # a gigabyte of float64 a row, without memory of its own

    def build(**more: Any) -> Any:
        base = nn.Sequential(nn.Linear(2, 2).double(), Huge())
        settings: dict[str, Any] = {"batch_size": 10, "pipeline": {"micro_batches": 2}} | more
        features = {"a": np.zeros((10, 2))}
        made = parties({"a": base}, Concatenated(1, 1), features, np.arange(10) % 2, cuts={"a": [2**27]}, **settings)
        return base_stage(made.job, made.files["a"], made.tables["a"], made.job.batches(10))

    told = "the activations of a micro-batch of 5 rows take 5368709120 bytes.*raise pipeline.micro_batches above 2"
    with pytest.raises(JobError, match=told):
        build()
    build(pipeline={"micro_batches": 4})
    build(wire={"dtype": "float16"})
    with pytest.raises(JobError, match="of 9 rows"):
        build(batch_size=9, pipeline={"micro_batches": 1}, holdout=0.9)


def test_a_tensor_that_is_too_large_is_no_message() -> None:
    data = memoryview(np.zeros(MAX_TENSOR_BYTES + 1, np.uint8))  # of pages that nobody touches
    header = Header("run", 0, Kind.ACTIVATION, "a", "b", MicroBatch(0, 0))
    with pytest.raises(LocalProtocolError, match=f"at most {MAX_TENSOR_BYTES}"):
        encode(header, Activation(MicroBatch(0, 0), Payload("int8", (MAX_TENSOR_BYTES + 1,), data)))


# Whatever a valid job can make --------------------------------------------------------------------------------------


@st.composite
def jobs(draw: Any) -> Job:
    names = draw(st.lists(WORDS, min_size=2, max_size=5, unique=True))
    cuts = st.lists(st.one_of(st.just(1), st.integers(1, 4)), min_size=1, max_size=MAX_RANK - 1)
    cuts = cuts.filter(lambda cut: prod(cut) <= 4096)
    roles: dict[str, Any] = {name: {"role": "feature", "cut": draw(cuts)} for name in names[1:]}
    roles[names[0]] = {"role": "label"} | ({"cut": draw(cuts)} if draw(st.booleans()) else {})
    wire = {"dtype": draw(st.sampled_from(get_args(Dtype))), "compress": draw(st.sampled_from(get_args(Compress)))}
    count = st.integers(1, LARGE)
    values: dict[str, Any] = {
        "name": draw(st.from_regex(r"[A-Za-z0-9_-]{1,100}", fullmatch=True)),
        "seed": draw(st.integers(-(2**63), LARGE)),
        "epochs": draw(count),
        "batch_size": LARGE,
        "pipeline": {"micro_batches": draw(count), "depth": draw(count), "checkpoint_every": draw(count)},
        "broker": {"patience": draw(st.floats(min_value=0.1, max_value=1e300))},
    }
    try:
        return Job(**values, parties=roles, wire=wire)
    except JobError:  # a name that is reserved
        return job([1])


def accepted(sender: str, receiver: str, message: Message, micro_batch: MicroBatch = FIRST) -> None:
    header = Header("f" * 12, 0, kind_of(message), sender, receiver, micro_batch)
    _, arrived = decode(encode(header, message))
    assert arrived == message


@settings(max_examples=150, deadline=None)
@given(made=jobs(), rows=st.integers(1, 3), step=st.integers(0, LARGE), seed=st.integers(0, 2**32))
def test_whatever_a_valid_job_can_make_is_read(made: Job, rows: int, step: int, seed: int) -> None:
    draw, micro_batch = np.random.default_rng(seed), MicroBatch(step, step)
    result = EpochResult(made.epochs, step, 0.5, {"loss": None, "auroc": 1.0})
    for party in made.parties:
        joined = Join("ab", made.canonical(), LARGE, "f" * 64, "integer", "f" * 12, LARGE, (step,), (result,))
        accepted(party, SCHEDULER, joined)
    for party in made.feature_parties:
        shape = (rows, *(made.cut(party) or ()))
        for dtype in ("float64", "float32", "float16"):
            numbers = np.maximum(draw.normal(size=shape), 0).astype(dtype)
            payload = Payload(dtype, shape, numbers.tobytes(), b"12345678")
            sent = made.on_the_wire.pack(payload, relu=True)
            for message in (Activation(micro_batch, sent), Activation(micro_batch, payload, holdout=True)):
                accepted(party, made.label_holder, message, micro_batch)
            for gradient in (made.on_the_wire.pack(payload), unused(dtype, shape, b"12345678")):
                accepted(made.label_holder, party, Gradient(micro_batch, gradient), micro_batch)

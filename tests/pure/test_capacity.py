"""One broker node carries so much: a job that asks for more gets a finding with figures and a remedy."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.checking.capacity import (
    GIB,
    MEASURED,
    Load,
    Node,
    described,
    load_of,
    objections,
)
from sl_queue.config.job import Job

NODE = Node(message_s=1e-3, byte_s=1e-9, connection_s=0.0, idle_s=0.0, connection_bytes=0.0, cores=2, busy=0.5)


def job(parties: int = 2, cut: int = 64, batch: int = 128, **tables: Any) -> Job:
    each = {f"p{number}": {"role": "feature", "cut": [cut]} for number in range(parties)}
    return Job(name="x", seed=1, epochs=1, batch_size=batch, parties={"label": {"role": "label"}, **each}, **tables)


def load(agreed: Job, rows: int = 100_000) -> Load:
    return load_of(agreed, agreed.batches(rows), {})


def said(found: Load, step_s: float | None = None, node: Node = NODE) -> str:
    return "\n".join(objections(found, step_s, node))


def test_a_step_has_an_activation_and_a_gradient_of_each_party_and_micro_batch() -> None:
    plain = load(job())
    assert (plain.messages, plain.queues, plain.stretch) == (4, 4, 50)
    assert plain.bytes == pytest.approx(4 * 128 * 64 * 4, rel=0.01)
    parts = load(job(pipeline={"micro_batches": 4, "depth": 4}))
    assert parts.messages == 16
    assert parts.bytes == pytest.approx(plain.bytes, rel=0.02), "as many rows in more messages"
    assert load(job(wire={"dtype": "float16"})).bytes == pytest.approx(plain.bytes / 2, rel=0.01)
    assert load(job(), rows=10 * 128).stretch == 10, "an epoch ends with a commit"


def test_a_small_job_fits_at_any_pace_that_its_label_holder_can_keep() -> None:
    small = load(job())
    assert said(small, small.step_s(0.001, 0.001), MEASURED) == ""
    assert "4 messages and 0.131 MB" in described(small, None)
    assert "messages/s" in described(small, 0.01)


def test_messages_that_lie_until_a_commit_may_not_fill_the_broker() -> None:
    large = load(job(parties=20, cut=4096, batch=1024))
    text = said(large, None, replace(NODE, memory_bytes=4 * GIB))
    assert f"{large.window_bytes / GIB:.3g} GiB lie unacknowledged" in text
    assert "GiB in each of 40 queues" in text
    steps = int(re.findall(r"checkpoint_every = (\d+) fits", text)[0])
    fitting = job(parties=20, cut=4096, batch=1024, pipeline={"checkpoint_every": steps})
    assert said(load(fitting), None, replace(NODE, memory_bytes=4 * GIB)) == ""
    more = job(parties=20, cut=4096, batch=1024, pipeline={"checkpoint_every": steps + 1})
    assert said(load(more), None, replace(NODE, memory_bytes=4 * GIB))


def test_where_not_even_one_step_fits_no_number_of_steps_is_advised() -> None:
    text = said(load(job(parties=20, cut=4096, batch=1024)), None, replace(NODE, memory_bytes=0.1 * GIB))
    assert "checkpoint_every" not in text
    assert 'use [wire] dtype = "float16", a smaller cut or batch' in text


@pytest.mark.parametrize(
    ("agreed", "remedy"),
    [
        (job(100, cut=1, pipeline={"micro_batches": 4, "depth": 4}), "use fewer micro_batches, or a cluster of"),
        (job(100, cut=1), "use a larger batch_size, or a cluster of"),
        (job(4, cut=4096, batch=1024), 'use [wire] dtype = "float16", a smaller cut, or a cluster of'),
    ],
)
def test_more_messages_or_bytes_a_second_than_the_cores_carry_name_their_remedy(agreed: Job, remedy: str) -> None:
    found = load(agreed)
    step_s = found.broker_s(NODE) / 2.9  # nearly three cores, of which one may be in use for long
    text = said(found, step_s, NODE)
    assert remedy in text
    assert "cluster of 3 nodes" in text
    assert f"{found.messages / step_s:,.0f} messages/s" in text
    assert "staleness = 1" in text
    assert "cores" not in said(found, found.broker_s(NODE) / 1.9, replace(NODE, busy=1.0))


def test_a_job_that_runs_ahead_is_not_told_to_and_a_run_ahead_hides_the_shorter_part() -> None:
    ahead = load(job(100, cut=1, pipeline={"micro_batches": 1, "depth": 2, "staleness": 1}))
    assert "staleness" not in said(ahead, ahead.broker_s(NODE) / 3)
    assert ahead.step_s(5.0, 1.0) == pytest.approx(5.0)
    assert load(job(100, cut=1)).step_s(5.0, 1.0) == pytest.approx(6.0 + ahead.label_s)


def test_many_parties_need_files_and_channels() -> None:
    assert "LimitNOFILE" in said(load(job(600), rows=1000))
    assert "LimitNOFILE" not in said(load(job(100)))
    assert "channel_max = 2103" in said(load(job(2100), rows=1000))


def test_connections_take_memory_that_a_window_then_lacks() -> None:
    node = replace(NODE, connection_bytes=4e6, memory_bytes=1e9)
    assert "602 connections with their queues take about 2.24 GiB" in said(load(job(600), rows=1000), None, node)
    found = load(job(20, cut=512))
    assert said(found, None, replace(node, memory_bytes=found.window_bytes + 1)) != ""
    assert said(found, None, replace(node, memory_bytes=found.window_bytes + 22 * 4e6)) == ""


def test_idle_connections_alone_can_be_too_many() -> None:
    text = said(load(job(600), rows=1000), 1e6, replace(NODE, connection_s=2e-3))
    assert "fewer parties for each broker" in text


@given(st.integers(1, 300), st.integers(1, 4096), st.integers(1, 8), st.floats(1e-4, 10.0))
def test_more_time_never_makes_an_objection(parties: int, cut: int, parts: int, step_s: float) -> None:
    found = load(job(parties, cut, pipeline={"micro_batches": parts, "depth": parts}), rows=1000)
    if not said(found, step_s):
        assert not said(found, 2 * step_s)

"""Order of training rows: the same on every party and version, every row once an epoch."""

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue import row_order
from sl_queue.errors import JobError
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches, split_holdout

seeds = st.integers(-(2**63), 2**64)


# An order that changes would train every resumed run on other rows than the rest of its epoch: these never change.
GOLDEN = {
    (1, 0, 0): [0],
    (8, 0, 0): [0, 5, 2, 4, 7, 6, 3, 1],
    (8, 0, 1): [6, 1, 3, 2, 0, 4, 5, 7],
    (8, 7, 0): [0, 5, 7, 6, 2, 4, 1, 3],
    (8, -1, 0): [1, 4, 5, 3, 6, 0, 2, 7],
    (8, 2**40, 3): [4, 7, 5, 6, 0, 2, 3, 1],
    (12, 2026, 100): [4, 7, 0, 1, 3, 9, 5, 10, 6, 2, 8, 11],
}
GOLDEN_HOLDOUT = {(10, 7, 0.2): [6, 8], (10, 8, 0.2): [3, 9], (11, 0, 0.5): [0, 3, 4, 6, 8, 9]}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_order_of_rows_is_what_it_always_was(case: tuple[int, int, int]) -> None:
    assert row_order(*case).tolist() == GOLDEN[case]


@pytest.mark.parametrize("case", GOLDEN_HOLDOUT)
def test_the_held_out_rows_are_what_they_always_were(case: tuple[int, int, float]) -> None:
    assert split_holdout(*case)[1].tolist() == GOLDEN_HOLDOUT[case]


def test_a_large_order_is_what_it_always_was() -> None:
    order = row_order(100_000, 7, 3)
    assert (order[:5].tolist(), int((order * np.arange(100_000)).sum())) == (
        [45165, 79517, 17259, 69882, 97512],
        250482071520108,
    )


@given(st.integers(0, 300), seeds, st.integers(0, 2**40))
def test_an_order_is_a_permutation_and_a_function_of_its_arguments_alone(n_rows: int, seed: int, epoch: int) -> None:
    order = row_order(n_rows, seed, epoch)
    np.random.seed(1)
    random.seed(1)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n_rows))
    assert np.array_equal(order, row_order(n_rows, seed, epoch))


def test_an_order_touches_no_global_random_state() -> None:
    before, before_numpy = random.getstate(), np.random.get_state()[1].tobytes()
    Batches(100, 7, 3, 10, 2, holdout=0.3).rows(MicroBatch(9, 1))
    assert random.getstate() == before
    assert np.random.get_state()[1].tobytes() == before_numpy


def test_another_process_with_another_hash_seed_finds_the_same_order() -> None:
    program = "from sl_queue import row_order; print(row_order(50, 7, 2).tolist())"
    told = [
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert told == [f"{row_order(50, 7, 2).tolist()}\n"] * 2


@given(seeds)
def test_every_epoch_has_an_order_of_its_own(seed: int) -> None:
    orders = {tuple(row_order(100, seed, epoch)) for epoch in range(20)}
    assert len(orders) == 20
    assert tuple(range(100)) not in orders


def test_every_row_comes_to_every_place_about_equally_often() -> None:
    places = np.stack([row_order(10, 7, epoch) for epoch in range(4000)])
    counts = np.stack([np.bincount(places[:, place], minlength=10) for place in range(10)])
    chi_squared = ((counts - 400) ** 2 / 400).sum()
    assert chi_squared < 150, "81 degrees of freedom: 150 is one in 200000"


def test_a_negative_number_of_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="-1"):
        row_order(-1, 0, 0)


@given(st.integers(0, 300), seeds, st.floats(0, 0.99))
def test_held_out_rows_and_training_rows_are_all_rows_and_share_none(n_rows: int, seed: int, holdout: float) -> None:
    training, held_out = split_holdout(n_rows, seed, holdout)
    assert np.array_equal(np.sort(np.concatenate([training, held_out])), np.arange(n_rows))
    assert len(held_out) == round(holdout * n_rows)
    assert np.all(np.diff(training) > 0)
    assert np.all(np.diff(held_out) > 0)


@st.composite
def batches(draw: st.DrawFn) -> Batches:
    """Any table and batch size that leave something to train on."""
    n_rows, batch_size = draw(st.integers(1, 60)), draw(st.integers(1, 20))
    holdout, drop_last = draw(st.sampled_from([0.0, 0.1, 0.5])), draw(st.booleans())
    training = n_rows - round(holdout * n_rows)
    if drop_last:
        batch_size = min(batch_size, max(training, 1))
    if training == 0:
        holdout = 0.0
    micro_batches = draw(st.integers(1, batch_size))
    shape = (n_rows, draw(seeds), draw(st.integers(1, 3)), batch_size, micro_batches)
    return Batches(*shape, holdout, draw(st.booleans()), drop_last)


@given(batches())
def test_the_micro_batches_of_a_step_cover_its_rows_exactly_and_in_order(b: Batches) -> None:
    training, _ = split_holdout(b.n_rows, b.seed, b.holdout)
    for epoch in range(b.epochs):
        order = training[row_order(len(training), b.seed, epoch)] if b.shuffle else training
        steps = range(epoch * b.steps_per_epoch, b.last_step(epoch) + 1)
        for place, step in enumerate(steps):
            parts = [b.rows(MicroBatch(step, index)) for index in range(b.parts(step))]
            sizes = [len(part) for part in parts]
            first = place * b.batch_size
            assert np.array_equal(np.concatenate(parts), order[first : first + b.batch_size])
            assert sum(sizes) == b.rows_in_step(step)
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)
            assert len(parts) == b.micro_batches or len(parts) == sum(sizes)
            assert (b.epoch_of(step), b.ends_epoch(step)) == (epoch, step == steps[-1])
    everything = [MicroBatch(step, index) for step in range(b.steps) for index in range(b.parts(step))]
    assert [b.after(micro_batch) for micro_batch in everything] == [*everything[1:], None]
    trained = sum(b.rows_in_step(step) for step in range(b.steps_per_epoch))
    dropped = len(training) - trained
    assert dropped == (len(training) % b.batch_size if b.drop_last else 0)
    assert b.steps == b.epochs * b.steps_per_epoch


@given(batches(), st.data())
def test_rows_are_found_in_the_micro_batches_that_have_them_and_in_no_others(b: Batches, data: st.DataObject) -> None:
    epoch = data.draw(st.integers(0, b.epochs - 1))
    wanted = data.draw(st.sets(st.sampled_from(b.training_positions.tolist()))) | set(b.holdout_positions.tolist())
    found = b.places(np.array(sorted(wanted), np.int64), epoch)
    for step in range(epoch * b.steps_per_epoch, (epoch + 1) * b.steps_per_epoch):
        for micro_batch in (MicroBatch(step, index) for index in range(b.parts(step))):
            here = [place for place, row in enumerate(b.rows(micro_batch).tolist()) if row in wanted]
            assert found.pop(micro_batch, np.zeros(0, np.int64)).tolist() == here
    assert not found


@given(batches())
def test_an_evaluation_covers_every_held_out_row_once_in_parts_no_larger_than_a_micro_batch(b: Batches) -> None:
    _, held_out = split_holdout(b.n_rows, b.seed, b.holdout)
    parts = [b.holdout_part(index) for index in range(b.holdout_parts)]
    assert np.array_equal(np.concatenate(parts) if parts else np.array([], int), held_out)
    assert all(1 <= len(part) <= -(-b.batch_size // b.micro_batches) for part in parts)


def test_a_last_batch_of_one_row_is_one_micro_batch_of_one_row() -> None:
    b = Batches(9, 7, 1, batch_size=4, micro_batches=2)
    assert (b.steps, b.parts(2), b.rows_in_step(2)) == (3, 1, 1)
    assert b.rows(MicroBatch(2, 0)).shape == (1,)


def test_without_a_row_to_train_on_the_job_is_wrong() -> None:
    with pytest.raises(JobError, match="drop_last = true drops the only batch"):
        Batches(3, 7, 1, batch_size=4, micro_batches=1, drop_last=True)
    with pytest.raises(JobError, match="no row is left to train on"):
        Batches(1, 7, 1, batch_size=4, micro_batches=1, holdout=0.9)

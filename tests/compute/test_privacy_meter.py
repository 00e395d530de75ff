"""A meter sees a sample of what is sent, adds up over epochs, and goes on where a checkpoint left it."""

import numpy as np
import pytest
import torch

from sl_queue.cut.guard import Crossing
from sl_queue.cut.rows import CutRows
from sl_queue.privacy import sampled
from sl_queue.privacy.guards import GradientTap
from sl_queue.privacy.meter import ActivationMeter, GradientMeter
from sl_queue.privacy.sampled import Whereabouts
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches

N, KEY = 6000, b"k" * 32
KEYS = np.random.default_rng(2).permutation(N).astype(np.uint64) * np.uint64(2**40)  # of the rows, in any order
RNG = np.random.default_rng(7)
LABELS = (RNG.random(N) < 0.03).astype(np.int64)
TRAINING = np.setdiff1d(np.arange(N), np.arange(0, N, 5))
WEIGHTS = np.array([0.5, -1.0, 0.2, 0.7])


def gradients(rows: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """(p - y) times the fuse model's weights, and noise in all directions."""
    rng = np.random.default_rng(seed)
    exact = (0.03 - LABELS[rows])[:, None] * WEIGHTS
    return (exact + noise * rng.standard_normal(exact.shape)).astype(np.float32)


def gradient(found: GradientMeter, rows: np.ndarray, sent: np.ndarray, party: str = "bank") -> None:
    """Send a party the gradients of these rows."""
    found.saw_gradient(party, KEYS[rows], sent)


def activation(found: GradientMeter | ActivationMeter, rows: np.ndarray, sent: np.ndarray) -> None:
    """Have a party send its activations of these rows."""
    if isinstance(found, GradientMeter):
        found.saw_activation("bank", KEYS[rows], sent)
    else:
        found.saw_activation(KEYS[rows], sent)


def epoch(found: GradientMeter, noise: float, seed: int, first: int = 0, last: int | None = None) -> None:
    """Send one epoch's batches in an order of its own, or some of them."""
    batches = np.array_split(np.random.default_rng(seed).permutation(TRAINING), 10)
    for number, rows in list(enumerate(batches))[first:last]:
        gradient(found, rows, gradients(rows, noise, 100 * seed + number))
        activation(found, rows, gradients(rows, 0.1, 0))


def test_an_undefended_run_gives_labels_away_by_every_attack_and_chance_does_not() -> None:
    found = GradientMeter(LABELS, TRAINING, KEY, KEYS)
    epoch(found, 0.001, 1)
    (leak,) = found.end_epoch().values()
    assert min(leak[name] for name in ("norm", "direction", "spectral", "patient", "completion")) > 0.99
    assert leak["probe"] > 0.9
    assert leak["chance"] < 0.56


def test_patience_finds_what_no_single_epoch_shows() -> None:
    found = GradientMeter(LABELS, TRAINING, KEY, KEYS)
    seen = []
    for number in range(12):
        epoch(found, 2.0, number)
        seen.append(found.end_epoch()["bank"])
    assert max(leak["norm"] for leak in seen) < 0.65
    assert seen[0]["patient"] < 0.75
    assert seen[-1]["patient"] > seen[0]["patient"] + 0.1


def test_a_meter_that_was_interrupted_says_what_an_uninterrupted_one_does() -> None:
    whole = GradientMeter(LABELS, TRAINING, KEY, KEYS)
    for number in (1, 2):
        epoch(whole, 0.3, number)
        expected = whole.end_epoch()
    first = GradientMeter(LABELS, TRAINING, KEY, KEYS)
    epoch(first, 0.3, 1)
    first.end_epoch()
    epoch(first, 0.3, 2, 0, 4)
    second = GradientMeter(LABELS, TRAINING, KEY, KEYS)
    second.load(first.arrays())
    epoch(second, 0.3, 2, 4)
    assert second.end_epoch() == expected
    second.load({})
    epoch(second, 0.3, 1)
    assert second.end_epoch()["bank"]["change"] == 0.5  # it has forgotten all


def test_what_another_version_kept_of_another_sample_is_no_error_and_the_meter_begins_again() -> None:
    first = GradientMeter(LABELS, TRAINING, KEY, KEYS)
    epoch(first, 0.3, 1)
    first.end_epoch()
    kept = {
        name: np.concatenate([array, array]) if name != "epoch" else array for name, array in first.arrays().items()
    }
    wide = {name: np.repeat(array, 30, axis=-1) if "rows" in name else array for name, array in first.arrays().items()}
    for arrays in (kept, wide):
        second = GradientMeter(LABELS, TRAINING, KEY, KEYS)
        second.load(arrays)
        epoch(second, 0.3, 2)
        assert second.end_epoch()["bank"]["change"] == 0.5


def test_the_sampled_rows_alone_are_copied_and_give_the_same_numbers() -> None:
    batches = Batches(N, 5, 1, 1000, 3, hashes=KEYS, holdout=0.2)
    training = batches.training_positions
    tapped, whole = (GradientMeter(LABELS, training, KEY, KEYS) for _ in range(2))
    tap, copied, micro_batch = GradientTap(tapped, Whereabouts(batches, tapped.sample)), 0, MicroBatch(0, 0)
    while micro_batch is not None:
        positions = batches.rows(micro_batch)
        rows, numbers = CutRows.of(KEYS, positions), gradients(positions, 0.3, 1)
        for what, sender, receiver in (("activation", "bank", "shop"), ("gradient", "shop", "bank")):
            tap.see(torch.from_numpy(numbers), Crossing(what, sender, receiver, micro_batch, rows))  # type: ignore[arg-type]
        copied = tapped._gradients["bank"]._numbers
        gradient(whole, positions, numbers)
        activation(whole, positions, numbers)
        micro_batch = batches.after(micro_batch)
    assert copied == len(tapped.sample) * numbers.shape[1]
    assert tapped.end_epoch() == whole.end_epoch()


def test_held_out_rows_that_cross_are_not_looked_at() -> None:
    batches = Batches(N, 5, 1, N, 1, shuffle=False)
    found = GradientMeter(LABELS, np.arange(N), KEY, KEYS)
    rows = CutRows.of(KEYS, np.arange(N), held_out=True)
    about = Crossing("activation", "bank", "shop", MicroBatch(0, 0), rows)
    GradientTap(found, Whereabouts(batches, found.sample)).see(torch.ones(N, 4), about)
    assert not found._activations


def test_copies_that_wait_for_the_end_of_an_epoch_are_bounded() -> None:
    found = GradientMeter(LABELS, TRAINING, KEY, KEYS)
    wide = np.ones((1, 200_000), np.float32)
    for row in found._sample.positions[:40]:
        gradient(found, np.array([row]), wide)
    (seen,) = found._gradients.values()
    assert seen._numbers <= sampled.PENDING
    assert seen.settle().norms.max() == pytest.approx(200_000**0.5)


@pytest.mark.parametrize("n_rows", [0, 1, 2, 50])
def test_few_rows_are_no_error(n_rows: int) -> None:
    labels = np.arange(n_rows) % 2
    found = GradientMeter(labels, np.arange(n_rows), KEY, KEYS[:n_rows])
    gradient(found, np.arange(n_rows), np.ones((n_rows, 3), np.float32))
    found.end_epoch()
    gradient(found, np.arange(n_rows), np.zeros((n_rows, 3), np.float32))
    found.end_epoch()
    own = ActivationMeter(np.ones((n_rows, 2)), np.arange(n_rows), KEY, KEYS[:n_rows])
    activation(own, np.arange(n_rows), np.ones((n_rows, 3), np.float32))
    own.end_epoch()


def test_a_sample_is_bounded_and_half_of_it_is_of_the_rarest_class_where_there_are_so_many() -> None:
    labels = (np.arange(1_000_000) % 50 == 0).astype(np.int64)
    rows = sampled.sample(labels, np.arange(1_000_000), KEY)
    assert len(rows) == len(np.unique(rows)) == sampled.SAMPLE
    assert labels[rows].sum() == sampled.SAMPLE // 2
    assert np.array_equal(rows, sampled.sample(labels, np.arange(1_000_000), KEY))
    assert not np.array_equal(rows, sampled.sample(labels, np.arange(1_000_000), b"other"))
    assert set(sampled.sample(LABELS, TRAINING, KEY)) <= set(TRAINING)


def test_only_rows_of_the_sample_cost_memory_and_wide_cuts_are_thinned() -> None:
    found = GradientMeter(LABELS, TRAINING, KEY, KEYS)
    gradient(found, TRAINING[:3000], np.ones((3000, 40, 25), np.float32))
    sizes = {name: array.shape for name, array in found.arrays().items()}
    assert sizes["gradient/rows/bank"] == (sampled.SAMPLE, sampled.WIDTH)
    assert found.arrays()["gradient/norms/bank"].max() == pytest.approx(1000**0.5)  # of all numbers of the row


def test_ten_classes_are_scored_as_ten() -> None:
    labels = np.arange(N) % 10
    p = np.full((N, 10), 0.1)
    p[np.arange(N), labels] -= 1
    sent = (p @ RNG.standard_normal((10, 16))).astype(np.float32)
    found = GradientMeter(labels, np.arange(N), KEY, KEYS)
    gradient(found, np.arange(N), sent)
    (leak,) = found.end_epoch().values()
    assert leak["one_of_each"] > 0.99
    assert leak["direction"] > 0.99
    assert leak["patient"] > 0.99


def test_a_feature_party_sees_how_much_of_its_columns_its_activations_give_back() -> None:
    columns = RNG.standard_normal((N, 6))
    found = ActivationMeter(columns, TRAINING, KEY, KEYS)
    activation(found, TRAINING, (columns[TRAINING] @ RNG.standard_normal((6, 8))).astype(np.float32))
    again = ActivationMeter(columns, TRAINING, KEY, KEYS)
    again.load(found.arrays())
    leak = found.end_epoch()
    assert leak == again.end_epoch()
    assert leak["ridge"] > 0.99
    assert leak["attribute"] > 0.99
    assert leak["attribute_raw"] < 0.2
    assert leak["chance"] < 0.2
    assert found.end_epoch() == {}  # nothing was sent

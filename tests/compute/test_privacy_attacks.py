"""Attacks find what is there, and no more than chance where nothing is."""

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score

from sl_queue.privacy import attacks

N = 2000


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def gradients(labels: np.ndarray, spread: float = 0.05) -> np.ndarray:
    """Return what a linear fuse model sends: (p - y) times its weights."""
    weights, p = np.array([0.5, -1.0, 0.2, 0.7]), 0.1 + 0.05 * rng().random(len(labels))
    return (p - labels)[:, None] * weights + spread * 0.01 * rng().standard_normal((len(labels), 4))


LABELS = (rng().random(N) < 0.1).astype(np.int64)
UNIT = attacks.directions(gradients(LABELS))
NOTHING = attacks.directions(rng().standard_normal((N, 4)))


@pytest.mark.parametrize("scores", [rng().random(N), rng().integers(0, 3, N).astype(float), np.zeros(N)])
def test_auc_is_that_of_scikit_learn_two_sided_with_ties(scores: np.ndarray) -> None:
    one = roc_auc_score(LABELS, scores)
    assert attacks.auc(LABELS == 1, scores) == pytest.approx(max(one, 1 - one))
    assert attacks.auc(LABELS == 1, -scores) == pytest.approx(max(one, 1 - one))


def test_auc_without_rows_on_both_sides_is_a_half() -> None:
    assert attacks.auc(np.zeros(3, bool), np.arange(3.0)) == 0.5
    assert attacks.auc(np.zeros(0, bool), np.zeros(0)) == 0.5


def test_undefended_gradients_give_every_label_away() -> None:
    assert attacks.norm(gradients(LABELS), LABELS) > 0.99
    assert attacks.direction(UNIT, LABELS, rng()) > 0.99
    assert attacks.spectral(UNIT, LABELS) > 0.99
    assert attacks.completion(UNIT, LABELS, rng()) > 0.99
    assert attacks.one_of_each(UNIT, LABELS, rng()) > 0.99


def test_where_nothing_leaks_every_attack_is_near_its_chance_line() -> None:
    for found in (
        attacks.norm(rng().standard_normal((N, 4)), LABELS),
        attacks.direction(NOTHING, LABELS, rng()),
        attacks.spectral(NOTHING, LABELS),
        attacks.completion(NOTHING, LABELS, rng()),
    ):
        assert 0.5 <= found < 0.56
    line = attacks.chance(UNIT[:1] @ UNIT.T, LABELS, rng())
    assert 0.5 <= line < 0.56  # of gradients that do give labels away: the line is of shuffled labels


def test_ten_classes_are_read_with_one_known_row_of_each() -> None:
    labels = rng().integers(0, 10, N)
    p = np.full((N, 10), 0.1)
    p[np.arange(N), labels] -= 1
    unit = attacks.directions(p @ rng().standard_normal((10, 16)) + 0.001 * rng().standard_normal((N, 16)))
    assert attacks.one_of_each(unit, labels, rng()) > 0.99
    assert attacks.direction(unit, labels, rng()) > 0.99
    assert attacks.spectral(unit, labels) > 0.7
    assert attacks.completion(unit, labels, rng(), 100) > 0.95


def test_few_rows_and_one_class_are_no_error() -> None:
    for labels in (np.zeros(3, np.int64), np.array([0, 1, 0]), np.zeros(0, np.int64)):
        some = attacks.directions(np.zeros((len(labels), 4)))
        assert attacks.norm(some, labels) == 0.5
        assert attacks.direction(some, labels, rng()) == 0.5
        assert attacks.spectral(some, labels) == 0.5
        assert attacks.completion(some, labels, rng()) == 0.5


def test_ridge_is_least_squares_where_there_are_rows_enough() -> None:
    inputs = rng().standard_normal((500, 4))
    targets = inputs @ rng().standard_normal((4, 2)) + 3 + 0.01 * rng().standard_normal((500, 2))
    new = rng().standard_normal((7, 4))
    assert attacks.ridge(inputs, targets, new) == pytest.approx(
        LinearRegression().fit(inputs, targets).predict(new), abs=0.02
    )


COLUMNS = rng().standard_normal((N, 6))


def test_a_wide_linear_cut_gives_all_columns_back_and_noise_gives_none() -> None:
    mixed = COLUMNS @ rng().standard_normal((6, 12))
    assert attacks.reconstruction(mixed, COLUMNS, rng()) > 0.99
    assert attacks.attribute(mixed, COLUMNS, rng()) > 0.99
    assert attacks.reconstruction(rng().standard_normal((N, 12)), COLUMNS, rng()) < 0.05
    assert attacks.attribute(rng().standard_normal((N, 12)), COLUMNS, rng()) < 0.15


def test_half_of_the_columns_is_half_of_the_variance() -> None:
    assert attacks.reconstruction(COLUMNS[:, :3], COLUMNS, rng()) == pytest.approx(0.5, abs=0.1)


def test_the_network_finds_what_a_line_does_not() -> None:
    seen = np.abs(COLUMNS[:, :1]) * np.array([1.0, -2.0])
    target = np.cos(3 * COLUMNS[:, :1])
    assert attacks.reconstruction(seen, target, rng(), 400, network=True) > 0.9
    assert attacks.reconstruction(seen, target, rng(), 400) < 0.6


def test_raw_columns_tell_of_one_another_without_any_activation() -> None:
    copied = np.column_stack([COLUMNS, COLUMNS[:, 0] + 0.01 * COLUMNS[:, 1]])
    assert attacks.attribute_raw(copied, rng()) > 0.99
    assert attacks.attribute_raw(COLUMNS, rng()) < 0.15
    assert attacks.attribute_raw(COLUMNS[:, :1], rng()) == 0.0

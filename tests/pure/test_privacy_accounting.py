"""Epsilon, delta and caps against the numbers that follow from the definitions by integration."""

import math

import numpy as np
import pytest

from sl_queue.privacy.accounting import (
    cap_of_epsilon,
    cap_of_gaussian,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
)

GRID = np.linspace(-60, 80, 1_400_001)


def density(mean: float) -> np.ndarray:
    return np.exp(-((GRID - mean) ** 2) / 2) / math.sqrt(2 * math.pi)


def integrated(values: np.ndarray) -> float:
    return float(np.trapezoid(values, GRID))


@pytest.mark.parametrize("mu", [0.1, 0.63, 2.0, 6.3])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_delta_is_the_privacy_loss_that_is_left_above_epsilon(mu: float, epsilon: float) -> None:
    left = np.maximum(density(mu) - math.exp(epsilon) * density(0.0), 0.0)
    assert gaussian_delta(mu, epsilon) == pytest.approx(integrated(left), abs=1e-9)


@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 49.3), (4.0, 8.3), (10.0, 2.9)])
def test_ten_releases_of_one_row_are_worth_what_the_definition_says(sigma: float, epsilon: float) -> None:
    mu = gaussian_mu([sigma] * 10)
    assert gaussian_epsilon(mu, 1e-6) == pytest.approx(epsilon, abs=0.05)
    left = np.maximum(density(mu) - np.exp(gaussian_epsilon(mu, 1e-6)) * density(0.0), 0.0)
    assert integrated(left) == pytest.approx(1e-6, rel=1e-3)


def test_composition_is_that_of_the_sum_of_the_privacy_losses() -> None:
    """Two releases seen together are a Gaussian in the plane whose means lie sqrt(mu1^2 + mu2^2) apart."""
    first, second = gaussian_mu([2.0]), gaussian_mu([5.0])
    together = gaussian_mu([2.0, 5.0])
    assert together == pytest.approx(math.hypot(first, second))
    assert gaussian_epsilon(together, 1e-6) < gaussian_epsilon(first, 5e-7) + gaussian_epsilon(second, 5e-7)
    assert gaussian_epsilon(together, 1e-6) > gaussian_epsilon(first, 1e-6)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 20.0, 200.0])
def test_epsilon_is_the_inverse_of_delta_far_out_too(mu: float) -> None:
    epsilon = gaussian_epsilon(mu, 1e-9)
    assert gaussian_delta(mu, epsilon) <= 1e-9
    assert epsilon == 0.0 or gaussian_delta(mu, epsilon * (1 - 1e-9)) == pytest.approx(1e-9, rel=1e-4)


def test_nothing_released_costs_nothing() -> None:
    assert gaussian_mu([]) == 0.0
    assert gaussian_epsilon(0.0, 1e-6) == 0.0
    assert cap_of_gaussian(0.0) == 0.5
    assert cap_of_epsilon(0.0) == 0.5


@pytest.mark.parametrize(("epsilon", "cap"), [(1.0, 0.731), (2.0, 0.881), (3.0, 0.953)])
def test_the_cap_is_the_area_under_the_best_curve_that_epsilon_admits(epsilon: float, cap: float) -> None:
    alarms = np.linspace(0, 1, 1_000_001)
    found = np.minimum(np.exp(epsilon) * alarms, 1 - np.exp(-epsilon) * (1 - alarms))
    assert cap_of_epsilon(epsilon) == pytest.approx(float(np.trapezoid(found, alarms)), abs=1e-6)
    assert cap_of_epsilon(epsilon) == pytest.approx(cap, abs=1e-3)


def test_the_cap_of_a_gaussian_is_the_auc_of_its_own_likelihood() -> None:
    rng = np.random.default_rng(1)
    low, high = rng.standard_normal(200_000), rng.standard_normal(200_000) + 1.3
    assert cap_of_gaussian(1.3) == pytest.approx(float((high > low).mean()), abs=3e-3)

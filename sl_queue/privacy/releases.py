"""The worth of what a party has released of its own, in all: over epochs, generations and earlier runs.

A release counts whether it was of use or not. Every row is released once an epoch, in training or in evaluation, so an
epoch of activations is one release of each row. What is drawn once for each row is one release for good.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sl_queue.privacy.accounting import cap_of_epsilon, cap_of_gaussian, gaussian_epsilon, gaussian_mu
from sl_queue.protocol.releases import Release


@dataclass(frozen=True, slots=True)
class Worth:
    """Worth of releases together; `epsilon` None: no number of epsilon bounds them."""

    releases: int  # of a row
    epsilon: float | None
    delta: float
    cap: float  # on the AUC of any attack


def worth_of_labels(releases: Iterable[Release]) -> Worth:
    """Return what all responses are worth: each that was drawn on its own adds its epsilon, repeated or not."""
    drawn = {
        (r.epsilon, r.classes, r.secret, r.party) for r in releases if r.mechanism == "labels" and r.epsilon is not None
    }
    epsilon = sum(each or 0.0 for each, *_ in drawn)
    return Worth(len(drawn), epsilon, 0.0, cap_of_epsilon(epsilon))


def worth_of_activations(releases: Iterable[Release], delta: float) -> Worth:
    """Return what all epochs of activations are worth; one without noise has no epsilon, and nothing caps it."""
    return worth_of_sigmas([r.sigma or 0.0 for r in set(releases) if r.mechanism == "activations"], delta)


def worth_of_sigmas(sigmas: list[float], delta: float) -> Worth:
    """Return what releases of a row with noise of these deviations are worth."""
    if 0.0 in sigmas:
        return Worth(len(sigmas), None, 0.0, 1.0)
    mu = gaussian_mu(sigmas)
    return Worth(len(sigmas), gaussian_epsilon(mu, delta), delta, cap_of_gaussian(mu))


def epochs_within(releases: Sequence[Release], sigma: float, budget: float, delta: float, most: int) -> int:
    """Return how many more epochs of activations, at most `most`, fit into the budget."""
    sigmas = [r.sigma or 0.0 for r in set(releases) if r.mechanism == "activations"]
    if 0.0 in sigmas or not sigma:
        return 0
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = gaussian_epsilon(gaussian_mu([*sigmas, *[sigma] * middle]), delta) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low

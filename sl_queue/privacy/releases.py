"""What a party has released of its own, and what that is worth in all: over epochs, generations and earlier runs.

A release counts whether it was of use or not. Every row is released once an epoch, in training or in evaluation, so an
epoch of activations is one release of each row. What is drawn once for each row is one release for good.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sl_queue.privacy.accounting import cap_of_epsilon, cap_of_gaussian, gaussian_epsilon, gaussian_mu

Mechanism = Literal["labels", "gradients", "activations"]


@dataclass(frozen=True, slots=True)
class Release:
    """One entry of `state/privacy.jsonl`; equal ones are the same release, repeated bit for bit."""

    mechanism: Mechanism
    job: str  # the beginning of its digest
    run: str
    generation: int  # a run that was forced back draws anew
    epoch: int | None  # None: once for the whole run
    secret: str  # a salted digest of what keys the draws
    epsilon: float | None = None  # of a response
    classes: tuple[float, ...] = ()  # of a response
    clip: float | None = None  # of activations
    sigma: float | None = None  # of activations; 0: no noise

    def line(self) -> dict[str, Any]:
        """Return it as JSON values, without what it does not have."""
        values = asdict(self) | {"classes": list(self.classes) or None}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> "Release":
        """Read what `line` returned. Raises KeyError, TypeError for anything else."""
        known = {name: line.get(name) for name in cls.__dataclass_fields__ if name in line or name == "epoch"}
        return cls(**known | {"classes": tuple(line.get("classes") or ())})


@dataclass(frozen=True, slots=True)
class Worth:
    """What releases are worth together; `epsilon` None: no number of epsilon bounds them."""

    releases: int  # of a row
    epsilon: float | None
    delta: float
    cap: float  # on the AUC of any attack


def worth_of_labels(releases: Iterable[Release]) -> Worth:
    """Return what all responses are worth: each that was drawn on its own adds its epsilon, repeated or not."""
    drawn = {(r.epsilon, r.classes, r.secret) for r in releases if r.mechanism == "labels" and r.epsilon is not None}
    epsilon = sum(each or 0.0 for each, _, _ in drawn)
    return Worth(len(drawn), epsilon, 0.0, cap_of_epsilon(epsilon))


def worth_of_activations(releases: Iterable[Release], delta: float) -> Worth:
    """Return what all epochs of activations are worth; one without noise has no epsilon, and nothing caps it."""
    sigmas = [r.sigma or 0.0 for r in set(releases) if r.mechanism == "activations"]
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

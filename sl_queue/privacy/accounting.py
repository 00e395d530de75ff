"""Accounting of mechanisms together, in (epsilon, delta) and as a cap on any attack's AUC. Exact formulas.

Gaussian mechanisms compose into one Gaussian mechanism exactly: releases with sensitivity s and deviation d add
(s / d)^2 to the square of mu, and mu alone decides everything (Dong, Roth and Su 2022). Its epsilon is the root of
the formula of Balle and Wang (2018), which is an equality, so no accountant could do better. There is no
amplification by sampling: the receiver knows which rows are in a batch.
"""

import math

_FAR = -30.0  # where the tail of the normal distribution is taken from its asymptotic series
_STEPS = 200


def cap_of_epsilon(epsilon: float) -> float:
    """Return the largest AUC that any attack can have on what is epsilon-differentially private.

    The area under the largest curve that epsilon admits: t <= min(e^eps f, 1 - e^-eps (1 - f)).
    """
    return 1 / (1 + math.exp(-epsilon))


def cap_of_gaussian(mu: float) -> float:
    """Return the largest AUC that any attack can have on a Gaussian mechanism of that mu."""
    return 0.5 * math.erfc(-mu / 2)


def gaussian_mu(sigmas: list[float]) -> float:
    """Return mu of releases of one row, each clipped to C with noise of deviation sigma * C.

    Neighbours differ in one row that is replaced, so that its activation moves by at most 2 C.
    """
    return math.sqrt(math.fsum((2 / sigma) ** 2 for sigma in sigmas))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the delta of a Gaussian mechanism at epsilon."""
    if mu == 0:
        return 0.0
    first = math.exp(_log_tail(mu / 2 - epsilon / mu))
    return max(0.0, first - math.exp(epsilon + _log_tail(-mu / 2 - epsilon / mu)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon of a Gaussian mechanism at delta, rounded up in the last bits."""
    low, high = 0.0, 1.0
    if gaussian_delta(mu, low) <= delta:
        return 0.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def _log_tail(x: float) -> float:
    """Return the logarithm of the normal distribution function, also where the function itself underflows."""
    if x > _FAR:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    series = 1 - 1 / x**2 + 3 / x**4 - 15 / x**6
    return -(x**2) / 2 - math.log(-x) - 0.5 * math.log(2 * math.pi) + math.log(series)

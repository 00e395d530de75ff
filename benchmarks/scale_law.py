"""The law that a step's costs follow: so much a message, a byte, and a second of each connection. Pure.

Fitted by least squares of relative errors, so that small cases count as much as large ones; no cost is below zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Law:
    """Costs of each cause, and how far the cases are from them."""

    each: Mapping[str, float]
    errors: tuple[float, ...]  # of each case, relative to what was measured: (law - measured) / measured

    def __call__(self, causes: Mapping[str, float]) -> float:
        """Return what these causes come to."""
        return sum(cost * causes[name] for name, cost in self.each.items())

    @property
    def residual(self) -> float:
        """The median of the relative errors, without their signs."""
        return median(map(abs, self.errors))

    @property
    def worst(self) -> float:
        return max(map(abs, self.errors))


def fitted(names: Sequence[str], cases: Sequence[Mapping[str, float]], measured: Sequence[float]) -> Law:
    """Fit the costs of the causes `names`, each at least zero, to what the cases measured."""
    values = np.asarray(measured, np.float64)
    causes = np.asarray([[case[name] for name in names] for case in cases], np.float64)
    weighted = causes / values[:, None]
    costs = _not_negative(weighted, np.ones(len(values)))
    errors = weighted @ costs - 1.0
    return Law(dict(zip(names, map(float, costs), strict=True)), tuple(map(float, errors)))


def _not_negative(causes: Floats, values: Floats) -> Floats:
    """Solve least squares; the lowest cost below zero becomes zero until there is none."""
    kept = list(range(causes.shape[1]))
    costs = np.zeros(causes.shape[1])
    scale = np.abs(causes).max(axis=0)
    while kept:
        found = np.linalg.lstsq(causes[:, kept] / scale[kept], values, rcond=None)[0]
        if (found >= 0).all():
            costs[kept] = found / scale[kept]
            break
        kept.pop(int(np.argmin(found)))
    return costs

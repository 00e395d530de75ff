"""The defences, the meter and the budget of one party, as its file says them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a party's [privacy], as values."""

    labels: float | None = None  # epsilon
    prior_ok: bool = False
    gradients: float | None = None  # the level of noise in all directions
    max_norm: bool = False
    clip: float | None = None
    sigma: float = 0.0
    nopeek: float = 0.0
    meter: bool = False
    budget: float | None = None
    delta: float = 1e-6

    @property
    def defends_labels(self) -> bool:
        """True if anything stands between the labels and the gradients that are sent."""
        return self.labels is not None or self.gradients is not None or self.max_norm

    @property
    def draws(self) -> bool:
        """True if a defence draws, so that a secret must key it."""
        return self.defends_labels or self.sigma > 0

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings that change the bits of a run, flat; empty without defences."""
        gradients = "max-norm" if self.max_norm else self.gradients
        clip = None if self.clip is None else f"clip {self.clip!r}, sigma {self.sigma!r}"
        found = {"labels": self.labels, "gradients": gradients, "activations": clip, "nopeek": self.nopeek or None}
        return {f"privacy.{name}": value for name, value in found.items() if value is not None}

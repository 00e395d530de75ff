"""Releases of a party's own, as its ledger holds them."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Mechanism = Literal["labels", "gradients", "activations"]


@dataclass(frozen=True, slots=True)
class Release:
    """One entry of `state/privacy.jsonl`; equal ones are the same release, repeated bit for bit."""

    mechanism: Mechanism
    party: str  # its name in the job
    job: str  # the beginning of its digest
    run: str
    generation: int  # a run that was forced back draws again
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
        """Read what `line` returned. Raises TypeError, AttributeError for anything else."""
        known = {name: line.get(name) for name in cls.__dataclass_fields__ if name in line or name == "epoch"}
        return cls(**known | {"classes": tuple(line.get("classes") or ())})

"""The seam to a tracker: TensorBoard and MLflow are one each."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from sl_queue.observe.scalars import Scalar


class TrackerDown(Exception):
    """The tracker does not answer now; later it may take the same."""


class TrackerRefuses(Exception):
    """The tracker does not take this, and never will."""


class Sink(Protocol):
    """One tracker. Used by one thread."""

    def begin(self, run: str, parameters: Mapping[str, str]) -> Mapping[str, int]:
        """Find or make the run; returns the newest step that it has, by name. Raises TrackerDown, TrackerRefuses."""

    def write(self, scalars: Sequence[Scalar]) -> None:
        """Add numbers that it does not have. Raises TrackerDown, TrackerRefuses."""

    def end(self, phase: str) -> None:
        """Note how the run has ended. Raises TrackerDown, TrackerRefuses."""

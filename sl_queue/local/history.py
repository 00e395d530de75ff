"""Epochs of a run as a notebook reads them."""

from typing import TypedDict


class Epoch(TypedDict, total=False):
    """One epoch, as a line of history.jsonl."""

    epoch: int
    step: int
    loss: float
    holdout: dict[str, float | None] | None
    seconds: float


class History(list[Epoch]):
    """The epochs of a run, oldest first."""

    @property
    def loss(self) -> list[float]:
        """The training loss of each epoch."""
        return [epoch["loss"] for epoch in self]

    def held_out(self, name: str) -> list[float | None]:
        """Return a metric of each epoch on the held-out rows. Raises KeyError if it was not measured."""
        return [(epoch["holdout"] or {})[name] for epoch in self]

"""Requests to a label holder's service that go as one message, until everything for their answer is there."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.serving import Answered, Deal, Keys

Found = npt.NDArray[np.bool_]
Prediction = Mapping[str, Any]  # of one row: probability, class or value, by name


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one request, row by row."""

    run: str
    predictions: Sequence[Prediction | None]  # of each row; None for one that a party lacks
    lacking: Sequence[tuple[str, ...]]  # the parties that lack each row


class Unanswered(Exception):
    """A request that ended without an answer: parties were silent, hold other weights, or have had enough."""

    def __init__(self, silent: Sequence[str], refused: Mapping[str, str], after_s: float) -> None:
        super().__init__(f"no answer of {', '.join([*silent, *refused])}")
        self.silent, self.refused, self.after_s = tuple(silent), dict(refused), after_s


class Post(Protocol):
    """Requests and answers in and out."""

    def ask(self, party: str, run: str, number: MicroBatch, request: Payload) -> None:
        """Send a request to a feature party."""

    def answer(self, run: str, number: MicroBatch, answer: Payload) -> None:
        """Send an answer to the label holder."""


class Base(Protocol):
    """A base model with the weights of one run."""

    @property
    def columns(self) -> int:
        """Count the columns of the model's input."""

    def answer(self, number: MicroBatch, keys: Keys, deal: Deal | None = None) -> tuple[Found, Payload | None]:
        """Return which rows are here, and their activation, after a deal if there is one; None for none."""


class Fuse(Protocol):
    """The label holder's models with the weights of one run."""

    run: str
    party: str

    def own(self, number: MicroBatch, keys: Keys) -> tuple[Found, object] | None:
        """Return which rows the label holder has, and its outputs for those; None without a base model."""

    def fused(
        self, number: MicroBatch, keys: Keys, there: Found, own: object, answers: Mapping[str, Answered]
    ) -> Sequence[Prediction]:
        """Return predictions for the rows that are `there`. Raises RemoteProtocolError, ComputeError."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Rows that somebody waits for."""

    keys: Keys
    future: Future[Outcome] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # it ends with an outcome or an error, even if nobody waits any more


@dataclass(slots=True, eq=False)
class Asked:
    """One message's worth of rows, on its way. Mutable, under the service's lock."""

    number: MicroBatch
    fuse: Fuse
    keys: Keys
    requests: Sequence[Request]  # in the order of their rows
    began: float
    asks: int = 1
    answers: dict[str, Answered] = field(default_factory=dict)
    own: tuple[Found, object] | None = None
    prepared: bool = False  # `own` is there

    def ended(self, parties: Sequence[str]) -> bool:
        """Return True once everything is there."""
        return self.prepared and len(self.answers) == len(parties)

    def fail(self, error: Exception) -> None:
        """End all its requests with an error."""
        for request in self.requests:
            request.future.set_exception(error)


def fused(asked: Asked) -> tuple[Sequence[Prediction | None], Sequence[tuple[str, ...]]]:
    """Return the prediction for each row, None where a party lacks it, and the parties that lack each."""
    found = {party: answer.found for party, answer in asked.answers.items()}
    if asked.own is not None:
        found[asked.fuse.party] = asked.own[0]
    there: Found = np.logical_and.reduce(list(found.values()))
    fused = asked.fuse.fused(asked.number, asked.keys, there, asked.own, asked.answers) if there.any() else ()
    if there.all():
        return fused, [()] * len(fused)
    left = iter(fused)
    lacking = [tuple(party for party, here in found.items() if not here[row]) for row in range(len(asked.keys))]
    return [None if parties else next(left) for parties in lacking], lacking

"""Guards that may be put in at the cut: a defence changes what leaves, taps see what leaves and what arrives."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sl_queue.cut.rows import CutRows
from sl_queue.cut.tensors import described, is_finite
from sl_queue.errors import ComputeError, NonFiniteError, RemoteProtocolError, ShapeError
from sl_queue.protocol.messages import MicroBatch

Crosses = Literal["activation", "gradient"]


def place(party: str, micro_batch: object) -> str:
    """Return how every error about a micro-batch begins."""
    return f"party {party!r}, micro-batch {micro_batch}"


@dataclass(frozen=True, slots=True)
class Crossing:
    """One tensor's way over the cut: all that a defence may key its draws by, besides a secret of its own."""

    what: Crosses
    sender: str
    receiver: str
    micro_batch: MicroBatch
    rows: CutRows

    @property
    def told(self) -> str:
        """Return how every error about a tensor of a peer begins."""
        return f"{place(self.receiver, self.micro_batch)}{self.rows.told}: {self.what} of party {self.sender!r}"

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Name the peer in what is wrong with its tensor."""
        try:
            yield
        except (RemoteProtocolError, ValueError) as error:
            raise RemoteProtocolError(f"{self.told}: {error}") from None


class Defence(Protocol):
    """Changes the tensor that leaves.

    A pure function of the tensor and of its crossing, with nothing remembered and no draw from a global generator: a
    message that is computed again after a crash must have the same bits.
    """

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        """Return what leaves in the place of `tensor`, which stays as it is: of its dtype and shape, and finite."""


class Tap(Protocol):
    """Sees tensors at the cut, which have no graph, and changes nothing; may look at a sample of its own choice."""

    def see(self, tensor: Tensor, crossing: Crossing) -> None:
        """Look at what leaves, before it is packed, or at what has arrived; keep a copy, never a view."""


class Return(Protocol):
    """Changes the gradient that comes back to an activation which a defence has changed; a pure function too."""

    def apply(self, gradient: Tensor, activation: Tensor, inputs: Tensor, share: float) -> Tensor:
        """Return the gradient of the base model's own output, of its shape.

        `activation` is that output, `inputs` what it was computed from, `share` the micro-batch's of the step's rows.
        """


@dataclass(frozen=True, slots=True)
class Guard:
    """Defence and taps at the cut to one peer."""

    defence: Defence | None = None
    leaving: Tap | None = None
    arriving: Tap | None = None
    returning: Return | None = None  # of a feature party

    def let_out(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        """Return what leaves in the place of a tensor, and show it to the tap."""
        sent = tensor.detach()
        if self.defence is not None:
            sent = _defended(self.defence, sent, crossing)
        if self.leaving is not None:
            _show(self.leaving, sent, crossing)
        return sent

    def let_in(self, tensor: Tensor, crossing: Crossing) -> None:
        """Show the tap what has arrived."""
        if self.arriving is not None:
            _show(self.arriving, tensor, crossing)


UNGUARDED = Guard()


def _defended(defence: Defence, tensor: Tensor, crossing: Crossing) -> Tensor:
    before = tensor._version
    with torch.no_grad():
        sent = defence.apply(tensor, crossing)
    where = f"{place(crossing.sender, crossing.micro_batch)}: the defence {type(defence).__name__}"
    if tensor._version != before:
        raise ComputeError(f"{where} changes the {crossing.what} in place; it must return another tensor")
    if sent.dtype != tensor.dtype or sent.shape != tensor.shape:
        raise ShapeError(f"{where} returns {described(sent)} for {described(tensor)}; it must keep dtype and shape")
    if not is_finite(sent):
        raise NonFiniteError(f"{where} returns NaN or infinity for a finite {crossing.what}; check its scale")
    return sent


def _show(tap: Tap, tensor: Tensor, crossing: Crossing) -> None:
    before = tensor._version
    tap.see(tensor, crossing)
    if tensor._version != before:
        where = f"{place(crossing.sender, crossing.micro_batch)}: the tap {type(tap).__name__}"
        raise ComputeError(f"{where} changes the {crossing.what} in place")

"""Defences and meters as the cut takes them, and what a defence of activations does to the gradients that come back."""

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sl_queue.cut.guard import Crossing
from sl_queue.cut.tensors import from_payload, payload_view, to_payload
from sl_queue.privacy import defences
from sl_queue.privacy.draws import Words, key_for, normal, normal_rows, normal_stream, row_words
from sl_queue.privacy.meter import ActivationMeter, GradientMeter, Positions
from sl_queue.protocol.checkpoint import State


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Positions of a table's rows by their keys, which is what the cut knows of rows."""

    ascending: Words = field(repr=False)
    positions: Positions = field(repr=False)

    @classmethod
    def of(cls, keys: Words) -> "RowIndex":
        """Index all rows of a table."""
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], order)

    def __call__(self, keys: Words) -> Positions:
        """Return the position of each key; all must be there."""
        return self.positions[np.searchsorted(self.ascending, keys)]


@dataclass(frozen=True, slots=True)
class GradientDefence:
    """max-norm, or noise in all directions, with draws that a row keeps for good: `level` None means max-norm."""

    level: float | None
    index: RowIndex = field(repr=False)
    tokens: Words = field(repr=False)  # of all rows of the table
    secret: bytes = field(repr=False)

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        """Return the gradient as it is sent. A draw of max-norm is the same for every receiver, so that none add up."""
        tokens = self.tokens[self.index(crossing.rows.keys)]
        if self.level is None:
            words = row_words(tokens, key_for(self.secret, crossing.sender, "max-norm"))
            return defences.max_norm(tensor, torch.from_numpy(normal(words)))
        key = key_for(self.secret, crossing.sender, f"noise for {crossing.receiver}")
        draws = normal_rows(tokens, key, tensor[0].numel() if len(tensor) else 0)
        return defences.isotropic(tensor, self.level, torch.from_numpy(draws))


@dataclass(frozen=True, slots=True)
class ActivationDefence:
    """Rows clipped, and noise that is keyed by what it hides: computed again it has the same bits.

    An activation that is another one, after a forced rollback for instance, gets another draw, so no two of them can
    be subtracted.
    """

    clip: float
    sigma: float
    secret: bytes = field(repr=False)

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        """Return the activation as it is sent, of held-out rows too."""
        bounded = defences.clipped(tensor, self.clip)
        if not self.sigma:
            return bounded
        at = crossing.micro_batch
        purpose = f"noise at {at.step} {at.index} {crossing.rows.held_out} for {crossing.receiver}"
        hidden = blake2b(key=key_for(self.secret, crossing.sender, purpose), digest_size=32)
        hidden.update(crossing.rows.digest)
        hidden.update(payload_view(bounded, b"").data)
        draws = normal_stream(hidden.digest(), bounded.numel()).reshape(bounded.shape)
        return defences.noised(bounded, self.sigma * self.clip, torch.from_numpy(draws))


@dataclass(frozen=True, slots=True)
class Returning:
    """What becomes of a gradient that comes back to an activation which was defended: the chain rule, and NoPeek."""

    clip: float | None
    nopeek: float

    def apply(self, gradient: Tensor, activation: Tensor, inputs: Tensor, share: float) -> Tensor:
        """Return the gradient of the base model's own output; `share`: of the step's rows in this micro-batch."""
        own = activation.detach()
        found = gradient
        if self.clip is not None:
            with torch.enable_grad():
                leaf = own.clone().requires_grad_()
                (found,) = torch.autograd.grad(defences.clipped(leaf, self.clip), leaf, gradient)
        if self.nopeek:
            found = found + defences.nopeek(inputs, own, self.nopeek * share)
        return found


@dataclass(frozen=True, slots=True)
class GradientTap:
    """Shows the label holder's meter what leaves, and what arrives."""

    meter: GradientMeter
    index: RowIndex = field(repr=False)

    def see(self, tensor: Tensor, crossing: Crossing) -> None:
        """Keep a copy of the sampled rows."""
        positions = self.index(crossing.rows.keys)
        chosen = self.meter.samples(positions)
        if not chosen.any():
            return
        numbers = numbers_of(tensor, chosen)
        if crossing.what == "gradient":
            self.meter.saw_gradient(crossing.receiver, positions[chosen], numbers)
        else:
            self.meter.saw_activation(crossing.sender, positions[chosen], numbers)


@dataclass(frozen=True, slots=True)
class ActivationTap:
    """Shows a feature party's meter what leaves."""

    meter: ActivationMeter
    index: RowIndex = field(repr=False)

    def see(self, tensor: Tensor, crossing: Crossing) -> None:
        """Keep a copy of the sampled rows."""
        positions = self.index(crossing.rows.keys)
        chosen = self.meter.samples(positions)
        if chosen.any():
            self.meter.saw_activation(positions[chosen], numbers_of(tensor, chosen))


def numbers_of(tensor: Tensor, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Return a copy of the chosen rows on the CPU."""
    found: npt.NDArray[np.float32] = tensor[torch.from_numpy(chosen).to(tensor.device)].float().cpu().numpy()
    return found


_STATE = "meter/"


@dataclass(slots=True)
class EpochMeter:
    """ports.Meter over one of the meters. Mutable: it remembers what the last epoch came to."""

    meter: GradientMeter | ActivationMeter
    reader: str = ""  # of a feature party's columns
    found: dict[str, Any] = field(default_factory=dict)  # by who could read it

    def end_epoch(self) -> dict[str, Any]:
        """Return what each other party could read by what it was sent in this epoch; begins another one."""
        if isinstance(self.meter, GradientMeter):
            self.found = dict(self.meter.end_epoch())
        else:
            found = self.meter.end_epoch()
            self.found = {self.reader: found} if found else {}
        return self.found

    def state(self) -> State:
        """Return what a checkpoint must hold, for the same numbers to follow."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self.meter.arrays().items()}
        tensors = {f"{_STATE}{name}": to_payload(torch.from_numpy(array)) for name, array in arrays.items()}
        return State(tensors, {"meter": self.found})

    def load(self, state: State) -> None:
        """Become what `state` returned; of a checkpoint without it, forget everything."""
        tensors = {name: payload for name, payload in state.tensors.items() if name.startswith(_STATE)}
        self.meter.load({name.removeprefix(_STATE): from_payload(p).numpy() for name, p in tensors.items()})
        self.found = dict(state.values.get("meter", {}))

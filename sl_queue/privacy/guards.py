"""Defences and meters as the cut takes them, and what a defence of activations does to the gradients that come back."""

import abc
import math
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sl_queue.cut.crossing import from_payload, payload_view, to_payload
from sl_queue.cut.guard import Crossing
from sl_queue.privacy import defences
from sl_queue.privacy.draws import Floats, Words, key_for, normal, normal_rows, normal_stream, row_words
from sl_queue.privacy.meter import ActivationMeter, GradientMeter
from sl_queue.privacy.one_core import on_one_core
from sl_queue.privacy.sampled import Positions, Whereabouts
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
    """max-norm, or noise in all directions: `level` None means max-norm.

    Draws of max-norm are made once for each row, and are the same for every receiver, so that nothing adds up. Of the
    noise half is drawn once for each row, against whoever adds up epochs, and half for each release, against whoever
    subtracts one epoch from the next: what is drawn once falls out of a difference.
    """

    level: float | None
    index: RowIndex = field(repr=False)
    tokens: Words = field(repr=False)  # of all rows of the table
    secret: bytes = field(repr=False)

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        """Return the gradient as it is sent."""
        tokens = self.tokens[self.index(crossing.rows.keys)]
        if self.level is None:
            words = row_words(tokens, key_for(self.secret, crossing.sender, "max-norm"))
            return defences.max_norm(tensor, torch.from_numpy(normal(words)))
        key = key_for(self.secret, crossing.sender, f"noise for {crossing.receiver}")
        once = normal_rows(tokens, key, math.prod(tensor.shape[1:]))
        now = _drawn_for(tensor, crossing, self.secret).reshape(once.shape)
        return defences.isotropic(tensor, self.level, torch.from_numpy((once + now) / math.sqrt(2)))


@dataclass(frozen=True, slots=True)
class _Clipped(abc.ABC):
    """Rows clipped, with noise on them."""

    clip: float
    sigma: float
    secret: bytes = field(repr=False)

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        """Return the activation as it is sent, of held-out rows too."""
        bounded = defences.clipped(tensor, self.clip)
        if not self.sigma:
            return bounded
        draws = torch.from_numpy(self._draws(bounded, crossing).reshape(bounded.shape))
        return defences.noised(bounded, self.sigma * self.clip, draws)

    @abc.abstractmethod
    def _draws(self, bounded: Tensor, crossing: Crossing) -> Floats: ...


class ActivationDefence(_Clipped):
    """Rows clipped, with noise that is drawn for each release."""

    __slots__ = ()

    def _draws(self, bounded: Tensor, crossing: Crossing) -> Floats:
        return _drawn_for(bounded, crossing, self.secret)


class AnswerDefence(_Clipped):
    """Rows clipped, with noise that is drawn once for each row and version: who asks again gets the same numbers."""

    __slots__ = ()

    def _draws(self, bounded: Tensor, crossing: Crossing) -> Floats:
        key = key_for(self.secret, crossing.sender, f"noise of answers for {crossing.receiver}")
        draws = np.empty(bounded.shape)
        for place, row in enumerate(crossing.rows.keys):
            own = blake2b(row.tobytes(), key=key, digest_size=32)
            own.update(payload_view(bounded[place].contiguous(), b"").data)  # another version's row is another secret
            draws[place] = normal_stream(own.digest(), bounded[place].numel()).reshape(bounded.shape[1:])
        return draws


def _drawn_for(hidden: Tensor, crossing: Crossing, secret: bytes) -> Floats:
    """Return a standard normal number for each number of a release, keyed by what it hides as well.

    Computed again it has the same bits. A tensor that is another one, after a forced rollback for instance, gets
    another draw, so no two releases can be subtracted.
    """
    at = crossing.micro_batch
    purpose = f"noise at {at.step} {at.index} {crossing.rows.held_out} for {crossing.receiver}"
    key = blake2b(key=key_for(secret, crossing.sender, purpose), digest_size=32)
    key.update(crossing.rows.digest)
    key.update(payload_view(hidden, b"").data)
    return normal_stream(key.digest(), hidden.numel())


@dataclass(frozen=True, slots=True)
class Returning:
    """Way of a gradient back to an activation that was defended: the chain rule, and NoPeek."""

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
    """Shows the label holder's meter what leaves and arrives."""

    meter: GradientMeter
    where: Whereabouts

    def see(self, tensor: Tensor, crossing: Crossing) -> None:
        """Keep a copy of the sampled rows."""
        places = self.where(crossing)
        if len(places):
            keys, numbers = crossing.rows.keys[places], numbers_of(tensor, places)
            if crossing.what == "gradient":
                self.meter.saw_gradient(crossing.receiver, keys, numbers)
            else:
                self.meter.saw_activation(crossing.sender, keys, numbers)


@dataclass(frozen=True, slots=True)
class ActivationTap:
    """Shows a feature party's meter what leaves."""

    meter: ActivationMeter
    where: Whereabouts

    def see(self, tensor: Tensor, crossing: Crossing) -> None:
        """Keep a copy of the sampled rows."""
        places = self.where(crossing)
        if len(places):
            self.meter.saw_activation(crossing.rows.keys[places], numbers_of(tensor, places))


def numbers_of(tensor: Tensor, rows: Positions | None = None) -> npt.NDArray[np.float32]:
    """Return a copy of these rows, or of all, on the CPU."""
    if tensor.dtype is torch.float32 and tensor.device.type == "cpu":
        numbers: npt.NDArray[np.float32] = tensor.detach().numpy()
        return numbers.copy() if rows is None else numbers[rows]
    taken = tensor if rows is None else tensor[torch.from_numpy(rows).to(tensor.device)]
    elsewhere: npt.NDArray[np.float32] = taken.float().cpu().numpy()
    return elsewhere


_STATE = "meter/"


@dataclass(slots=True)
class EpochMeter:
    """ports.Meter over one of the meters. Mutable: it remembers what the last epoch came to."""

    meter: GradientMeter | ActivationMeter
    reader: str = ""  # of a feature party's columns
    found: dict[str, Any] = field(default_factory=dict)  # by who could read it

    def end_epoch(self) -> dict[str, Any]:
        """Return what each other party could read by what it was sent in this epoch; begins another one."""
        with on_one_core():
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

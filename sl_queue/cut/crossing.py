"""The cut to one peer, the only place that knows what crosses: checked, defended and packed, it leaves and arrives.

Out: check shape and numbers -> defence -> tap -> payload -> pack. In: compare with what is expected -> unpack -> tensor
-> finite -> tap. `leave` returns what is to be encoded before its tensor is changed; `arrive` raises
RemoteProtocolError, which names the peer. Both are used by one thread. A payload is also how a checkpoint has a tensor:
little-endian, as is every machine that PyTorch publishes packages for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sl_queue.cut.guard import UNGUARDED, Crossing, Guard, place
from sl_queue.cut.packing import AS_IT_IS, Mask, Wire, is_unused, unused
from sl_queue.cut.relu import ends_in_relu, gradient_mask
from sl_queue.cut.rows import CutRows
from sl_queue.cut.several import Outputs
from sl_queue.cut.tensors import cast, described, dtype_name, is_finite, page_locked
from sl_queue.errors import JobError, LocalProtocolError, NonFiniteError, RemoteProtocolError, ShapeError
from sl_queue.protocol.codec import MAX_TENSOR_BYTES
from sl_queue.protocol.memory import is_given_away
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.text import counted

CROSSING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16}  # NumPy has no bfloat16 and no float8: their bits travel as integers


@dataclass(frozen=True, slots=True)
class _Expected:
    """Description that a tensor of a peer, or a gradient for it, has to meet."""

    dtypes: tuple[str, ...]  # any of them
    shape: tuple[int, ...]
    wanted: Mask | None = field(repr=False)  # the values of a gradient that were asked for; None: all
    overflows: bool = False  # it may be not finite


def _compare(payload: Payload, expected: _Expected, crossing: Crossing) -> None:
    """Raise RemoteProtocolError unless dtype, shape and rows are what is expected."""
    if payload.dtype not in expected.dtypes or payload.shape != expected.shape:
        dtype = payload.dtype if payload.dtype in expected.dtypes else expected.dtypes[0]
        wanted = f"{dtype} {expected.shape}"
        raise RemoteProtocolError(f"{crossing.told} is {payload}, expected {wanted}; compare job and models")
    if payload.rows != crossing.rows.digest:
        digests = f"digest {payload.rows.hex() or 'missing'}, expected {crossing.rows.digest.hex()}"
        raise RemoteProtocolError(
            f"{crossing.told} belongs to other rows ({digests}): a table has changed since the run began; "
            "start from scratch from the same rows"
        )


@dataclass(slots=True, kw_only=True)
class _Cut:
    """One party's side of the cut to a peer. Mutable: it remembers what is on its way."""

    party: str
    peer: str
    shape: tuple[int, ...]  # of one row
    device: torch.device
    wire: Wire
    guard: Guard = UNGUARDED
    outputs: Outputs | None = None  # of a base model with several
    overflows: bool = False  # a gradient may be not finite, which means that its step is left out
    _open: dict[MicroBatch, _Expected] = field(default_factory=dict)  # the gradients that are awaited, or owed

    def __post_init__(self) -> None:
        self.wire = replace(self.wire, cast=cast)

    def forget(self) -> None:
        """Await, or owe, no gradient."""
        self._open.clear()

    def _arrived(self, payload: Payload, expected: _Expected, crossing: Crossing) -> Tensor:
        """Return the tensor of a payload that has been compared, and show it to the tap."""
        with crossing.blamed():
            plain = self.wire.unpack(payload, expected.wanted) if payload.packing else payload
            tensor = from_payload(plain, self.device, passing=True)
        if not is_finite(tensor):
            if expected.overflows:
                return tensor
            raise RemoteProtocolError(f"{crossing.told} holds NaN or infinity; look at model and learning rate there")
        if self.guard.arriving is not None:
            self.guard.let_in(tensor, crossing)
        return tensor

    def _packed(self, payload: Payload, *, relu: bool = False, wanted: Mask | None = None) -> Payload:
        """Return the payload as it travels: as it is, unless the job says otherwise."""
        return payload if self.wire == AS_IT_IS else self.wire.pack(payload, relu=relu, wanted=wanted)


@dataclass(slots=True, kw_only=True)
class BaseCut(_Cut):
    """A feature party's cut: its activations leave, their gradients arrive."""

    dtype: torch.dtype  # of the base model's parameters
    model: str  # the base model's name

    def require_fitting(self, dtype: torch.dtype, rows: int, micro_batches: int) -> None:
        """Raise JobError if the activations of so many rows are more than a message carries."""
        largest = self.wire.bytes_of(dtype_name(dtype), (rows, *self.shape))
        if largest > MAX_TENSOR_BYTES:
            raise JobError(
                f"party {self.party!r}: the activations of a micro-batch of {counted(rows, 'row', 'rows')} take "
                f"{largest} bytes, and a message carries at most {MAX_TENSOR_BYTES}; raise "
                f"pipeline.micro_batches above {micro_batches}"
            )

    def check(self, activation: Tensor, micro_batch: MicroBatch, rows: CutRows) -> None:
        """Raise ShapeError unless an activation is what the job promises, NonFiniteError if it is not finite."""
        require_shape(activation, len(rows), self, f"{place(self.party, micro_batch)}{rows.told}")
        if not is_finite(activation):
            raise NonFiniteError(
                f"{place(self.party, micro_batch)}{rows.told}: activation holds NaN or infinity; lower the "
                f"learning rate, or check {self.model}"
            )

    def leave(
        self,
        tensor: Tensor,
        micro_batch: MicroBatch,
        rows: CutRows,
        learning: Sequence[int] | None = None,
        ends: Callable[[Tensor], bool] = ends_in_relu,
    ) -> Payload:
        """Return the activation as it travels; a training one is awaited back as a gradient.

        `learning`: which of several outputs want one. `ends` tells of a ReLU at the end, of tensors without a graph.
        """
        self.check(tensor, micro_batch, rows)
        sent = tensor
        if self.guard is not UNGUARDED:
            crossing = Crossing("activation", self.party, self.peer, micro_batch, rows)
            sent = self.guard.let_out(tensor, crossing)
        if rows.held_out:
            return self._packed(payload_view(sent, rows.digest))
        # Nothing else asks for a ReLU, and asking makes hooks. A defended activation shows other zeros than the ReLU's.
        relu = self.wire.compress == "bitmap" and self.guard.defence is None and ends(tensor)
        payload = self._packed(payload_view(sent, rows.digest), relu=relu)
        self._open[micro_batch] = _Expected((payload.dtype,), payload.shape, gradient_mask(payload), self.overflows)
        if self.outputs is None or learning is None:
            return payload
        return self.outputs.marked(payload, learning, payload.shape)

    def arrive_each(self, payload: Payload, micro_batch: MicroBatch, rows: CutRows) -> list[Tensor | None]:
        """Return the gradient of each output; None where the loss does not depend on it."""
        if self.outputs is None:
            return [self.arrive(payload, micro_batch, rows)]
        crossing = Crossing("gradient", self.peer, self.party, micro_batch, rows)
        with crossing.blamed():
            parts, plain = self.outputs.parts_of(payload)
        size = sum(self.outputs.sizes[place] for place in parts)
        flat = self.arrive(plain, micro_batch, rows, None if plain is payload else (len(rows), size))
        found: list[Tensor | None] = [None] * len(self.outputs.shapes)
        if flat is not None:
            for place, gradient in zip(parts, self.outputs.split(flat, parts), strict=True):
                found[place] = gradient
        return found

    def arrive(
        self, payload: Payload, micro_batch: MicroBatch, rows: CutRows, shape: tuple[int, ...] | None = None
    ) -> Tensor | None:
        """Return the gradient of an activation; None if the loss does not depend on it.

        `shape`: of the numbers that are in it, where those of some outputs are.
        """
        expected = self._open.pop(micro_batch, None)
        if expected is None:
            raise LocalProtocolError(f"{place(self.party, micro_batch)}: a gradient of an activation that never left")
        crossing = Crossing("gradient", self.peer, self.party, micro_batch, rows)
        _compare(payload, expected, crossing)
        with crossing.blamed():
            if is_unused(payload):
                return None
        payload = payload if shape is None else replace(payload, shape=shape)
        return self._arrived(payload, expected, crossing)


@dataclass(slots=True, kw_only=True)
class FuseCut(_Cut):
    """The label holder's cut to one feature party: activations arrive, their gradients leave."""

    dtypes: tuple[str, ...]  # of the activations that the fuse model may be given; the first is named in errors

    def arrive_each(
        self, payload: Payload, micro_batch: MicroBatch, rows: CutRows
    ) -> tuple[list[Tensor], tuple[int, ...]]:
        """Return each output of the peer, and which of them want a gradient."""
        if self.outputs is None:
            return [self.arrive(payload, micro_batch, rows)], (0,)
        crossing = Crossing("activation", self.peer, self.party, micro_batch, rows)
        with crossing.blamed():
            parts, plain = self.outputs.parts_of(payload)
        return self.outputs.split(self.arrive(plain, micro_batch, rows)), parts

    def arrive(self, payload: Payload, micro_batch: MicroBatch, rows: CutRows) -> Tensor:
        """Return an activation of the peer."""
        crossing = Crossing("activation", self.peer, self.party, micro_batch, rows)
        expected = _Expected(self.dtypes, (len(rows), *self.shape), None)
        _compare(payload, expected, crossing)
        tensor = self._arrived(payload, expected, crossing)
        if not rows.held_out:
            self._open[micro_batch] = _Expected((payload.dtype,), payload.shape, gradient_mask(payload))
        return tensor

    def leave_each(self, gradients: Sequence[Tensor | None], micro_batch: MicroBatch, rows: CutRows) -> Payload:
        """Return the gradients of the outputs that have one, in one message."""
        if self.outputs is None:
            return self.leave(gradients[0], micro_batch, rows)
        parts = [place for place, gradient in enumerate(gradients) if gradient is not None]
        there = [gradient for gradient in gradients if gradient is not None]
        payload = self.leave(self.outputs.joined(there) if there else None, micro_batch, rows)
        whole = (len(rows), *self.shape)
        return self.outputs.marked(payload, parts, whole) if there else payload

    def leave(self, tensor: Tensor | None, micro_batch: MicroBatch, rows: CutRows) -> Payload:
        """Return the gradient of the activation that has arrived; None: the loss does not depend on it.

        Then it is a message of no bytes, which is not a gradient of zeros.
        """
        owed = self._open.pop(micro_batch, None)
        if owed is None:
            raise LocalProtocolError(f"{place(self.party, micro_batch)}: a gradient of no activation of {self.peer!r}")
        if tensor is None:
            return unused(owed.dtypes[0], owed.shape, rows.digest)
        finite = is_finite(tensor)
        if not finite and not self.overflows:
            raise NonFiniteError(
                f"{place(self.party, micro_batch)}: gradient for party {self.peer!r} holds NaN or infinity; lower the "
                "learning rate, or check the loss"
            )
        sent = tensor
        if self.guard is not UNGUARDED and finite:
            crossing = Crossing("gradient", self.party, self.peer, micro_batch, rows)
            sent = self.guard.let_out(tensor, crossing)
        return self._packed(payload_view(sent, rows.digest), wanted=owed.wanted)


def require_shape(activation: Tensor, rows: int, cut: BaseCut, where: str) -> None:
    """Raise ShapeError unless a base model's output for `rows` rows is what the job promises."""
    if activation.dtype not in CROSSING_DTYPES or tuple(activation.shape) != (rows, *cut.shape):
        promised = activation.dtype if activation.dtype in CROSSING_DTYPES else cut.dtype
        shape = f"(rows, {', '.join(map(str, cut.shape))})" if cut.shape else "(rows,)"
        raise ShapeError(
            f"{where}: activation is {described(activation)}, the cut layer is {dtype_name(promised)} {shape}; "
            f"check {cut.model}"
        )


def to_payload(tensor: Tensor, rows: bytes = b"", *, resizable: bool = False) -> Payload:
    """Return a copy in C order, off graph and device; `resizable`: NumPy sees another, for it pins what it sees."""
    numbers = _numbers(tensor.detach().clone() if resizable else tensor)
    return Payload(dtype_name(tensor.dtype), tuple(tensor.shape), numbers.tobytes(), rows)


def payload_view(tensor: Tensor, rows: bytes) -> Payload:
    """View a tensor in C order, without a copy where none has to be made; encode it before the tensor is changed."""
    numbers = np.ascontiguousarray(_numbers(page_locked(tensor)))
    data = numbers.reshape(-1).view(np.uint8).data.toreadonly()
    return Payload(dtype_name(tensor.dtype), tuple(tensor.shape), data, rows)


def _numbers(tensor: Tensor) -> npt.NDArray[Any]:
    """Detach from its graph and from its device."""
    own = tensor.detach()
    if own.dtype == torch.bfloat16 or dtype_name(own.dtype).startswith("float8"):
        own = own.view(_SAME_WIDTH[own.element_size()])
    found: npt.NDArray[Any] = own.numpy(force=True)
    return found


def from_payload(payload: Payload, device: torch.device | None = None, *, passing: bool = False) -> Tensor:
    """Return a tensor of its own on `device`, copied once into memory aligned as torch aligns it.

    `passing`: it came in a message, whose memory it takes over where that is the receiver's alone, and more of its size
    will come, so that a GPU may keep the memory that it comes through. Raises ValueError when the declared dtype and
    shape do not account for the bytes that are there.
    """
    dtype = getattr(torch, payload.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{payload.dtype!r} is not a torch dtype")
    if any(size < 0 for size in payload.shape):
        raise ValueError(f"a shape cannot be {payload.shape}")
    declared = math.prod(payload.shape) * dtype.itemsize
    there = memoryview(payload.data).nbytes
    if declared != there:
        raise ValueError(f"{payload} takes {declared} bytes, but holds {there}")
    kept, here = passing and device is not None and device.type == "cuda", device is None or device.type == "cpu"
    if passing and there and here and is_given_away(payload.data):
        return torch.frombuffer(payload.data, dtype=dtype).view(payload.shape)
    tensor = torch.empty(payload.shape, dtype=dtype, pin_memory=kept)
    if there:
        np.copyto(tensor.view(-1).view(torch.uint8).numpy(), np.frombuffer(payload.data, np.uint8))
    return tensor if device is None else tensor.to(device, non_blocking=kept)

"""The cut to one peer, the only place that knows what crosses: checked, defended and packed, it leaves and arrives.

Out: check shape and numbers -> defence -> tap -> pack. In: compare with what is expected -> unpack -> finite -> tap.
`leave` returns what is to be encoded before its tensor is changed; `arrive` raises RemoteProtocolError, which names the
peer. Both are used by one thread.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sl_queue.cut.guard import UNGUARDED, Crossing, Guard, place
from sl_queue.cut.packing import AS_IT_IS, Mask, Wire, is_unused, unused
from sl_queue.cut.relu import ends_in_relu, gradient_mask
from sl_queue.cut.rows import CutRows
from sl_queue.cut.several import Outputs
from sl_queue.cut.tensors import cast, described, dtype_name, from_payload, is_finite, payload_view
from sl_queue.errors import JobError, LocalProtocolError, NonFiniteError, RemoteProtocolError, ShapeError
from sl_queue.protocol.codec import MAX_TENSOR_BYTES
from sl_queue.protocol.messages import MicroBatch, Payload
from sl_queue.protocol.text import counted

CROSSING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(slots=True)
class BaseCut:
    """A feature party's cut: its activations leave, their gradients arrive.

    Mutable: it remembers what the gradient of an activation in flight has to be.
    """

    party: str
    peer: str
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype  # of the base model's parameters
    device: torch.device
    wire: Wire
    model: str  # the base model's name
    guard: Guard = UNGUARDED
    outputs: Outputs | None = None  # of a base model with several
    overflows: bool = False  # a gradient may be not finite, which means that its step is left out
    _awaited: dict[MicroBatch, "_Expected"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.wire = replace(self.wire, cast=cast)

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
        require_shape(activation, len(rows), self, f"{place(self.party, micro_batch)}{_held_out(rows)}")
        if not is_finite(activation):
            raise NonFiniteError(
                f"{place(self.party, micro_batch)}{_held_out(rows)}: activation holds NaN or infinity; lower the "
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
            return _packed(self.wire, payload_view(sent, rows.digest))
        # Nothing else asks for a ReLU, and asking makes hooks. A defended activation shows other zeros than the ReLU's.
        relu = self.wire.compress == "bitmap" and self.guard.defence is None and ends(tensor)
        payload = _packed(self.wire, payload_view(sent, rows.digest), relu=relu)
        self._awaited[micro_batch] = _Expected((payload.dtype,), payload.shape, gradient_mask(payload), self.overflows)
        if self.outputs is None or learning is None:
            return payload
        return self.outputs.marked(payload, learning, payload.shape)

    def arrive_each(self, payload: Payload, micro_batch: MicroBatch, rows: CutRows) -> list[Tensor | None]:
        """Return the gradient of each output; None where the loss does not depend on it."""
        if self.outputs is None:
            return [self.arrive(payload, micro_batch, rows)]
        crossing = Crossing("gradient", self.peer, self.party, micro_batch, rows)
        with _blaming(crossing):
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
        expected = self._awaited.pop(micro_batch, None)
        if expected is None:
            raise LocalProtocolError(f"{place(self.party, micro_batch)}: a gradient of an activation that never left")
        crossing = Crossing("gradient", self.peer, self.party, micro_batch, rows)
        _compare(payload, expected, crossing)
        with _blaming(crossing):
            if is_unused(payload):
                return None
        payload = payload if shape is None else replace(payload, shape=shape)
        return _check_and_unpack(payload, expected, self.wire, self.device, self.guard, crossing)

    def forget(self) -> None:
        """Await no gradient."""
        self._awaited.clear()


@dataclass(slots=True)
class FuseCut:
    """The label holder's cut to one feature party: activations arrive, their gradients leave.

    Mutable: it remembers how the gradient of an activation that has arrived is to be sent.
    """

    party: str
    peer: str
    shape: tuple[int, ...]  # of one row
    dtypes: tuple[str, ...]  # of the activations that the fuse model may be given; the first is named in errors
    device: torch.device
    wire: Wire
    guard: Guard = UNGUARDED
    outputs: Outputs | None = None  # of a base model with several
    overflows: bool = False  # a gradient may be not finite, which means that its step is left out
    _owed: dict[MicroBatch, "_Expected"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.wire = replace(self.wire, cast=cast)

    def arrive_each(
        self, payload: Payload, micro_batch: MicroBatch, rows: CutRows
    ) -> tuple[list[Tensor], tuple[int, ...]]:
        """Return each output of the peer, and which of them want a gradient."""
        if self.outputs is None:
            return [self.arrive(payload, micro_batch, rows)], (0,)
        crossing = Crossing("activation", self.peer, self.party, micro_batch, rows)
        with _blaming(crossing):
            parts, plain = self.outputs.parts_of(payload)
        return self.outputs.split(self.arrive(plain, micro_batch, rows)), parts

    def arrive(self, payload: Payload, micro_batch: MicroBatch, rows: CutRows) -> Tensor:
        """Return an activation of the peer."""
        crossing = Crossing("activation", self.peer, self.party, micro_batch, rows)
        expected = _Expected(self.dtypes, (len(rows), *self.shape), None)
        _compare(payload, expected, crossing)
        tensor = _check_and_unpack(payload, expected, self.wire, self.device, self.guard, crossing)
        if not rows.held_out:
            self._owed[micro_batch] = _Expected((payload.dtype,), payload.shape, gradient_mask(payload))
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
        owed = self._owed.pop(micro_batch, None)
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
        return _packed(self.wire, payload_view(sent, rows.digest), wanted=owed.wanted)

    def forget(self) -> None:
        """Owe no gradient."""
        self._owed.clear()


def require_shape(activation: Tensor, rows: int, cut: BaseCut, where: str) -> None:
    """Raise ShapeError unless a base model's output for `rows` rows is what the job promises."""
    if activation.dtype not in CROSSING_DTYPES or tuple(activation.shape) != (rows, *cut.shape):
        promised = activation.dtype if activation.dtype in CROSSING_DTYPES else cut.dtype
        shape = f"(rows, {', '.join(map(str, cut.shape))})" if cut.shape else "(rows,)"
        raise ShapeError(
            f"{where}: activation is {described(activation)}, the cut layer is {dtype_name(promised)} {shape}; "
            f"check {cut.model}"
        )


def _packed(wire: Wire, payload: Payload, *, relu: bool = False, wanted: Mask | None = None) -> Payload:
    """Return the payload as it travels: as it is, unless the job says otherwise."""
    return payload if wire == AS_IT_IS else wire.pack(payload, relu=relu, wanted=wanted)


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
        raise RemoteProtocolError(
            f"{_blame(crossing)} is {payload}, expected {dtype} {expected.shape}; compare job and models"
        )
    if payload.rows != crossing.rows.digest:
        digests = f"digest {payload.rows.hex() or 'missing'}, expected {crossing.rows.digest.hex()}"
        raise RemoteProtocolError(
            f"{_blame(crossing)} belongs to other rows ({digests}): a table has changed since the run began; "
            "start from scratch from the same rows"
        )


def _check_and_unpack(
    payload: Payload, expected: _Expected, wire: Wire, device: torch.device, guard: Guard, crossing: Crossing
) -> Tensor:
    """Return the tensor of a payload that has been compared, and show it to the tap."""
    with _blaming(crossing):
        plain = wire.unpack(payload, expected.wanted) if payload.packing else payload
        tensor = from_payload(plain, device)
    if not is_finite(tensor):
        if expected.overflows:
            return tensor
        raise RemoteProtocolError(f"{_blame(crossing)} holds NaN or infinity; look at model and learning rate there")
    if guard.arriving is not None:
        guard.let_in(tensor, crossing)
    return tensor


@contextmanager
def _blaming(crossing: Crossing) -> Iterator[None]:
    """Name the peer in what is wrong with its tensor."""
    try:
        yield
    except (RemoteProtocolError, ValueError) as error:
        raise RemoteProtocolError(f"{_blame(crossing)}: {error}") from None


def _blame(crossing: Crossing) -> str:
    """Return how every error about a tensor of a peer begins."""
    here = f"{place(crossing.receiver, crossing.micro_batch)}{_held_out(crossing.rows)}"
    return f"{here}: {crossing.what} of party {crossing.sender!r}"


def _held_out(rows: CutRows) -> str:
    return " (held-out rows)" if rows.held_out else ""

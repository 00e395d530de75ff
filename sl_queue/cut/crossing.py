"""What crosses the cut layer, checked on both sides: dtype, shape, rows, and that every number is one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sl_queue.cut.packing import AS_IT_IS, Mask, Wire, is_unused
from sl_queue.cut.tensors import described, dtype_name, from_payload, is_finite
from sl_queue.errors import NonFiniteError, RemoteProtocolError, ShapeError
from sl_queue.protocol.messages import Payload

CROSSING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def place(party: str, micro_batch: object) -> str:
    """How every error about a micro-batch begins."""
    return f"party {party!r}, micro-batch {micro_batch}"


def require_cut(
    activation: Tensor, rows: int, cut: tuple[int, ...], dtype: torch.dtype, where: str, model: str
) -> None:
    """Raise ShapeError unless a base model's own output is what the job promises."""
    if activation.dtype not in CROSSING or tuple(activation.shape) != (rows, *cut):
        promised = activation.dtype if activation.dtype in CROSSING else dtype
        raise ShapeError(
            f"{where}: activation is {described(activation)}, the cut layer is "
            f"{dtype_name(promised)} {_with_rows(cut)}; check {model}"
        )


def require_finite(tensor: Tensor, what: str, advice: str) -> None:
    """Raise NonFiniteError if one of this party's own numbers is none."""
    if not is_finite(tensor):
        raise NonFiniteError(f"{what} holds NaN or infinity; {advice}")


@dataclass(frozen=True, slots=True)
class Promised:
    """What a payload of a peer has to be."""

    what: str  # "activation" or "gradient"
    sender: str
    dtypes: Sequence[torch.dtype]  # any of them; the first is named in errors
    shape: tuple[int, ...]
    rows: bytes  # the digest of its rows
    wire: Wire = AS_IT_IS
    wanted: Mask | None = field(default=None, repr=False)  # the values of a gradient that were asked for; None: all


def received(payload: Payload, promised: Promised, device: torch.device, where: str) -> Tensor:
    """Check all that a peer's tensor declares, and return it. Raises RemoteProtocolError, which names the peer."""
    blame = _compared(payload, promised, where)
    try:
        tensor = from_payload(promised.wire.unpack(payload, promised.wanted), device)
    except (RemoteProtocolError, ValueError) as error:
        raise RemoteProtocolError(f"{blame}: {error}") from None
    if not is_finite(tensor):
        raise RemoteProtocolError(f"{blame} holds NaN or infinity; look at the model and learning rate there")
    return tensor


def received_gradient(payload: Payload, promised: Promised, device: torch.device, where: str) -> Tensor | None:
    """As `received`, for a gradient; None if the loss does not depend on the activation."""
    blame = _compared(payload, promised, where)
    try:
        if is_unused(payload):
            return None
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{blame}: {error}") from None
    return received(payload, promised, device, where)


def _compared(payload: Payload, promised: Promised, where: str) -> str:
    """Compare dtype, shape and rows with what was promised, and return how every error about this tensor begins."""
    blame = f"{where}: {promised.what} of party {promised.sender!r}"
    dtypes = [dtype_name(dtype) for dtype in promised.dtypes]
    if payload.dtype not in dtypes or payload.shape != promised.shape:
        dtype = payload.dtype if payload.dtype in dtypes else dtypes[0]
        raise RemoteProtocolError(f"{blame} is {payload}, expected {dtype} {promised.shape}; compare job and models")
    if payload.rows != promised.rows:
        digests = f"digest {payload.rows.hex() or 'missing'}, expected {promised.rows.hex()}"
        raise RemoteProtocolError(
            f"{blame} belongs to other rows ({digests}): a table has changed since the run began; "
            "start anew from the same rows"
        )
    return blame


class Arrival:
    """An activation on its way into the fuse model's graph, and its gradient once the backward pass has been there.

    The gradient stays None if the loss does not depend on the activation. Mutable for that. Not a leaf of the graph,
    since models may change their inputs in place, as they may when joined.
    """

    def __init__(self, activation: Tensor) -> None:
        self._waiting = [activation]
        self.gradient: Tensor | None = None

    def enter(self) -> Tensor:
        """Return the activation as a tensor whose gradient will be kept here; once."""
        anchor = torch.empty(0, requires_grad=True)
        entered: Tensor = _Entrance.apply(anchor, self)  # type: ignore[no-untyped-call]
        return entered


class _Entrance(torch.autograd.Function):
    """Outputs a tensor that came from nowhere in this graph; keeps what the backward pass brings."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, arrival: Arrival) -> Tensor:
        ctx.arrival = arrival
        ctx.set_materialize_grads(False)  # an operator of the fuse model may return None for it
        return arrival._waiting.pop()  # not kept: the graph would hold itself

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None]:
        ctx.arrival.gradient = gradient
        return None, None


ENTRANCE: type = _Entrance._backward_cls  # its node in a graph


def _with_rows(cut: tuple[int, ...]) -> str:
    return f"(rows, {', '.join(map(str, cut))})" if cut else "(rows,)"

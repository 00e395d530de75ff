"""Several tensors in one message: the outputs of a base model, and those of their gradients that there are.

They lie side by side in one tensor (rows, numbers), so that one message carries all of a micro-batch. Before the
packing stands "of:0,2|": of an activation, the outputs that want a gradient; of a gradient, the outputs that it is of,
whose numbers alone are in it. Without it, all. An output that the loss does not depend on has no gradient, which is not
one of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from sl_queue.errors import RemoteProtocolError, ShapeError
from sl_queue.protocol.messages import Payload
from sl_queue.protocol.text import counted

if TYPE_CHECKING:  # a job file is read where no torch is
    from torch import Tensor

_MARK = "of:"


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of a base model, by name or in order."""

    names: tuple[str, ...] | None
    shapes: tuple[tuple[int, ...], ...]  # of one row

    @classmethod
    def of(cls, cut: Any) -> Outputs | None:
        """Read a cut that is a table or a list of shapes; None of a single shape."""
        if isinstance(cut, Mapping):
            names = tuple(sorted(cut))  # a table has no order
            return cls(names, tuple(tuple(cut[name]) for name in names))
        if cut is None or isinstance(cut[0], int):
            return None
        return cls(None, tuple(map(tuple, cut)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of one row of each output."""
        return tuple(map(prod, self.shapes))

    def listed(self, output: Any, rows: int, what: str) -> list[Tensor]:
        """Return a model's output as a list in the order of the cut. Raises ShapeError if it is another."""
        from torch import Tensor

        from sl_queue.cut.tensors import described

        kind = "dict" if self.names is not None else "list"
        if not isinstance(output, dict if self.names is not None else list | tuple):
            raise ShapeError(f"{what} returns {type(output).__name__}; the cut asks for a {kind} of tensors")
        if self.names is not None and set(output) != set(self.names):
            raise ShapeError(f"{what} returns {', '.join(map(repr, output))}; the cut has {', '.join(self.names)}")
        by_name: Any = output
        found = [by_name[name] for name in self.names] if self.names is not None else list(output)
        if len(found) != len(self.shapes):
            raise ShapeError(
                f"{what} returns {counted(len(found), 'tensor', 'tensors')}; the cut has {len(self.shapes)}"
            )
        for place, (tensor, shape) in enumerate(zip(found, self.shapes, strict=True)):
            name = repr(self.names[place]) if self.names is not None else f"number {place}"
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != (rows, *shape):
                told = described(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ShapeError(f"{what}: output {name} is {told}, the cut says (rows, {', '.join(map(str, shape))})")
            if tensor.dtype != found[0].dtype:
                raise ShapeError(f"{what}: output {name} is {described(tensor)}; all outputs must be of one dtype")
        return found

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """Lay outputs, or gradients of some, side by side: (rows, numbers)."""
        import torch

        return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)

    def split(self, flat: Tensor, parts: Sequence[int] | None = None) -> list[Tensor]:
        """Undo `joined`; `parts`: of these outputs alone. Each is a tensor of its own."""
        import torch

        places = range(len(self.shapes)) if parts is None else parts
        found = torch.split(flat, [self.sizes[place] for place in places], dim=1)
        return [
            part.contiguous().reshape(len(flat), *self.shapes[place]) for place, part in zip(places, found, strict=True)
        ]

    def given(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Return what a fuse model gets of this party: one dict, or its tensors one by one."""
        return list(tensors) if self.names is None else [dict(zip(self.names, tensors, strict=True))]

    def marked(self, payload: Payload, parts: Sequence[int], shape: tuple[int, ...]) -> Payload:
        """Say in a message which outputs it is of, or wants gradients of; its shape is that of all."""
        if len(parts) == len(self.shapes):
            return payload
        return replace(payload, shape=shape, packing=f"{_MARK}{','.join(map(str, parts))}|{payload.packing}")

    def parts_of(self, payload: Payload) -> tuple[tuple[int, ...], Payload]:
        """Return which outputs a message is of, and the message without the mark. Raises RemoteProtocolError."""
        if not payload.packing.startswith(_MARK):
            return tuple(range(len(self.shapes))), payload
        listed, bar, packing = payload.packing.removeprefix(_MARK).partition("|")
        places = [int(word) for word in listed.split(",") if word.isdecimal() and len(word) < 6]
        ascending = sorted(set(places)) == places
        if (
            not bar
            or not ascending
            or listed != ",".join(map(str, places))
            or max(places, default=0) >= len(self.shapes)
        ):
            raise RemoteProtocolError(f"{payload} is of outputs {listed[:20]!r}, which the cut does not have")
        return tuple(places), replace(payload, packing=packing)

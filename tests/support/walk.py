"""The walk of an activation through the code, as a profiler sees it: the files that give it on, from table to model.

A file gives it on if one of its functions returns it, in any form, or has it while the link or the mailbox gets it.
Functions that only look at it (its shape, whether it is finite) do not.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
from torch import Tensor, nn

import sl_queue
from sl_queue.protocol.messages import Activation, Payload
from sl_queue.transport.link import Delivery
from sl_queue.transport.mail import Letter

ROWS, COLUMNS, CUT = 13, 31, 67  # of a micro-batch: no other array has such a shape
PACKAGE = Path(sl_queue.__file__).parent
SHAPES = {(ROWS, COLUMNS), (ROWS, CUT)}
BYTES = ROWS * CUT * 4


class Fuse(nn.Module):
    """The end of the walk."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(CUT, 1)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        output: Tensor = self.layer(inputs[0])
        return output


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(COLUMNS, CUT), nn.Tanh())


def carries(value: Any) -> bool:
    """Return True for the rows or the activation of a micro-batch, as an array, a message or bytes, or what has one."""
    match value:
        case Tensor() | np.ndarray() | Payload():
            return tuple(value.shape) in SHAPES
        case bytes() | bytearray() | memoryview():
            return len(value) >= BYTES
        case Activation():
            return carries(value.payload)
        case Letter():
            return carries(value.message)
        case Delivery():
            return carries(value.body)
        case list() | tuple():
            return len(value) < 10 and any(map(carries, value))
        case dict():
            return len(value) < 10 and any(map(carries, value.values()))
    return False


@dataclass(slots=True)
class Call:
    """A function of ours that runs."""

    code: CodeType
    has_it: bool
    interrupted: "tuple[Leg | None, list[CodeType]] | None" = None  # by a delivery in the middle of it


@dataclass(slots=True)
class Leg:
    """Files that gave an activation on, in the order in which they were entered."""

    files: dict[str, None] = field(default_factory=dict)

    def add(self, code: CodeType) -> None:
        self.files[str(Path(code.co_filename).relative_to(PACKAGE))] = None


class Walk:
    """Two legs, out to the link and in to the fuse model; mutable: threads add to them while a run is traced."""

    def __init__(self) -> None:
        self.out, self.arrives, self.fused = Leg(), Leg(), Leg()
        self._local = threading.local()

    @property
    def inwards(self) -> list[str]:
        """The files from the link to the fuse model."""
        return list({**self.arrives.files, **self.fused.files})

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Trace the threads that begin in the body."""
        threading.setprofile(self._saw)
        try:
            yield
        finally:
            threading.setprofile(None)

    def _saw(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if code is Fuse.forward.__code__ and event == "call":
            self._end(self.fused)
        if event not in ("call", "return") or not code.co_filename.startswith(str(PACKAGE)):
            return
        if not hasattr(self._local, "stack"):
            self._local.stack, self._local.leg, self._local.found = [], None, []
        if event == "call":
            self._called(frame, code)
        else:
            self._returned(code, value)

    def _called(self, frame: FrameType, code: CodeType) -> None:
        here, name = self._local, code.co_qualname
        here.stack.append(Call(code, any(map(carries, list(frame.f_locals.values())))))
        match name:
            case "TorchBaseStage.prepare" | "LabelHolder._gather":
                here.leg, here.found = (self.out if "Base" in name else self.fused), []
            case "TorchBaseStage.forward":
                here.leg = self.out
            case "FeatureParty._gradient":  # between the two
                here.leg = None
            case "Mail._on_delivery":
                here.stack[-1].interrupted = (here.leg, here.found)
                here.leg, here.found = self.arrives, []
            case "MemoryLink.publish" | "RabbitLink.publish" if here.leg is self.out and here.stack[-1].has_it:
                self._end(self.out)
            case "Mailbox.file" if here.leg is self.arrives and isinstance(frame.f_locals["message"], Activation):
                self._end(self.arrives)

    def _returned(self, code: CodeType, value: Any) -> None:
        here = self._local
        while here.stack:  # one that was there before the trace began is not on it
            call = here.stack.pop()
            if call.interrupted is not None:
                here.leg, here.found = call.interrupted
            if call.code is code:
                break
        if here.leg is not None and carries(value):
            here.found.append(code)

    def _end(self, leg: Leg) -> None:
        """Add a leg that has come to its end."""
        here = self._local
        if here.leg is leg:
            began = max((n for n, call in enumerate(here.stack) if call.interrupted is not None), default=1)
            waiting = here.stack[began - 1 :]  # of the link, no more than what hands a delivery over
            for code in (*here.found, *(call.code for call in waiting if call.has_it)):
                leg.add(code)
            here.leg = None


def traced(broker: str) -> Walk:
    """Train a few steps at that broker, and return the walk of their activations."""
    rng, n_rows = np.random.default_rng(7), ROWS * 8
    job = sl_queue.Job(
        name="walk",
        seed=7,
        epochs=1,
        batch_size=ROWS * 2,
        parties={"bank": {"role": "feature", "cut": [CUT]}, "insurer": {"role": "label"}},
        pipeline={"micro_batches": 2},
    )
    ids, adam = np.arange(n_rows), {"name": "adam"}
    x, y = rng.normal(size=(n_rows, COLUMNS)).astype(np.float32), rng.integers(0, 2, n_rows)
    bank = sl_queue.PartyFile(party="bank", data=sl_queue.Rows(ids, x), base={"model": base, "optimizer": adam})
    fuse = {"model": Fuse, "optimizer": adam, "loss": "bce_with_logits"}
    insurer = sl_queue.PartyFile(party="insurer", data=sl_queue.Rows(ids, labels=y), fuse=fuse)
    walk = Walk()
    with walk.traced():
        sl_queue.run_local(job, [bank, insurer], broker=broker)
    return walk

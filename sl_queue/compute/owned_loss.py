"""A loss that is an object: with a mode, buffers and counters, but without parameters.

The label holder owns it as it owns the fuse model: a trial leaves no trace in it, held-out rows go through it in
evaluation mode, and a checkpoint carries what has changed in it. What a plain function keeps in its globals or in the
variables around it is not seen.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sl_queue.compute.modules.demands import leaves_of, require_savable
from sl_queue.compute.modules.handover import Holder, modules_in
from sl_queue.compute.modules.snapshots import Snapshot
from sl_queue.compute.modules.state import Built, in_evaluation
from sl_queue.cut.crossing import from_payload, to_payload
from sl_queue.errors import CheckpointError, JobError
from sl_queue.protocol.checkpoint import State

_PREFIX = "loss/"
_ADVICE = "give the loss's parameters to the fuse model, whose optimizer trains them, or let them require no gradient"


@dataclass(frozen=True, slots=True)
class OwnedLoss:
    """The state of a loss."""

    holder: nn.Module = field(repr=False)
    built: Built = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)  # frozen parameters and buffers as they were built
    party: str

    @classmethod
    def of(cls, loss: Any, models: Iterable[nn.Module], party: str, where: str) -> "OwnedLoss":
        """Own the state of `loss` that does not belong to `models`. Raises JobError if it has parameters to learn."""
        theirs = {id(each) for model in models for each in (*model.modules(), *model.parameters(), *model.buffers())}
        holder = Holder(loss)
        own = [module for module in modules_in(loss) if id(module) not in theirs]
        for number, module in enumerate(own):
            vars(holder).pop("given") if module is vars(holder).get("given") else None
            holder.add_module(str(number) if number else "loss", module)
        if id(vars(holder).get("given")) in theirs:
            del vars(holder)["given"]
        learning = [n for n, p in holder.named_parameters() if p.requires_grad and id(p) not in theirs]
        if learning:
            raise JobError(f"{where}: the loss has the parameter {learning[0]!r}, which nothing trains; {_ADVICE}")
        require_savable(holder, f"{where}: the loss")
        tensors = {name: t.detach().clone() for name, t in _tensors(holder)}
        return cls(holder, Built.of(holder), tensors, party)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Run the body with a loss whose calls leave no trace."""
        before = Snapshot.of(self.holder)
        try:
            with self.evaluating(), torch.enable_grad():
                yield
        finally:
            before.put_back()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the body in evaluation mode, without gradients."""
        with in_evaluation(self.holder):
            yield

    def state(self) -> State:
        """Return what has changed since the loss was built; nothing, for most."""
        changes, lost = self.built.changes(self.holder, _PREFIX)
        if lost:
            raise JobError(
                f"party {self.party!r}: the loss changes its attribute {lost[0].path!r}, a "
                f"{type(lost[0].value).__name__}, which no checkpoint carries; keep it in numbers or tensors"
            )
        changed = {
            f"{_PREFIX}module/{name}": to_payload(tensor, resizable=True)
            for name, tensor in _tensors(self.holder)
            if name not in self.tensors or not _equal(tensor, self.tensors[name])
        }
        return State({**changed, **changes.tensors}, changes.values)

    def load(self, state: State) -> None:
        """Become what `state` returned."""
        self.built.load(self.holder, state, _PREFIX, self.party)
        saved = {n.removeprefix(f"{_PREFIX}module/"): p for n, p in state.tensors.items() if n.startswith(_PREFIX)}
        own = dict(_tensors(self.holder))
        with torch.no_grad():
            for name, tensor in own.items():
                numbers = from_payload(saved[name]) if name in saved else self.tensors[name]
                if numbers.shape != tensor.shape:
                    raise CheckpointError(
                        f"party {self.party!r}: the checkpoint is of another loss: {name} differs; "
                        "restore it, or start from scratch with another state folder"
                    )
                tensor.copy_(numbers)


def require_no_parameters(tried: Tensor, output: Tensor, models: Iterable[nn.Module], where: str) -> None:
    """Raise JobError if the loss of `output` comes of parameters that are in none of the models."""
    known = {id(output)} | {id(parameter) for model in models for parameter in model.parameters()}
    if any(id(leaf) not in known for leaf in leaves_of(tried)):
        raise JobError(
            f"{where}: the loss depends on a tensor that requires a gradient, and nothing trains it; {_ADVICE}"
        )


def _tensors(holder: nn.Module) -> list[tuple[str, Tensor]]:
    return [*holder.named_parameters(), *holder.named_buffers()]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Compare values: a buffer that has followed its inputs to another device is not changed by that."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.cpu(), other.cpu())

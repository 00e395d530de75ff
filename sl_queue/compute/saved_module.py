"""A module as checkpoints and final weights hold it: written down, and read back."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sl_queue.compute.building import tensors_of
from sl_queue.compute.modules.demands import overlaps
from sl_queue.compute.modules.saved_values import NotCarriedError
from sl_queue.compute.modules.shared_values import SharedValues
from sl_queue.compute.modules.state import Built
from sl_queue.compute.spec import Part
from sl_queue.cut.crossing import from_payload, to_payload
from sl_queue.cut.tensors import described
from sl_queue.errors import CheckpointError, ComputeError
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.messages import Payload

log = logging.getLogger("sl_queue")


@dataclass(frozen=True, slots=True)
class SavedModule:
    """Tensors of a module, and what else of it has changed since it was built. Mutable in `warned` alone."""

    party: str
    part: Part
    name: str
    module: nn.Module = field(repr=False)
    built: Built = field(repr=False)
    shared: SharedValues = field(repr=False)
    warned: set[str] = field(default_factory=set)  # attributes of which it was said that no checkpoint carries them

    def state(self) -> State:
        """Return a copy of parameters, of all buffers, and of what differs from the module as it was built."""
        changes, lost = self.built.changes(self.module, f"{self.part}/")
        self._tell(lost)
        self._tell_of_shared()
        tensors = {f"{self.part}/module/{name}": self._payload(name, t) for name, t in tensors_of(self.module)}
        return State({**tensors, **changes.tensors}, changes.values)

    def tell_of_lost(self) -> None:
        """Warn of what has changed and no checkpoint carries."""
        self._tell(self.built.changes(self.module, f"{self.part}/")[1])
        self._tell_of_shared()

    def load(self, state: State) -> None:
        """Become what `state` returned. Raises CheckpointError if the model is another one."""
        prefix = f"{self.part}/module/"
        saved = {name.removeprefix(prefix): p for name, p in state.tensors.items() if name.startswith(prefix)}
        changed = state.values.get(f"{self.part}/buffers", {})  # since the module was built: in any shape
        expected = {name: described(p) for name, p in self.module.named_parameters()} | dict(self.built.buffers)
        there = {name: str(payload) for name, payload in saved.items()}
        names = (expected.keys() | there.keys()) - changed.keys()
        differing = ", ".join(sorted(name for name in names if expected.get(name) != there.get(name)))
        if differing:
            raise CheckpointError(
                f"party {self.party!r}: the checkpoint is of another model than {self.name}: {differing} differ; "
                "restore the model, or start from scratch with another state folder"
            )
        self.built.load(self.module, state, f"{self.part}/", self.party)
        with torch.no_grad():
            for name, tensor in tensors_of(self.module):
                if overlaps(tensor):  # a constant buffer, since nothing can be written into it
                    tensor.data = from_payload(saved[name], tensor.device)
                else:
                    tensor.copy_(from_payload(saved[name]))

    def state_dict(self) -> dict[str, Payload]:
        """Return the module's own state_dict."""
        return {name: self._payload(name, tensor) for name, tensor in self.module.state_dict().items()}

    def _payload(self, name: str, tensor: Tensor) -> Payload:
        try:
            return to_payload(tensor, resizable=tensor.device.type == "cpu" and not isinstance(tensor, nn.Parameter))
        except (TypeError, RuntimeError, ValueError) as error:
            raise ComputeError(
                f"party {self.party!r}: {self.name} has made its {name!r} {described(tensor)} "
                f"({tensor.layout}), which cannot be saved: {error}"
            ) from error

    def _tell(self, lost: Iterable[NotCarriedError]) -> None:
        """Say once of each attribute that changes and cannot be carried that it is in no checkpoint."""
        for error in lost:
            if error.path not in self.warned:
                self.warned.add(error.path)
                log.warning(
                    "party %r: %s changes its attribute %r, a %s, which no checkpoint carries; if what it learns "
                    "depends on that, a run that is interrupted ends with other weights: keep it in numbers, tensors, "
                    "or short lists of them",
                    self.party,
                    self.name,
                    error.path,
                    type(error.value).__name__,
                )

    def _tell_of_shared(self) -> None:
        """Say the same of what the module changes beside itself."""
        for error in self.shared.changed():
            if error.path not in self.warned:
                self.warned.add(error.path)
                log.warning(
                    "party %r: %s changes %s (%s), which is no part of it and in no checkpoint; if what it learns "
                    "depends on that, a run that is interrupted ends with other weights: keep it in an attribute of "
                    "the module",
                    self.party,
                    self.name,
                    error.path,
                    type(error.value).__name__,
                )

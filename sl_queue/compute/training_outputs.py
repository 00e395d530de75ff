"""The fuse model's outputs for the rows that an epoch has trained on so far, for metrics of training rows.

They are those of the training passes, before each step's update, as Keras and Lightning measure them; so they cost no
further pass. A checkpoint in the middle of an epoch carries them.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sl_queue.cut.crossing import from_payload, to_payload
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.schedule.row_order import Positions

_OUTPUTS, _ROWS = "training/outputs", "training/rows"


@dataclass(slots=True)
class TrainingOutputs:
    """Outputs and the positions of their rows, in the order of the steps. Mutable: each micro-batch adds some."""

    wanted: bool
    outputs: list[Tensor] = field(default_factory=list, repr=False)
    rows: list[Tensor] = field(default_factory=list, repr=False)

    def add(self, output: Tensor, positions: Positions) -> None:
        """Keep the output of these rows."""
        if self.wanted:
            self.outputs.append(output.detach().cpu().clone())
            self.rows.append(torch.from_numpy(positions).clone())

    def take(self) -> tuple[Tensor, Positions] | None:
        """Return all that was kept, and forget it; None if nothing was."""
        if not self.outputs:
            return None
        found = torch.cat(self.outputs), torch.cat(self.rows).numpy()
        self.clear()
        return found

    def clear(self) -> None:
        """Forget all."""
        self.outputs.clear()
        self.rows.clear()

    def state(self) -> State:
        """Return a copy of what was kept."""
        if not self.outputs:
            return State({}, {})
        return State({_OUTPUTS: to_payload(torch.cat(self.outputs)), _ROWS: to_payload(torch.cat(self.rows))}, {})

    def load(self, state: State) -> None:
        """Become what `state` returned."""
        self.clear()
        if self.wanted and _OUTPUTS in state.tensors:
            self.outputs.append(from_payload(state.tensors[_OUTPUTS]))
            self.rows.append(from_payload(state.tensors[_ROWS]))

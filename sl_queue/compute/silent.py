"""Base model of a party that takes no part: zeros in the place of its activation, which nothing is learned from."""

from typing import Any

import torch
from torch import nn

from sl_queue.compute.running import tensors_in


class Silent(nn.Module):
    """Zeros of the shapes that the job says, for each row that comes in."""

    def __init__(self, cut: Any) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, rows: Any) -> Any:
        """Return zeros: one tensor, or several by name or in order."""
        first = tensors_in(rows)[0]
        if isinstance(self.cut, dict):
            return {
                name: first.new_zeros((len(first), *shape), dtype=torch.float32) for name, shape in self.cut.items()
            }
        if isinstance(self.cut[0], int):
            return first.new_zeros((len(first), *self.cut), dtype=torch.float32)
        return [first.new_zeros((len(first), *shape), dtype=torch.float32) for shape in self.cut]

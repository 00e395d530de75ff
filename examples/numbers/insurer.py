"""The insurer's parts of the model: a base model of its own, and the fuse model."""

import torch
from torch import nn


class BaseModel(nn.Module):
    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, hidden_dim)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.linear(x))


class FuseModel(nn.Module):
    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return self.linear(torch.cat(inputs, dim=1))

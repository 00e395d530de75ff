"""The job that a replay gets wrong first: dropout, stochastic depth, BatchNorm, and steps that leave a party out."""

from pathlib import Path

from tests.support.credit import edit

MODELS = '''
import random

import torch
from torch import nn


class Base(nn.Module):
    def __init__(self, input_dim, hidden_dim):
        super().__init__()
        self.first, self.norm = nn.Linear(input_dim, 16), nn.BatchNorm1d(16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.last = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, hidden_dim))

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x)))
        for block in self.blocks:
            if not self.training or random.random() < 0.5:  # stochastic depth, by Python's own generator
                h = h + 0.1 * torch.tanh(block(h))
        return self.last(h)


class Fuse(nn.Module):
    """Leaves each input out of a third of the steps, by a count that it keeps in a plain attribute."""

    def __init__(self, widths):
        super().__init__()
        self.calls = 0
        self.towers = nn.ModuleList(nn.Linear(width, 8) for width in widths)
        self.last = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 1))

    def forward(self, inputs):
        left_out = self.calls // MICRO_BATCHES % (len(inputs) + 1) if self.training else None
        self.calls += self.training
        used = [tower(x) for i, (tower, x) in enumerate(zip(self.towers, inputs)) if i != left_out]
        return self.last(torch.tanh(sum(used)))
'''


def use_everything(folder: Path, micro_batches: int) -> None:
    """Give the example's job in `folder` models in which every kind of draw and of state is."""
    (folder / "everything.py").write_text(f"MICRO_BATCHES = {micro_batches}\n{MODELS}")
    edit(folder / "bank.toml", '"bank:BaseModel"', '"everything:Base"')
    edit(folder / "insurer.toml", '"insurer:BaseModel"', '"everything:Base"')
    edit(folder / "insurer.toml", '"insurer:FuseModel"', '"everything:Fuse"')
    edit(folder / "insurer.toml", "args = { input_dim = 48, output_dim = 1 }", "args = { widths = [32, 16] }")

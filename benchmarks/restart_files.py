"""Files of a run that goes on for as long as its workers are killed: job, party files, tables in Parquet and models."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS, COLUMNS = 50_000, 32
BANK, LABEL = "bank", "insurer"
PARTIES = (BANK, LABEL)
JOB_FILE = "job.toml"

_JOB = f"""name = "restart"
seed = 3
epochs = 10000
batch_size = 512
[parties.{BANK}]
role = "feature"
cut = [64]
[parties.{LABEL}]
role = "label"
cut = [64]
[pipeline]
checkpoint_every = 10
"""
_MODELS = """import torch
from torch import nn


class Base(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


class Fuse(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(128, 1)

    def forward(self, inputs):
        return self.linear(torch.cat(inputs, dim=1))
"""
_PARTY = """party = "{party}"
[data]
path = "{party}.parquet"
id = "id"
{label}[base]
model = "models:Base"
args = {{ inputs = {inputs} }}
optimizer = {{ name = "adam", lr = 0.001 }}
"""
_FUSE = """[fuse]
model = "models:Fuse"
optimizer = { name = "adam", lr = 0.001 }
loss = "bce_with_logits"
"""


def write_files(folder: Path) -> None:
    """Write everything that the workers read."""
    draw = np.random.default_rng(5)
    (folder / JOB_FILE).write_text(_JOB)
    (folder / "models.py").write_text(_MODELS)
    for party in PARTIES:
        numbers = draw.standard_normal((ROWS, COLUMNS), np.float32)
        columns = {"id": np.arange(ROWS), **{f"x{number}": numbers[:, number] for number in range(COLUMNS)}}
        if party == LABEL:
            columns["y"] = (numbers[:, 0] > 0).astype(np.int64)
        pq.write_table(pa.table(columns), folder / f"{party}.parquet")
        about = _PARTY.format(party=party, inputs=COLUMNS, label='label = "y"\n' if party == LABEL else "")
        (folder / f"{party}.toml").write_text(about + (_FUSE if party == LABEL else ""))

"""Raw tables of made-up companies: text, gaps and dates, and rows that only some of them hold."""

import csv
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

JOB = """
name = "raw"
seed = 7
epochs = 2
batch_size = 16
holdout = 0.25

[parties.bank]
role = "feature"
cut = [4]

[parties.insurer]
role = "label"
cut = [2]
"""
BANK = """
party = "bank"
state = "state/bank"

[data]
path = "bank.csv"
id = "customer"
csv = { delimiter = ";", decimal = "," }

[base]
model = "models:Base"
args = { width = 9, out = 4 }
optimizer = { name = "sgd", lr = 0.05 }

[features]
income = { kind = "number", missing = "median", indicator = true }
region = { kind = "category", rare = 3 }
since = { kind = "date", parts = ["year", "age"], at = 2026-01-01 }
"""
INSURER = """
party = "insurer"
state = "state/insurer"

[data]
path = "insurer.parquet"
id = "customer"
label = "claim"

[base]
model = "models:Base"
args = { width = 2, out = 2 }
optimizer = { name = "sgd", lr = 0.05 }

[fuse]
model = "models:Fuse"
args = { width = 6 }
optimizer = { name = "sgd", lr = 0.05 }
loss = "bce_with_logits"

[features]
"*" = { kind = "number", missing = "mean" }
"""
MODELS = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.layer = nn.Linear(width, out)

    def forward(self, x):
        return torch.relu(self.layer(x))

class Fuse(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, inputs):
        return self.layer(torch.cat(inputs, dim=1)).squeeze(1)
"""


def customers(n: int, first: int = 0) -> list[str]:
    """Ids as text, in no order."""
    rng = np.random.default_rng(n + first)
    return [f"c-{number:05d}" for number in rng.permutation(np.arange(first, first + n))]


def bank_rows(ids: list[str]) -> list[dict[str, Any]]:
    """Raw rows of the bank; each follows from its id alone."""
    rows = []
    for name in ids:
        rng = np.random.default_rng(int(name[2:]))
        income = "" if rng.random() < 0.2 else f"{rng.lognormal(8, 1):.2f}".replace(".", ",")
        since = date(2010, 1, 1) + timedelta(days=int(rng.integers(0, 5000)))
        region = str(rng.choice(["north", "south", "eäst", ""], p=[0.5, 0.3, 0.15, 0.05]))
        rows.append({"customer": name, "income": income, "region": region, "since": since.isoformat()})
    return rows


def insurer_table(ids: list[str]) -> pa.Table:
    """Raw rows of the insurer, as an Arrow table."""
    rngs = [np.random.default_rng(int(name[2:]) + 10**6) for name in ids]
    age = [None if rng.random() < 0.1 else float(rng.integers(18, 90)) for rng in rngs]
    cars = [int(rng.integers(0, 4)) for rng in rngs]
    claim = [int(rng.random() < 0.4) for rng in rngs]
    return pa.table({"age": age, "customer": ids, "cars": cars, "claim": claim})


def write_bank(path: Path, ids: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["customer", "income", "region", "since"], delimiter=";")
        writer.writeheader()
        writer.writerows(bank_rows(ids))


def write_all(folder: Path, bank: list[str], insurer: list[str], job: str = JOB) -> None:
    """Write job, party files, models and raw tables of both companies."""
    for name, text in (("job.toml", job), ("bank.toml", BANK), ("insurer.toml", INSURER), ("models.py", MODELS)):
        (folder / name).write_text(text)
    write_bank(folder / "bank.csv", bank)
    pa.parquet.write_table(insurer_table(insurer), folder / "insurer.parquet")

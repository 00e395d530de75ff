"""Files of a trained model to serve: job, party files, tables and models in a folder, as a user has them."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sl_queue.config.job import Job, PartyFile
from sl_queue.launch.asked import Asked
from sl_queue.launch.outcome import write_outcome
from sl_queue.local.prediction import predict_threads
from sl_queue.local.threads import run_local

ROWS = 2000
COLUMNS = 6
PARTIES = ("bank", "insurer")

_MODELS = """import torch
from torch import nn


class Base(nn.Module):
    def __init__(self, inputs, cut):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, cut), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


class Fuse(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.linear = nn.Linear(inputs, 1)

    def forward(self, inputs):
        return self.linear(torch.cat(inputs, dim=1))
"""
_JOB = """name = "served"
seed = 3
epochs = 2
batch_size = 200
[parties.bank]
role = "feature"
cut = [8]
[parties.insurer]
role = "label"
cut = [8]
"""
_PARTY = """party = "{party}"
state = "state/{party}"
[data]
path = "{party}.csv"
id = "id"
features = [{columns}]
{label}[base]
model = "models:Base"
args = {{ inputs = {inputs}, cut = 8 }}
optimizer = {{ name = "adam", lr = 0.01 }}
[predict]
path = "{party}.csv"
out = "predictions.csv"
"""
_FUSE = """[fuse]
model = "models:Fuse"
args = { inputs = 16 }
loss = "bce_with_logits"
optimizer = { name = "adam", lr = 0.01 }
"""


@dataclass(frozen=True, slots=True)
class Served:
    """A trained model's files, and what it predicts for each row."""

    folder: Path
    wanted: dict[int, float]

    def party(self, name: str) -> Path:
        """Return a party's file."""
        return self.folder / f"{name}.toml"


def trained(folder: Path, *, port: int, deadline_s: float) -> Served:
    """Write everything, train, and predict all rows in one go."""
    rng = np.random.default_rng(1)
    (folder / "models.py").write_text(_MODELS)
    (folder / "job.toml").write_text(_JOB)
    names = [f"c{number}" for number in range(COLUMNS)]
    for party in PARTIES:
        values = rng.standard_normal((ROWS, COLUMNS)).round(4)
        head, lines = ["id", *names], [[row, *values[row]] for row in range(ROWS)]
        if party == "insurer":
            head.append("label")
            lines = [[*line, int(line[1] > 0)] for line in lines]
        with (folder / f"{party}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *lines])
        own = 'label = "label"\n' if party == "insurer" else ""
        text = _PARTY.format(party=party, columns=", ".join(map(repr, names)), inputs=COLUMNS, label=own)
        text += _FUSE if party == "insurer" else ""
        listen = f'listen = "127.0.0.1:{port}"\n' if party == "insurer" else ""
        (folder / f"{party}.toml").write_text(f"{text}[serve]\n{listen}deadline = {deadline_s}\n")
    job, files = Job.load(folder / "job.toml"), [PartyFile.load(folder / f"{party}.toml") for party in PARTIES]
    run_local(job, files, out=folder / "state")
    predicted = predict_threads(job, files, {party: folder / "state" / party for party in PARTIES}, Asked())
    write_outcome(predicted, folder / "predictions.csv")
    with (folder / "predictions.csv").open() as file:
        return Served(folder, {int(row["id"]): float(row["probability"]) for row in csv.DictReader(file)})

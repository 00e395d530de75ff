"""The built-in example: scikit-learn's digits, whose left halves, right halves and labels three parties hold.

It writes a real job with real party files, so that one can go on from there with every other command.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.table import Table as ScreenTable

from sl_queue.compute.equality import joined_weights, largest_difference
from sl_queue.config.job import Job, PartyFile
from sl_queue.errors import JobError
from sl_queue.launch.connect import MEMORY
from sl_queue.launch.scheduler import OnStatus
from sl_queue.local.comparing import joined_run
from sl_queue.local.digits import read_digits
from sl_queue.local.threads import Result, run_threads
from sl_queue.observe.console import Screen, stdout
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.protocol.scheduler.status import RunStatus

MODELS = '''"""The demo's models, as one writes them in PyTorch."""

import torch
from torch import nn


class BaseModel(nn.Module):
    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class FuseModel(nn.Module):
    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return self.linear(torch.cat(inputs, dim=1))
'''

JOB = """name = "{name}"
seed = 7
epochs = 20
batch_size = 64
holdout = 0.3

{parties}
[parties.labels]
role = "label"

[pipeline]
micro_batches = 2
"""

FEATURE_PARTY = """[parties.{party}]
role = "feature"
cut = [32]
"""

PARTY = """party = "{party}"
state = "state/{party}"

[data]
path = "{path}"
id = "image"

[base]
model = "models:BaseModel"
args = {{ input_dim = 32, hidden_dim = 32 }}
optimizer = {{ name = "adam", lr = 0.003 }}
"""

LABELS = """party = "labels"
state = "state/labels"

[data]
path = "labels.csv"
id = "image"
label = "digit"

[fuse]
model = "models:FuseModel"
args = {{ input_dim = {input_dim}, output_dim = 10 }}
optimizer = {{ name = "adam", lr = 0.003 }}
loss = "cross_entropy"
metrics = ["accuracy"]
"""

FILES = {"left": "left.parquet", "right": "right.csv"}


def run_demo(out: Path | None, tell: OnStatus | None = None) -> None:
    """Train the joint model, each party alone, and the same layers joined; print how well each does."""
    folder = Path(tempfile.mkdtemp(prefix="sl_queue-demo-")) if out is None else out
    write_demo(folder)
    with Screen(log_level=logging.WARNING) as screen:

        def show(status: RunStatus) -> None:
            screen.status(status)
            if tell is not None:
                tell(status)

        screen.console.print(f"scikit-learn's digits, cut in two halves: {folder}", soft_wrap=True)
        joint = _train(folder, "job", ["left", "right", "labels"], show)
        alone = {party: _train(folder, f"{party}_alone", [party, "labels_alone"], show) for party in FILES}
    joined = joined_run(*_load(folder, "job", ["left", "right", "labels"]))
    table = ScreenTable("model", "held-out accuracy", box=None)
    table.add_row("joint: left and right half, labels at a third party", _accuracy(joint.history))
    for party, result in alone.items():
        table.add_row(f"{party} half alone", _accuracy(result.history))
    table.add_row("the same layers joined in one process", _accuracy(joined.history))
    difference = largest_difference(
        {**{f"base of {p}": joint.base(p).state_dict() for p in FILES}, "fuse": joint.fuse.state_dict()},
        joined_weights(joined),
    )
    console = stdout()
    console.print(table)
    console.print(f"largest difference of any weight, split and joined: {difference:g}")
    console.print(_next_steps(folder), soft_wrap=True)


def write_demo(folder: Path) -> None:
    """Write tables, models, job and party files; leaves a folder that already holds a demo as it is."""
    if (folder / "job.toml").exists():
        return
    if folder.exists() and any(folder.iterdir()):
        raise JobError(f"--out {folder}: the folder holds other files; choose an empty or a new one")
    folder.mkdir(parents=True, exist_ok=True)
    images, target = read_digits()
    ids = np.arange(len(target))
    pixels = (images / 16).astype(np.float32)  # (rows, 8, 8), in [0, 1]
    halves = {"left": pixels[:, :, :4], "right": pixels[:, :, 4:]}
    tables = {party: _half(ids, half) for party, half in halves.items()}
    pa.parquet.write_table(tables["left"], folder / FILES["left"])
    pa.csv.write_csv(tables["right"], folder / FILES["right"])
    pa.csv.write_csv(pa.table({"image": ids, "digit": target}), folder / "labels.csv")
    (folder / "models.py").write_text(MODELS)
    for party, path in FILES.items():
        (folder / f"{party}.toml").write_text(PARTY.format(party=party, path=path))
        (folder / f"{party}_alone.toml").write_text(_job(f"{party}_alone", party))
    (folder / "labels.toml").write_text(LABELS.format(input_dim=64))
    (folder / "labels_alone.toml").write_text(LABELS.format(input_dim=32))
    (folder / "job.toml").write_text(_job("digits", *FILES))  # last: it says that all is there


def _half(ids: npt.NDArray[np.int64], half: npt.NDArray[np.float32]) -> pa.Table:
    """Return one half of every image, shape (rows, 8, 4), as a column for each pixel."""
    columns = half.reshape(len(ids), -1)
    return pa.table({"image": ids, **{f"pixel_{i}": columns[:, i] for i in range(columns.shape[1])}})


def _job(name: str, *parties: str) -> str:
    return JOB.format(name=name, parties="\n".join(FEATURE_PARTY.format(party=party) for party in parties))


def _load(folder: Path, job: str, parties: list[str]) -> tuple[Job, list[PartyFile]]:
    return Job.load(folder / f"{job}.toml"), [PartyFile.load(folder / f"{party}.toml") for party in parties]


def _train(folder: Path, name: str, parties: list[str], show: OnStatus) -> Result:
    job, party_files = _load(folder, name, parties)
    states = {role: folder / "runs" / name / role for role in (*job.parties, SCHEDULER)}
    return run_threads(job, party_files, MEMORY, states, show)


def _accuracy(history: list[dict[str, Any]]) -> str:
    return f"{history[-1]['holdout']['accuracy']:.4f}"


def _next_steps(folder: Path) -> str:
    files = " ".join(str(folder / f"{name}.toml") for name in ("job", "left", "right", "labels"))
    return f"""
Tables, models, job and party files: {folder}
Final weights: {folder}/runs/job/<party>/final
Go on with:
  sl-queue check {files}
  sl-queue local {files}"""

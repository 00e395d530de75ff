"""A run with dropout and held-out rows whose state folders the first version of sl_queue left, in data/first_version.

`stopped` is what it left when it was stopped half-way, `finished` what the same run left when nobody
stopped it. They were made in a checkout of that version, whose sl_queue comes first on the path:

    cd / && PYTHONPATH=CHECKOUT:HERE python -c "from tests.support.first_version import FOLDER, write; write(FOLDER)"
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import sl_queue
from tests.support.split import Concatenated

FOLDER = Path(__file__).parent / "data" / "first_version"
N_ROWS = 30
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}


class Noisy(nn.Module):
    """A base model that draws in its forward pass."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 4), nn.Dropout(0.25))

    def forward(self, x: Any) -> Any:
        return self.layers(x)


def job(**changes: Any) -> sl_queue.Job:
    """Return the job of the stored run."""
    values: dict[str, Any] = {
        "name": "first",
        "seed": 11,
        "epochs": 5,
        "batch_size": 8,
        "holdout": 0.3,
        "parties": {"bank": {"role": "feature", "cut": [4]}, "shop": {"role": "label"}},
        "pipeline": {"micro_batches": 2, "checkpoint_every": 2},
        "broker": {"patience": 10.0},
    }
    return sl_queue.Job(**values | changes)


def files(**bank: Any) -> list[sl_queue.PartyFile]:
    """Return the party files of the stored run."""
    random = np.random.default_rng(3)
    features = random.normal(size=(N_ROWS, 3)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int64)
    base = {"model": "tests.support.first_version:Noisy", "args": {"inputs": 3}, "optimizer": SGD}
    fuse = {
        "model": Concatenated,
        "args": {"input_dim": 4, "output_dim": 1},
        "optimizer": SGD,
        "loss": "bce_with_logits",
    }
    ids = np.arange(100, 100 + N_ROWS)
    parties: Mapping[str, dict[str, Any]] = {
        "bank": {"data": sl_queue.Rows(ids, features), "base": base, **bank},
        "shop": {"data": sl_queue.Rows(ids, labels=labels), "fuse": fuse},
    }
    return [sl_queue.PartyFile(party=party, threads=1, **values) for party, values in parties.items()]


class Enough(Exception):
    """The run is stopped here."""


def stop_after(epochs: int) -> Any:
    """Return a status callback that ends a run as if it was killed."""

    def on_status(status: Mapping[str, Any]) -> None:
        if len(status["history"]) >= epochs:
            raise Enough

    return on_status


def write(folder: Path) -> None:
    """Train with the version that is imported, once to the end and once to be stopped."""
    shutil.rmtree(folder, ignore_errors=True)
    sl_queue.run_local(job(), files(), out=folder / "finished")
    try:
        sl_queue.run_local(job(), files(), out=folder / "stopped", on_status=stop_after(2))
    except (sl_queue.SlQueueError, Enough) as error:  # the first version raised one of its own
        print("stopped:", error)

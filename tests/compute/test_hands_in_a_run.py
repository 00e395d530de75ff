"""Whole runs over memory with hands in threads: weights and history are those of a plain run, whatever is set."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from sl_queue.local.threads import run_threads
from sl_queue.protocol.messages import SCHEDULER
from tests.support.split import Concatenated

ROWS = 150
RICH: dict[str, Any] = {
    "optimizer": {"name": "adamw", "lr": 0.02},
    "schedule": {"name": "cosine"},
    "clip_norm": 0.5,
    "ema": 0.9,
}


def base() -> nn.Module:
    """Return a base model whose first layer stays as it is."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 5))
    model[0].requires_grad_(False)
    return model


def fuse() -> nn.Module:
    return nn.Sequential(Concatenated(10, 6), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.Linear(6, 1))


def outcome(
    folder: Path, hands: dict[str, int], staleness: int, seed: int = 5, start: Path | None = None
) -> dict[str, str]:
    """Train, and return digests of all final weights, and the history without times."""
    chance = np.random.default_rng(3)
    features = {party: chance.standard_normal((ROWS, 4)).astype(np.float32) for party in ("left", "labels")}
    labels = (features["left"][:, 0] + features["labels"][:, 1] > 0).astype(np.int64)
    job = Job(
        name="run",
        seed=seed,
        epochs=4,
        batch_size=32,
        holdout=0.2,
        parties={"left": {"role": "feature", "cut": [5]}, "labels": {"role": "label", "cut": [5]}},
        pipeline={"micro_batches": 4, "depth": 8, "staleness": staleness},
        early_stopping={"metric": "loss", "patience": 3},
    )
    parts: dict[str, Any] = {"base": {"model": base, **RICH}}
    begins: dict[str, Any] = {} if start is None else {"start": {"from": str(start / "left")}}
    files = [
        PartyFile(party="left", data=Rows(np.arange(ROWS), features["left"], None), **parts, **begins),
        PartyFile(
            party="labels",
            data=Rows(np.arange(ROWS), features["labels"], labels),
            fuse={"model": fuse, "loss": "bce_with_logits", "metrics": ["auroc"], **RICH},
            **parts,
        ),
    ]
    states = {role: folder / role for role in ("left", "labels", SCHEDULER)}
    history = run_threads(job, files, "memory://", states, lambda _: None, hands=hands).history
    found = {
        str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in folder.glob("*/final/*.safetensors")
    }
    return {**found, "history": repr([{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history])}


@pytest.mark.parametrize("staleness", [0, 2])
def test_hands_in_a_run_change_neither_weights_nor_history(tmp_path: Path, staleness: int) -> None:
    plain = outcome(tmp_path / "plain", {}, staleness)
    assert len(plain) == 7  # base, base and fuse, each with the average and the last weights; and the history
    for name, hands in {"two": {"left": 2}, "three": {"labels": 3}, "both": {"left": 1, "labels": 2}}.items():
        assert outcome(tmp_path / name, hands, staleness) == plain, name


def test_hands_begin_with_the_weights_of_an_earlier_run_as_their_lead_does(tmp_path: Path) -> None:
    outcome(tmp_path / "earlier", {}, 0, seed=6)
    plain = outcome(tmp_path / "plain", {}, 0, start=tmp_path / "earlier")
    assert outcome(tmp_path / "hands", {"left": 2}, 0, start=tmp_path / "earlier") == plain

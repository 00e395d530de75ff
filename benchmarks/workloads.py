"""Workloads that are trained: two synthetic tables, a small one, and one of real rows.

Every process makes the columns of its own party from a seed, so nothing large is handed over.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sl_queue import Job, PartyFile, Rows

Array = npt.NDArray[np.float32]

LABEL = "insurer"
ADAM = {"name": "adam", "lr": 1e-3}


@dataclass(frozen=True, slots=True)
class Workload:
    """A table cut into columns, and the layers on them."""

    name: str
    rows: int
    columns: Mapping[str, int]  # by party; the label holder is among them if it has a base model
    base: Sequence[int]  # widths after the columns; a ReLU after each
    fuse: Sequence[int]  # hidden widths; then one logit
    batch: int
    micro_batches: int = 4
    real: bool = False  # scikit-learn's breast cancer table instead of random numbers
    sleep_s: float = 0.0  # that a base model sleeps, forwards and backwards, in the place of computing
    slow: str | None = None  # the party that sleeps five times as long

    @property
    def cut(self) -> int:
        return self.base[-1]

    @property
    def feature_parties(self) -> tuple[str, ...]:
        return tuple(party for party in self.columns if party != LABEL)

    def base_sizes(self, party: str) -> list[int]:
        """Return the widths of a party's base model."""
        return [self.columns[party], *self.base]

    @property
    def fuse_sizes(self) -> list[int]:
        return [self.cut * len(self.columns), *self.fuse, 1]

    def steps(self, epochs: int) -> int:
        return -(-self.rows // self.batch) * epochs


W1 = Workload("W1", 100_000, {"bank": 64, "telco": 64}, (128,), (64,), 1024)
W2 = Workload("W2", 65_536, {"bank": 256, "telco": 256}, (1024, 1024), (256,), 4096)
SMALL = Workload("small", 12_800, {"bank": 4, LABEL: 12}, (64,), (64,), 128)
REAL = Workload("breast cancer", 569, {"bank": 15, LABEL: 15}, (32,), (16,), 32, real=True)
WORKLOADS = {w.name: w for w in (W1, W2, SMALL, REAL)}


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


class Sleep(nn.Module):
    """Takes its time in both directions, and no core."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Sleep.apply(x, self.seconds)  # type: ignore[no-untyped-call]
        return found


def perceptron(sizes: Sequence[int], relu_at_the_end: bool, sleep_s: float = 0.0) -> nn.Sequential:
    """Linear layers with a ReLU after each, or after each but the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    layers = layers if relu_at_the_end else layers[:-1]
    return nn.Sequential(*layers, *[Sleep(sleep_s)] * (sleep_s > 0))


class Fuse(nn.Module):
    """Joins a list of activations, then a perceptron."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = perceptron(sizes, relu_at_the_end=False)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        joined: Tensor = self.layers(torch.cat(inputs, dim=1))
        return joined


@cache
def _real() -> tuple[Array, npt.NDArray[np.int64]]:
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    scaled = (table.data - table.data.mean(0)) / table.data.std(0)
    return scaled.astype(np.float32), table.target.astype(np.int64)


def features(workload: Workload, party: str) -> Array:
    """Return a party's columns."""
    place = list(workload.columns).index(party)
    if workload.real:
        before = sum(list(workload.columns.values())[:place])
        return _real()[0][:, before : before + workload.columns[party]]
    draw = np.random.default_rng([11, place])
    return draw.standard_normal((workload.rows, workload.columns[party]), np.float32)


def labels(workload: Workload) -> npt.NDArray[np.int64]:
    """Zero or one: of a random linear function of all columns, with noise."""
    if workload.real:
        return _real()[1]
    draw = np.random.default_rng(12)
    score = draw.standard_normal(workload.rows)
    for party, width in workload.columns.items():
        score += features(workload, party) @ draw.standard_normal(width, np.float32)
    return (score > 0).astype(np.int64)


def job_of(workload: Workload, epochs: int, **tables: Any) -> Job:
    """Return the job; `tables` are its [pipeline], [wire] and further keys."""
    parties: dict[str, Any] = {p: {"role": "feature", "cut": [workload.cut]} for p in workload.feature_parties}
    parties[LABEL] = {"role": "label"} | ({"cut": [workload.cut]} if LABEL in workload.columns else {})
    values = {"name": "bench", "seed": 7, "epochs": epochs, "batch_size": workload.batch, "parties": parties}
    return Job(**values | tables)


def party_file(workload: Workload, party: str, metrics: Sequence[str] = ()) -> PartyFile:
    """Return a party's file, with its columns in memory."""
    parts: dict[str, Any] = {}
    own = None
    if party in workload.columns:
        own = features(workload, party)
        sleep_s = workload.sleep_s * (5 if party == workload.slow else 1)
        args = {"sizes": workload.base_sizes(party), "relu_at_the_end": True, "sleep_s": sleep_s}
        parts["base"] = {"model": perceptron, "args": args, "optimizer": ADAM}
    if party == LABEL:
        fuse = {"model": Fuse, "args": {"sizes": workload.fuse_sizes}, "optimizer": ADAM}
        parts["fuse"] = {**fuse, "loss": "bce_with_logits", "metrics": list(metrics)}
    data = Rows(np.arange(workload.rows), own, labels(workload) if party == LABEL else None)
    return PartyFile(party=party, data=data, threads=1, **parts)

"""A small run in which everything about how models learn can be set, and the plain loop that it must equal."""

import copy
import json
from typing import Any

import numpy as np
import torch
from torch import nn

from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.schedule.row_order import row_order
from tests.support import recipes
from tests.support.split import Concatenated, Parties, Stages, equal_weights, furthest, table_of

ROWS, BATCH, EPOCHS = 24, 8, 2
STEPS = 6
ONE_KIND = {"muon", "sparseadam"}  # of matrices, of sparse gradients: no other parameters
OPTIMIZERS = {name: given for name, given in recipes.OPTIMIZERS.items() if name not in ONE_KIND}
SCHEDULES: dict[str, Any] = {**recipes.SCHEDULES, "code": lambda step, steps: 1.0 / (1.0 + step / steps)}


class Net(nn.Module):
    """Layers with names to match."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(inputs, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.embedding(x))))  # type: ignore[no-any-return]


def run_of(staleness: int = 0, holdout: float = 0.0, models: Any = None, **learning: Any) -> Parties:
    """Two feature parties and a label holder; `learning` is what all their models say of how they learn."""
    torch.manual_seed(3)
    draw = np.random.default_rng(5)
    given: dict[str, Any] = models or {"a": Net(3), "b": Net(2), "fuse": Concatenated(8, 1)}
    features = {p: draw.normal(size=(ROWS, n)).astype(np.float32) for p, n in (("a", 3), ("b", 2))}
    labels = draw.integers(0, 2, ROWS)
    learning = {"optimizer": {"name": "sgd", "lr": 0.1}, **learning}
    of_fuse = learning.pop("fuse", {})
    own = {k: v for k, v in learning.items() if k != "groups"} | of_fuse
    files, tables = {}, {}
    for party in ("a", "b"):
        tables[party] = table_of(features[party])
        base = {"model": given[party], **learning}
        files[party] = PartyFile(party=party, data=Rows(np.arange(ROWS), features[party]), base=base)
    tables["holder"] = table_of(None, labels)
    fuse = {"model": given["fuse"], "loss": "bce_with_logits", **own}
    files["holder"] = PartyFile(party="holder", data=Rows(np.arange(ROWS), None, labels), fuse=fuse)
    job = Job(
        name="test",
        seed=7,
        epochs=EPOCHS,
        batch_size=BATCH,
        holdout=holdout,
        parties={p: {"role": "feature", "cut": [4]} for p in ("a", "b")} | {"holder": {"role": "label"}},
        pipeline={"staleness": staleness, "checkpoint_every": 1, "micro_batches": 2},
    )
    return Parties(job, files, tables, given)


def plain(run: Parties, make: Any, before: Any = None, after: Any = None) -> dict[str, nn.Module]:
    """Train in a loop that knows nothing of sl_queue but the order of rows; `make(module)` is its optimizer."""
    modules = {name: copy.deepcopy(module) for name, module in run.given.items()}
    optimizers = {name: make(module) for name, module in modules.items()}
    labels = torch.from_numpy(run.tables["holder"].labels).float()
    step = 0
    for epoch in range(EPOCHS):
        order = row_order(ROWS, 7, epoch)
        for first in range(0, ROWS, BATCH):
            for part in np.array_split(order[first : first + BATCH], 2):
                cuts = [modules[p](torch.from_numpy(run.tables[p].features[part])) for p in ("a", "b")]
                loss = nn.functional.binary_cross_entropy_with_logits(modules["fuse"](cuts).squeeze(1), labels[part])
                (loss * (len(part) / BATCH)).backward()
            for name, module in modules.items():
                if before is not None:
                    before(module, optimizers[name], step)
                optimizers[name].step()
                if after is not None:
                    after(name, module, step)
                optimizers[name].zero_grad()
            step += 1
    return modules


def parts(stages: Stages) -> dict[str, Any]:
    return {**stages.bases, "fuse": stages.fuse}


def through_a_checkpoint(stages: Stages, run: Parties) -> Stages:
    """Build new stages that begin where these stand, as files hold it: JSON values, tensors by name."""
    fresh = run.stages()
    for name, stage in parts(stages).items():
        state = stage.state()
        parts(fresh)[name].load(State(dict(state.tensors), json.loads(json.dumps(dict(state.values)))))
    return fresh


def weights(stages: Stages) -> dict[str, bytes]:
    return {
        f"{name} {part} {tensor}": bytes(payload.data)
        for name, stage in parts(stages).items()
        for part, tensors in stage.weights().items()
        for tensor, payload in tensors.items()
    }


def require_equal(stages: Stages, modules: dict[str, nn.Module]) -> None:
    for name, module in stages.modules().items():
        assert equal_weights(module, modules[name]), (name, furthest(module, modules[name]))


def torch_class(name: str) -> Any:
    return next(c for n, c in vars(torch.optim).items() if n.lower() == name)

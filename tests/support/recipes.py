"""Every way to learn: fourteen optimizers, six schedules, two windows; resumed at every step, and compared.

python -m tests.support.recipes            the whole product, one line for each that differs, and how many are equal
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from sl_queue.protocol.checkpoint import State
from tests.support.split import Parties, Stages, table_of

ROWS, STEPS = 24, 6
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adadelta": {"lr": 1.0},
    "adafactor": {"lr": 0.05},
    "adagrad": {"lr": 0.05},
    "adam": {"lr": 0.01, "amsgrad": True},
    "adamax": {"lr": 0.01},
    "adamw": {"lr": 0.01, "weight_decay": 0.1},
    "asgd": {"lr": 0.05, "t0": 2.0},
    "muon": {"lr": 0.02},  # of matrices alone
    "nadam": {"lr": 0.01},
    "radam": {"lr": 0.01},
    "rmsprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "rprop": {"lr": 0.01},
    "sgd": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "sparseadam": {"lr": 0.05},  # of sparse gradients alone
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"name": "constant", "warmup": 2},
    "cosine": {"name": "cosine", "warmup": 2, "min_lr": 1e-4},
    "linear": {"name": "linear"},
    "step": {"name": "step", "every": 2, "gamma": 0.5},
    "exponential": {"name": "exponential", "gamma": 0.8},
    "one_cycle": {"name": "one_cycle"},
}
STALENESS = (0, 1)


class Sum(nn.Module):
    """Adds what comes in; learns nothing."""

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs).sum(0)


def bases_for(optimizer: str) -> dict[str, nn.Module]:
    """Build base models that an optimizer can train."""
    torch.manual_seed(3)
    if optimizer == "sparseadam":
        return {p: nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten()) for p in ("a", "b")}
    return {
        party: nn.Sequential(nn.Linear(inputs, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))
        for party, inputs in (("a", 3), ("b", 2))
    }


def run_of(optimizer: str, schedule: str, staleness: int) -> Parties:
    """Build a run of two feature parties and a label holder."""
    draw = np.random.default_rng(5)
    sparse = optimizer == "sparseadam"
    features: dict[str, Any] = {p: draw.normal(size=(ROWS, n)).astype(np.float32) for p, n in (("a", 3), ("b", 2))}
    if sparse:
        features = {party: draw.integers(0, 5, (ROWS, 2)) for party in features}
    bases, labels = bases_for(optimizer), draw.integers(0, 2, ROWS)
    learning: dict[str, Any] = {"optimizer": {"name": optimizer, **OPTIMIZERS[optimizer]}}
    learning |= {"schedule": SCHEDULES[schedule], "ema": 0.9}
    learning |= {} if sparse else {"clip_norm": 0.5}
    files = {
        party: PartyFile(party=party, data=Rows(np.arange(ROWS), features[party]), base={"model": base, **learning})
        for party, base in bases.items()
    }
    fuse: dict[str, Any] = {"model": Sum(), "loss": "cross_entropy"}
    files["holder"] = PartyFile(party="holder", data=Rows(np.arange(ROWS), None, labels), fuse=fuse)
    job = Job(
        name="recipe",
        seed=7,
        epochs=2,
        batch_size=8,
        parties={p: {"role": "feature", "cut": [4]} for p in bases} | {"holder": {"role": "label"}},
        pipeline={"staleness": staleness, "checkpoint_every": 1, "micro_batches": 2},
    )
    tables = {party: table_of(features[party]) for party in bases} | {"holder": table_of(None, labels)}
    return Parties(job, files, tables, {**bases, "fuse": Sum()})


def weights(stages: Stages) -> dict[str, bytes]:
    """Return the bytes of all weights."""
    return {
        f"{party} {part} {name}": bytes(payload.data)
        for party, stage in stages.bases.items()
        for part, tensors in stage.weights().items()
        for name, payload in tensors.items()
    }


def resumed(run: Parties, step: int) -> Stages:
    """Train to a step, and go on from there with new stages that know the checkpoint alone."""
    import json

    stopped, anew = run.stages().train(run.pipeline, stop_after=step), run.stages()
    for old, new in (*((stopped.bases[p], anew.bases[p]) for p in stopped.bases), (stopped.fuse, anew.fuse)):
        state = old.state()
        new.load(State(dict(state.tensors), json.loads(json.dumps(dict(state.values)))))
    return anew.train(run.pipeline, first_step=step + 1)


def differing(optimizer: str, schedule: str, staleness: int, steps: Iterator[int] | range) -> list[int]:
    """Return the steps at which a resumed run ends with other weights. Raises ValueError if nothing is learned."""
    run = run_of(optimizer, schedule, staleness)
    begun, undisturbed = weights(run.stages()), weights(run.stages().train(run.pipeline))
    if begun == undisturbed:
        raise ValueError(f"{optimizer} with {schedule} has learned nothing")
    return [step for step in steps if weights(resumed(run, step)) != undisturbed]


def main() -> int:
    """Try the whole product."""
    product = list(itertools.product(OPTIMIZERS, SCHEDULES, STALENESS))
    wrong = 0
    for optimizer, schedule, staleness in product:
        found = differing(optimizer, schedule, staleness, range(STEPS - 1))
        if found:
            wrong += 1
            print(f"{optimizer}, {schedule}, staleness {staleness}: other weights when resumed after steps {found}")
    print(
        f"{len(product) - wrong} of {len(product)} recipes ({len(OPTIMIZERS)} optimizers, {len(SCHEDULES)} schedules, "
        f"{len(STALENESS)} windows) end with the same bits when resumed at each of {STEPS - 1} steps"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

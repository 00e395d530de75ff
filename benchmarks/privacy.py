"""Defences of labels on three public tables: utility against attacks, beside published formulas, epoch after epoch.

    python -m benchmarks privacy        or, without what the other benchmarks need: python -m benchmarks.privacy

Everything runs in this thread on sl_queue's own stages and cuts; only messages are left out. The published defences
draw again in each epoch, as published; sl_queue's draw once for each row.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from benchmarks.published_defences import IsotropicAnew, LaplaceAtTheLogit, Marvell, MaxNormAnew
from sl_queue import Job, PartyFile, Rows
from sl_queue.compute.base_stage import base_stage
from sl_queue.compute.fuse_stage import fuse_stage
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.cut.guard import Guard
from sl_queue.data.table import read_table
from sl_queue.launch.privacy import parts_of, responded, token_key
from sl_queue.privacy.accounting import cap_of_epsilon
from sl_queue.privacy.guards import RowIndex
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches

RESULTS = Path(__file__).parent / "results" / "privacy.md"
DOCS = Path(__file__).parents[1] / "docs" / "privacy.md"
ADAM = {"name": "adam", "lr": 0.005}
CUT = 16
LONG = 40  # epochs


@dataclass(frozen=True, slots=True)
class Data:
    """One public table, its columns halved among two feature parties."""

    name: str
    halves: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
    labels: npt.NDArray[np.int64]

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def tables() -> Iterator[Data]:
    """Yield the tables: nearly balanced, 2 % positive, ten classes."""
    cancer = load_breast_cancer()
    x = ((cancer.data - cancer.data.mean(0)) / cancer.data.std(0)).astype(np.float32)
    yield Data("breast cancer, 37 % positive", (x[:, :15], x[:, 15:]), 1 - cancer.target)
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    eights = np.flatnonzero(digits.target == 8)
    few = np.sort(np.concatenate([np.flatnonzero(digits.target != 8), eights[: len(images) // 55]]))
    everything, eight = np.arange(len(images)), (digits.target == 8).astype(np.int64)
    for name, rows, labels in (
        ("digits, is it an 8 (2 % are)", few, eight),
        ("digits, is it an 8 (10 % are)", everything, eight),
        ("digits, ten classes", everything, digits.target),
    ):
        flat = [images[rows][:, :, half].reshape(len(rows), -1) for half in (slice(0, 4), slice(4, 8))]
        yield Data(name, (flat[0], flat[1]), labels[rows])


class Base(nn.Module):
    """One layer with a ReLU."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, CUT), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


class Fuse(nn.Module):
    """A linear layer, as most examples have."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.top = nn.Linear(2 * CUT, outputs)

    def forward(self, inputs: list[Tensor]) -> Any:
        return self.top(torch.cat(inputs, dim=1))


# A run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One defence."""

    name: str
    privacy: Mapping[str, Any]  # of the label holder
    published: Any = None  # in the place of sl_queue's own: a defence, or a loss
    epochs: int = 15  # with many labels flipped, later epochs learn the flips
    binary: bool = False  # made for two classes

    @property
    def cap(self) -> float | None:
        labels = self.privacy.get("labels")
        return None if labels is None else cap_of_epsilon(labels["epsilon"])


CASES = (
    Case("none", {}, epochs=LONG),
    Case("max-norm, drawn each time (as published)", {}, MaxNormAnew()),
    Case("isotropic noise x1, each time", {}, IsotropicAnew(1.0)),
    Case("isotropic noise x4, each time", {}, IsotropicAnew(4.0)),
    Case("Marvell, power 4, each time", {}, Marvell, binary=True),
    Case("Laplace at the logit, epsilon 12 in all", {}, 15 / 12, binary=True),
    Case("Laplace at the logit, epsilon 3 in all", {}, 15 / 3, binary=True),
    *(
        Case(f"**labels, epsilon {epsilon:g}**", {"labels": {"epsilon": epsilon, "prior_ok": True}}, epochs=epochs)
        for epsilon, epochs in ((4.0, LONG), (3.0, LONG), (2.0, LONG), (1.0, 12))
    ),
    Case('**gradients = "max-norm"**, once a row', {"gradients": "max-norm"}, epochs=LONG),
    Case("**gradients = { noise = 4 }**, once a row", {"gradients": {"noise": 4.0}}),
)
COLUMNS = ("norm", "direction", "spectral", "completion", "change")


def run(data: Data, case: Case, seed: int) -> dict[str, float]:
    """Train with one defence; returns utility, and what each attack reads of the labels at worst."""
    binary = data.classes == 2
    loss: Any = "bce_with_logits" if binary else "cross_entropy"
    if isinstance(case.published, float):
        loss = LaplaceAtTheLogit(case.published, torch.Generator().manual_seed(seed))
    parties = {f"f{i}": {"role": "feature", "cut": [CUT]} for i in range(2)} | {"label": {"role": "label"}}
    job = Job(name="privacy", seed=seed, epochs=case.epochs, batch_size=64, holdout=0.3, parties=parties)
    ids = np.arange(len(data.labels))
    bases = [{"model": Base, "args": {"inputs": x.shape[1]}, "optimizer": ADAM} for x in data.halves]
    files = [PartyFile(party=f"f{i}", data=Rows(ids, x), base=bases[i]) for i, x in enumerate(data.halves)]
    fuse = {"model": Fuse, "args": {"outputs": 1 if binary else data.classes}, "optimizer": ADAM}
    fuse |= {"loss": loss, "metrics": ["auroc"], "outputs": "logits"}
    files.append(
        PartyFile(party="label", data=Rows(ids, labels=data.labels), fuse=fuse, privacy={**case.privacy, "meter": True})
    )
    return _trained(job, files, data, case, bytes([seed + 1]) * 32)


def _trained(job: Job, files: list[PartyFile], data: Data, case: Case, secret: bytes) -> dict[str, float]:
    importer = Importer()
    specs = {file.party: resolve(job, file, importer).with_secret(secret) for file in files}
    held = {name: responded(spec, read_table(spec.table, token_key=token_key(spec))) for name, spec in specs.items()}
    batches = job.batches(len(data.labels), held["label"].hashes)
    parts = parts_of(specs["label"], held["label"], batches)
    assert parts.meter is not None
    label, published = held["label"], case.published
    if published is Marvell:
        assert label.labels is not None
        published = Marvell(4.0, label.labels, RowIndex.of(label.row_keys))
    guards = parts.guards
    if published is not None and not isinstance(published, float):
        guards = {party: Guard(published, guard.leaving, guard.arriving) for party, guard in guards.items()}
    fuse = fuse_stage(specs["label"].compute, held["label"], batches, None, guards)
    bases = {name: base_stage(specs[name].compute, held[name], batches) for name in job.feature_parties}
    leaks, best = [], 0.0
    for epoch in range(job.epochs):
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            at = MicroBatch(step, 0)
            gradients = fuse.forward_backward(at, {name: base.forward(at) for name, base in bases.items()})
            for name, base in bases.items():
                base.backward(at, gradients[name])
                base.update()
            fuse.update()
        leaks.append(parts.meter.end_epoch()["f0"])
        best = _utility(fuse, bases, batches, step)
    found = {name: max(leak[name] for leak in leaks[1:]) for name in (*COLUMNS, "chance")}
    last = {name: leaks[-1].get(name, math.nan) for name in ("patient", "response")}
    return {"utility": best, **found, **last}


def _utility(fuse: Any, bases: Mapping[str, Any], batches: Batches, step: int) -> float:
    for index in range(batches.holdout_parts):
        at = MicroBatch(step, index)
        fuse.evaluate(at, {name: base.predict(at) for name, base in bases.items()})
    metrics = fuse.metrics()
    return float((fuse.scoring.truly or metrics)["auroc"] or math.nan)


def compare(quick: bool) -> Iterator[str]:
    """Yield a table in Markdown for each public table."""
    header = ("defence", "epochs", "held-out AUC", *COLUMNS, "patient", "chance", "response", "cap")
    for data in tables():
        yield f"### {data.name}: {len(data.labels):,} rows\n"
        yield f"| {' | '.join(header)} |\n| --- |{' --- |' * (len(header) - 1)}"
        for case in CASES[:: 6 if quick else 1]:
            if case.binary and data.classes > 2:
                continue
            found = [run(data, case, seed) for seed in range(1 if quick else 3)]
            mean = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
            numbers: list[float | None] = [*(mean[name] for name in COLUMNS), mean["patient"], mean["chance"]]
            numbers += [None if case.cap is None else mean["response"], case.cap]
            cells = ("-" if n is None else f"{n:.3f}" for n in numbers)
            utility = _with_error([each["utility"] for each in found])
            yield f"| {case.name} | {case.epochs} | {utility} | {' | '.join(cells)} |"
        yield ""


def _with_error(values: list[float]) -> str:
    """Return the mean of several seeds with its standard error, which says how far the draws alone move it."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.3f} ± {error:.3f}"


def with_tables(page: str, tables: str) -> str:
    """Return the page with these tables in the place of those that are there."""
    before, after = page.index("### "), page.index("What to see:")
    return f"{page[:before]}{tables.strip()}\n\n{page[after:]}"


def main() -> None:
    """Print the tables, and keep them in benchmarks/results/privacy.md and in docs/privacy.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases, one seed")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    lines = []
    for line in compare(quick):
        print(line, flush=True)
        lines.append(line)
    if not quick:
        RESULTS.write_text("\n".join(["# Defences of labels\n", *lines]))
        DOCS.write_text(with_tables(DOCS.read_text(), "\n".join(lines)))


if __name__ == "__main__":
    main()

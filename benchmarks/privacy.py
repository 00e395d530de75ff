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
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from sl_queue import Job, PartyFile, Rows
from sl_queue.compute.base_stage import base_stage
from sl_queue.compute.fuse_stage import fuse_stage
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.cut.guard import Crossing, Guard
from sl_queue.data.table import read_table
from sl_queue.launch.privacy import parts_of, responded, token_key
from sl_queue.privacy import defences
from sl_queue.privacy.accounting import cap_of_epsilon
from sl_queue.privacy.draws import normal_stream
from sl_queue.privacy.guards import RowIndex
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import Batches

ADAM = {"name": "adam", "lr": 0.005}
CUT = 16
KEY = b"benchmark".ljust(32)


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


# Published defences ---------------------------------------------------------------------------------------------


def anew(crossing: Crossing, count: int) -> Tensor:
    """Draw for this micro-batch of this epoch alone."""
    at = crossing.micro_batch
    return torch.from_numpy(normal_stream(KEY + repr((at.step, at.index, crossing.receiver)).encode(), count))


@dataclass(frozen=True, slots=True)
class MaxNormAnew:
    """Li et al. 2022; in FATE, fedlearner and SecretFlow under the same name or as `gradient perturb`."""

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        return defences.max_norm(tensor, anew(crossing, len(tensor)))


@dataclass(frozen=True, slots=True)
class IsotropicAnew:
    """Normal noise in all directions."""

    level: float

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        return defences.isotropic(tensor, self.level, anew(crossing, tensor.numel()).reshape(tensor.flatten(1).shape))


@dataclass(frozen=True, slots=True)
class Marvell:
    """Li et al. 2022: noise by class, of the covariances that minimise the sum of both KL divergences.

    Its power is `power` times the squared distance of the mean gradients of the two classes.
    """

    power: float
    labels: npt.NDArray[np.int64]
    index: RowIndex

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        positive = torch.from_numpy(self.labels[self.index(crossing.rows.keys)] == 1)
        flat, share = tensor.flatten(1).double(), float(positive.double().mean())
        if not 0 < share < 1:
            return tensor
        mean = (flat[~positive].mean(0), flat[positive].mean(0))
        apart = mean[1] - mean[0]
        distance = float(apart @ apart)
        if distance < 1e-30:
            return tensor
        spread = [float((flat[of] - m).square().mean()) for of, m in ((~positive, mean[0]), (positive, mean[1]))]
        chosen = _least_divergence(flat.shape[1], distance, share, spread, self.power * distance)
        draws = anew(crossing, flat.numel()).reshape(flat.shape)
        along = (draws @ apart)[:, None] * apart / distance
        scale = torch.from_numpy(chosen).sqrt()[positive.long()]  # (rows, 2): along and across
        return (flat + scale[:, :1] * along + scale[:, 1:] * (draws - along)).to(tensor.dtype).reshape(tensor.shape)


def _least_divergence(
    width: int, distance: float, share: float, spread: list[float], power: float
) -> npt.NDArray[np.float64]:
    """Return the noise's variance along and across the classes' difference, for class 0 and class 1; shape (2, 2)."""
    base, weights = np.array(spread) / distance + 1e-9, np.array([1 - share, share])
    limit = power / distance

    def divergence(flat: npt.NDArray[np.float64]) -> float:
        (a0, b0), (a1, b1) = flat.reshape(2, 2) + base[:, None]
        across = (width - 1) * (b0 / b1 + b1 / b0)
        return float(0.5 * (across + a0 / a1 + a1 / a0 + 1 / a0 + 1 / a1))

    def left(flat: npt.NDArray[np.float64]) -> float:
        along, across = flat.reshape(2, 2).T
        return limit - float(weights @ (along + (width - 1) * across))

    start = np.array([limit, 0.0, limit, 0.0])
    limits = [(0.0, None)] * 4
    found = minimize(divergence, start, bounds=limits, constraints={"type": "ineq", "fun": left}, method="SLSQP")
    chosen: npt.NDArray[np.float64] = np.maximum(found.x if found.success else start, 0).reshape(2, 2) * distance
    return chosen


class _NoisyLogit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, scale: float, generator: torch.Generator) -> Tensor:
        ctx.scale, ctx.generator = scale, generator
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        u = torch.rand(gradient.shape, generator=ctx.generator) - 0.5
        return gradient - ctx.scale / len(gradient) * u.sign() * torch.log1p(-2 * u.abs()), None, None


@dataclass(slots=True, eq=False)
class LaplaceAtTheLogit:
    """A loss whose gradient gets Laplace noise before it goes anywhere: epsilon an epoch is 1 / scale."""

    scale: float
    generator: torch.Generator

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        noisy = _NoisyLogit.apply(logits, self.scale, self.generator)  # type: ignore[no-untyped-call]
        return nn.functional.binary_cross_entropy_with_logits(noisy, labels.reshape(logits.shape).to(logits.dtype))


# A run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One defence."""

    name: str
    privacy: Mapping[str, Any]  # of the label holder
    published: Any = None  # in the place of sl_queue's own: a defence, or a loss
    epochs: int = 15
    binary: bool = False  # made for two classes

    @property
    def cap(self) -> float | None:
        labels = self.privacy.get("labels")
        return None if labels is None else cap_of_epsilon(labels["epsilon"])


CASES = (
    Case("none", {}),
    Case("max-norm, drawn each time (as published)", {}, MaxNormAnew()),
    Case("isotropic noise x1, each time", {}, IsotropicAnew(1.0)),
    Case("isotropic noise x4, each time", {}, IsotropicAnew(4.0)),
    Case("Marvell, power 4, each time", {}, Marvell, binary=True),
    Case("Laplace at the logit, epsilon 12 in all", {}, 15 / 12, binary=True),
    Case("Laplace at the logit, epsilon 3 in all", {}, 15 / 3, binary=True),
    *(Case(f"**labels, epsilon {e:g}**", {"labels": {"epsilon": e, "prior_ok": True}}) for e in (4.0, 3.0, 2.0, 1.0)),
    Case('**gradients = "max-norm"**, once a row', {"gradients": "max-norm"}),
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
    header = ("defence", "held-out AUC", *COLUMNS, "patient", "chance", "response", "cap")
    for data in tables():
        yield f"### {data.name}: {len(data.labels):,} rows\n"
        yield f"| {' | '.join(header)} |\n| --- |{' --- |' * (len(header) - 1)}"
        for case in CASES[:: 6 if quick else 1]:
            if case.binary and data.classes > 2:
                continue
            found = [run(data, case, seed) for seed in range(1 if quick else 3)]
            mean = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
            numbers: list[float | None] = [
                mean["utility"],
                *(mean[name] for name in COLUMNS),
                mean["patient"],
                mean["chance"],
            ]
            numbers += [None if case.cap is None else mean["response"], case.cap]
            yield f"| {case.name} | {' | '.join('-' if n is None else f'{n:.3f}' for n in numbers)} |"
        yield ""


def main() -> None:
    """Print the tables, and keep them in benchmarks/results/privacy.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases, one seed")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    lines = []
    for line in compare(quick):
        print(line, flush=True)
        lines.append(line)
    if not quick:
        (Path(__file__).parent / "results" / "privacy.md").write_text("\n".join(["# Defences of labels\n", *lines]))


if __name__ == "__main__":
    main()

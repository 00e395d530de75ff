"""FATE's public pairs of tables, trained from their CSV files as they are, and compared with plain PyTorch.

python -m tests.support.fate DIR          DIR: a copy of FATE's examples/data, or what there is of it

Each pair is aligned, its columns are made numbers by [features], and it is trained in one run from the raw files. The
same layers are then trained without sl_queue, on the tables joined and standardised by pandas. A line for each pair
says by how much the weights differ, and what both reach on held-out rows.
"""

import copy
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import sl_queue
from sl_queue.config.job import Job, PartyFile

SEED, EPOCHS, BATCH, MICRO_BATCHES, HOLDOUT, WIDTH, RATE = 7, 10, 64, 2, 0.2, 8, 0.05
CLOSE = 1e-6  # of each weight
GUEST = "guest"  # who holds the labels


@dataclass(frozen=True, slots=True)
class Pair:
    """A guest's table and those of one host or more, which FATE's examples train on."""

    name: str
    files: Mapping[str, str]  # by party, the guest first
    loss: str
    metric: str
    id: str = "id"
    label: str = "y"
    outputs: int = 1
    empty: tuple[str, ...] = ()  # columns without any value, which the party files leave out

    def missing(self, folder: Path) -> list[str]:
        """Name the files that are not there."""
        return [name for name in self.files.values() if not (folder / name).exists()]


def _two(name: str, loss: str, metric: str, **more: Any) -> Pair:
    files = {GUEST: f"{name}_hetero_guest.csv", "host": f"{name}_hetero_host.csv"}
    return Pair(name, files, loss, metric, **more)


MOTOR = {GUEST: "motor_hetero_guest.csv", "host_1": "motor_hetero_host_1.csv", "host_2": "motor_hetero_host_2.csv"}
PAIRS = (
    _two("breast", "bce_with_logits", "auroc"),
    _two("default_credit", "bce_with_logits", "auroc"),
    _two("vehicle_scale", "cross_entropy", "accuracy", outputs=4),
    Pair("motor", MOTOR, "mse", "r2", id="idx", label="motor_speed"),
    _two("student", "mse", "r2"),
    _two("dvisits", "poisson", "loss", label="doctorco"),
    _two("ionosphere_scale", "bce_with_logits", "auroc", id="sid", label="label", empty=("x2",)),
)


class Top(nn.Module):
    """Adds a layer to what all parties' models give."""

    def __init__(self, parties: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(parties * WIDTH, outputs)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        found: Tensor = self.layer(torch.cat(inputs, 1))
        return found if found.shape[1] > 1 else found.squeeze(1)


@dataclass(frozen=True, slots=True)
class Compared:
    """One pair, trained in both ways."""

    pair: Pair
    rows: int  # that all parties share
    apart: float  # the largest difference of a weight
    ours: float  # the metric on held-out rows
    plain: float

    @property
    def equal(self) -> bool:
        return self.apart <= CLOSE

    def __str__(self) -> str:
        return (
            f"{self.pair.name}: {len(self.pair.files)} parties, {self.rows:,} shared rows; weights differ by at most "
            f"{self.apart:.1e}; {self.pair.metric} on held-out rows {self.ours:.4f}, plain PyTorch {self.plain:.4f}"
        )


def joined(pair: Pair, folder: Path) -> tuple[dict[str, Tensor], Tensor, Any]:
    """Join and standardise by pandas; returns each party's columns, the labels, and which rows are held out."""
    raw = {party: pd.read_csv(folder / name, index_col=pair.id) for party, name in pair.files.items()}
    shared = sorted(set.intersection(*(set(table.index) for table in raw.values())))
    held_out = sl_queue.holdout_rows(shared, SEED, HOLDOUT)
    columns = {}
    for party, table in raw.items():
        own = table.loc[shared].drop(columns=[pair.label, *pair.empty], errors="ignore").astype("float64")
        training = own[~held_out]
        spread = training.std(ddof=0).where(training.min() != training.max(), 1.0)
        scaled = (own.fillna(training.mean()) - training.mean()) / spread
        columns[party] = torch.tensor(scaled.to_numpy()).float()
    labels = raw[GUEST].loc[shared, pair.label].to_numpy()
    return columns, torch.tensor(labels), held_out


def modules(pair: Pair, widths: Mapping[str, int]) -> dict[str, nn.Module]:
    """Build the layers of all parties, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        bases = {party: nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU()) for party, width in widths.items()}
        return {**bases, "fuse": Top(len(bases), pair.outputs)}


def trained_plainly(pair: Pair, columns: Mapping[str, Tensor], labels: Tensor, held_out: Any) -> dict[str, nn.Module]:
    """Train in one process, without sl_queue."""
    found = modules(pair, {party: own.shape[1] for party, own in columns.items()})
    optimizer = torch.optim.SGD([p for module in found.values() for p in module.parameters()], lr=RATE)
    training = np.flatnonzero(~held_out)
    for epoch in range(EPOCHS):
        order = training[sl_queue.row_order(len(training), SEED, epoch)]
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            for part in np.array_split(rows, min(MICRO_BATCHES, len(rows))):
                loss = _loss(pair, outputs(found, columns, part), labels[part])
                (loss * (len(part) / len(rows))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


def outputs(found: Mapping[str, nn.Module], columns: Mapping[str, Tensor], rows: Any) -> Tensor:
    result: Tensor = found["fuse"]([found[party](own[rows]) for party, own in columns.items()])
    return result


def _loss(pair: Pair, output: Tensor, labels: Tensor) -> Tensor:
    functional = nn.functional
    match pair.loss:
        case "cross_entropy":
            return functional.cross_entropy(output, labels)
        case "bce_with_logits":
            return functional.binary_cross_entropy_with_logits(output, labels.float())
        case "poisson":
            return functional.poisson_nll_loss(output, labels.float())
        case _:
            return functional.mse_loss(output, labels.float())


def _metric(pair: Pair, output: Tensor, labels: Tensor) -> float:
    from sklearn import metrics

    truth, found = labels.numpy(), output.numpy()
    match pair.metric:
        case "auroc":
            return float(metrics.roc_auc_score(truth, found))
        case "accuracy":
            return float(metrics.accuracy_score(truth, found.argmax(1)))
        case "loss":
            return float(_loss(pair, output, labels))
        case _:
            return float(metrics.r2_score(truth, found))


def trained(pair: Pair, folder: Path, widths: Mapping[str, int], out: Path) -> sl_queue.Result:
    """Train from the raw files, every party a worker."""
    own = modules(pair, widths)
    sgd, features = {"name": "sgd", "lr": RATE}, {"*": {"kind": "number", "missing": "mean"}}
    parties = {p: {"role": "label" if p == GUEST else "feature", "cut": [WIDTH]} for p in pair.files}
    job = Job(
        name=pair.name, seed=SEED, epochs=EPOCHS, batch_size=BATCH, holdout=HOLDOUT, parties=parties,
        alignment={"method": "psi"}, pipeline={"micro_batches": MICRO_BATCHES},
    )  # fmt: skip
    files = []
    for party, name in pair.files.items():
        data: dict[str, Any] = {"path": folder / name, "id": pair.id, "exclude": list(pair.empty)}
        more: dict[str, Any] = {}
        if party == GUEST:
            data["label"] = pair.label
            more["fuse"] = {"model": own["fuse"], "optimizer": sgd, "loss": pair.loss}
            more["fuse"] |= {} if pair.metric == "loss" else {"metrics": [pair.metric]}
        base = {"model": own[party], "optimizer": sgd}
        files.append(PartyFile(party=party, data=data, features=features, base=base, **more))
    return sl_queue.run_local(job, files, out=out)


def compare(pair: Pair, folder: Path) -> Compared:
    """Train a pair in both ways."""
    columns, labels, held_out = joined(pair, folder)
    with tempfile.TemporaryDirectory(prefix="sl_queue-fate-") as out:
        result = trained(pair, folder, {party: own.shape[1] for party, own in columns.items()}, Path(out))
        ours = {**{party: copy.deepcopy(result.base(party)) for party in columns}, "fuse": result.fuse}
    plain = trained_plainly(pair, columns, labels, held_out)
    apart = max(
        float((one - other).detach().abs().max())
        for name, module in plain.items()
        for one, other in zip(module.parameters(), ours[name].parameters(), strict=True)
    )
    with torch.no_grad():
        measured = _metric(pair, outputs(plain, columns, np.flatnonzero(held_out)), labels[held_out])
    return Compared(pair, len(labels), apart, result.history[-1]["holdout"][pair.metric], measured)


def report(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield a line for each pair, and whether it is as it should be. Pairs without files are left out."""
    for pair in PAIRS:
        if missing := pair.missing(folder):
            yield f"{pair.name}: left out, there is no {', '.join(missing)}", True
        else:
            found = compare(pair, folder)
            yield str(found), found.equal


def main(folder: Path) -> int:
    """Compare all pairs."""
    torch.set_num_threads(1)
    wrong = 0
    for line, right in report(folder):
        print(line, flush=True)
        wrong += not right
    return int(wrong > 0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))

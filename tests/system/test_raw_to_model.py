"""Three companies' raw tables to one model, in one command: as plain PyTorch on tables joined and encoded by hand."""

import copy
import csv
import gzip
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import sl_queue
from sl_queue.cli.main import app
from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.protocol.codec import decode
from sl_queue.protocol.messages import Masked
from sl_queue.transport.memory import MemoryBroker
from tests.support.raw_tables import MODELS

pytestmark = pytest.mark.timeout(240)

EVERYONE = [f"c-{number:05d}" for number in np.random.default_rng(5).permutation(100_000)[:200]]
HELD = {"bank": EVERYONE[:130], "telco": EVERYONE[70:], "insurer": EVERYONE[40:160]}
SHARED = sorted(set.intersection(*map(set, HELD.values())))
REGIONS = ("east", "north", "south")
RATE = 0.05
JOB = """
name = "three"
seed = 11
epochs = 3
batch_size = 16
holdout = 0.25

[parties.bank]
role = "feature"
cut = [4]

[parties.telco]
role = "feature"
cut = [3]

[parties.insurer]
role = "label"
cut = [2]

[alignment]
method = "psi"
normalise = ["strip", "casefold"]
pad = 50

[pipeline]
micro_batches = 2
"""
BASE = """
[base]
model = "models:Base"
args = {{ width = {width}, out = {out} }}
optimizer = {{ name = "sgd", lr = 0.05 }}
"""
BANK = """
party = "bank"
[data]
path = "bank.csv"
id = "customer"
csv = { delimiter = ";", decimal = ",", encoding = "cp1252" }
[features]
income = { kind = "number", missing = "median", indicator = true }
region = { kind = "category" }
since = { kind = "date", parts = ["year", "age"], at = 2026-01-01, format = "%d.%m.%Y" }
""" + BASE.format(width=9, out=4)
TELCO = """
party = "telco"
[data]
path = "telco.csv.gz"
id = "number"
[features]
"*" = { kind = "number", missing = "zero", scale = "minmax" }
""" + BASE.format(width=2, out=3)
INSURER = f"""
party = "insurer"
[data]
path = "insurer"
id = "customer"
label = "claim"
[features]
"*" = {{ kind = "number", missing = "mean" }}
{BASE.format(width=1, out=2)}
[fuse]
model = "models:Fuse"
args = {{ width = 9 }}
optimizer = {{ name = "sgd", lr = 0.05 }}
loss = "bce_with_logits"
"""


def values_of(customer: str) -> dict[str, Any]:
    """Return what is true of a customer; None where the company that should know does not."""
    rng = np.random.default_rng(int(customer[2:]))
    gap = rng.random(3) < 0.15
    return {
        "income": None if gap[0] else round(float(rng.lognormal(8, 1)), 2),
        "region": None if gap[1] else REGIONS[int(rng.integers(3))],
        "since": date(2010, 1, 1) + timedelta(days=int(rng.integers(5000))),
        "calls": int(rng.integers(0, 90)),
        "minutes": None if gap[2] else round(float(rng.exponential(30)), 3),
        "age": None if rng.random() < 0.1 else float(rng.integers(18, 90)),
        "claim": int(rng.random() < 0.4),
    }


def write_tables(folder: Path, wrong_for: frozenset[str] = frozenset()) -> None:
    """Write all tables, each in its company's way; with other values for some customers."""
    known = {name: values_of(name) for name in EVERYONE}
    for name in wrong_for:
        known[name] = {**values_of("c-99999"), "income": 1e6, "calls": 5000, "minutes": 9999.0, "age": 120.0}
    with (folder / "bank.csv").open("w", newline="", encoding="cp1252") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["customer", "income", "region", "since"])
        for name in HELD["bank"]:
            own = known[name]
            income = "" if own["income"] is None else f"{own['income']:.2f}".replace(".", ",")
            writer.writerow([f" {name.upper()}", income, own["region"] or "", f"{own['since']:%d.%m.%Y}"])
    with gzip.open(folder / "telco.csv.gz", "wt", encoding="utf-8", newline="") as packed:
        writer = csv.writer(packed)
        writer.writerow(["minutes", "number", "calls"])
        for name in reversed(HELD["telco"]):
            own = known[name]
            writer.writerow(["" if own["minutes"] is None else own["minutes"], name, own["calls"]])
    (folder / "insurer").mkdir(exist_ok=True)
    ids = sorted(HELD["insurer"], key=lambda name: name[::-1])
    for part in range(2):
        own_ids = ids[part::2]
        columns = {key: [known[name][key] for name in own_ids] for key in ("age", "claim")}
        table = pa.table({"customer": pa.array(own_ids).dictionary_encode(), **columns})
        pyarrow.parquet.write_table(table, folder / "insurer" / f"{part}.parquet")


def write_all(folder: Path) -> list[str]:
    files = {"job.toml": JOB, "bank.toml": BANK, "telco.toml": TELCO, "insurer.toml": INSURER, "models.py": MODELS}
    for name, text in files.items():
        (folder / name).write_text(text)
    write_tables(folder)
    return [str(folder / name) for name in ("job.toml", "bank.toml", "telco.toml", "insurer.toml")]


@contextmanager
def traffic(patch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Copy every message that passes a broker in memory."""
    bodies: list[bytes] = []
    publish = MemoryBroker.publish

    def copying(self: MemoryBroker, receiver: str, sender: str, body: bytes, **more: Any) -> None:
        bodies.append(bytes(body))
        publish(self, receiver, sender, body, **more)

    with patch.context() as patched:
        patched.setattr(MemoryBroker, "publish", copying)
        yield bodies


def columns_by_hand() -> tuple[dict[str, torch.Tensor], torch.Tensor, np.ndarray[Any, Any]]:
    """Join and encode with NumPy, fitted on training rows alone."""
    rows = [values_of(name) for name in SHARED]
    training = np.flatnonzero(~sl_queue.holdout_rows(SHARED, 11, 0.25))

    def column(key: str) -> Any:
        return np.array([np.nan if row[key] is None else float(row[key]) for row in rows])

    def standard(values: Any, fill: Any) -> Any:
        seen = values[training][~np.isnan(values[training])]
        return (np.where(np.isnan(values), fill(seen), values) - seen.mean()) / seen.std()

    income, age = column("income"), column("age")
    regions = [row["region"] for row in rows]
    since = [row["since"] for row in rows]
    year = np.array([float(day.year) for day in since])
    days = np.array([float((date(2026, 1, 1) - day).days) for day in since])
    bank = [standard(income, np.median), np.isnan(income), np.zeros(len(rows)), [r is None for r in regions]]
    bank += [[r == wanted for r in regions] for wanted in REGIONS]
    bank += [standard(year, np.mean), standard(days, np.mean)]

    def minmax(values: Any) -> Any:
        seen = values[training][~np.isnan(values[training])]
        return (np.where(np.isnan(values), 0.0, values) - seen.min()) / (seen.max() - seen.min())

    telco = [minmax(column("minutes")), minmax(column("calls"))]
    found = {"bank": bank, "telco": telco, "insurer": [standard(age, np.mean)]}
    tensors = {party: torch.tensor(np.array(each, np.float64).T).float() for party, each in found.items()}
    return tensors, torch.tensor(column("claim")).float(), training


def trained_plainly(files: list[str]) -> list[torch.nn.Module]:
    """Train the same layers, joined, from the same initial weights."""
    job, parties = Job.load(files[0]), [PartyFile.load(path) for path in files[1:]]
    still = {"name": "sgd", "lr": 1e-30}
    frozen = []
    for file in parties:
        assert file.base is not None
        changes: dict[str, Any] = {"base": file.base.replace(optimizer=still)}
        if file.fuse is not None:
            changes["fuse"] = file.fuse.replace(optimizer=still)
        frozen.append(file.replace(**changes))
    initial = sl_queue.run_local(job.replace(epochs=1), frozen)
    bases = {name: copy.deepcopy(initial.base(name)).train() for name in job.fused}
    fuse = copy.deepcopy(initial.fuse).train()
    columns, labels, training = columns_by_hand()
    optimizers = [torch.optim.SGD(module.parameters(), lr=RATE) for module in (*bases.values(), fuse)]
    for epoch in range(job.epochs):
        order = training[sl_queue.row_order(len(training), job.seed, epoch)]
        for first in range(0, len(order), job.batch_size):
            rows = order[first : first + job.batch_size]
            for part in np.array_split(rows, 2):
                output = fuse([base(columns[name][part]) for name, base in bases.items()])
                loss = torch.nn.functional.binary_cross_entropy_with_logits(output, labels[part])
                (loss * (len(part) / len(rows))).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return [*bases.values(), fuse]


def weights_in(out: Path) -> list[dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    names = ("bank/final/base", "telco/final/base", "insurer/final/base", "insurer/final/fuse")
    return [load_file(out / f"{name}.safetensors") for name in names]


def test_one_command_from_raw_files_to_the_weights_of_plain_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0.25 < len(SHARED) / len(EVERYONE) < 0.35
    files = write_all(tmp_path)
    runs = []
    for out in ("first", "second"):
        with traffic(monkeypatch) as bodies:
            app(["local", *files, "--out", str(tmp_path / out)], standalone_mode=False)
        runs.append(bodies)
    for trained, plain in zip(weights_in(tmp_path / "first"), trained_plainly(files), strict=True):
        for name, value in plain.state_dict().items():
            assert torch.allclose(trained[name], value, atol=1e-6, rtol=0)
    assert len(runs[0]) > 100
    assert not set(runs[0]) & set(runs[1]), "a message repeats between two runs over the same tables"
    points = [pieces_of(bodies) for bodies in runs]
    assert len(points[0]) > 2 * len(SHARED)
    assert not points[0] & points[1], "a masked id repeats between two runs"
    everything = b"".join(runs[0])
    for name in {*HELD["bank"], *HELD["telco"], *HELD["insurer"]}:
        for told in (name, name.upper()):
            assert told.encode() not in everything
            for kind in ("md5", "sha1", "sha256", "blake2b"):
                digest = hashlib.new(kind, told.encode()).digest()
                assert digest[:16] not in everything and digest[:16].hex().encode() not in everything


def pieces_of(bodies: list[bytes]) -> set[bytes]:
    """Return all masked points and masks among messages."""
    found: set[bytes] = set()
    for body in bodies:
        message = decode(body)[1]
        if isinstance(message, Masked):
            data, size = bytes(message.payload.data), message.payload.shape[1]
            found.update(data[at : at + size] for at in range(0, len(data), size))
    return found


def test_other_values_of_held_out_rows_change_nothing_that_was_fitted(tmp_path: Path) -> None:
    files = write_all(tmp_path)
    job, parties = Job.load(files[0]), [PartyFile.load(path) for path in files[1:]]
    sl_queue.run_local(job, parties, out=tmp_path / "before")
    held_out = [name for name, held in zip(SHARED, sl_queue.holdout_rows(SHARED, 11, 0.25), strict=True) if held]
    assert len(held_out) >= 10
    write_tables(tmp_path, frozenset(held_out))
    sl_queue.run_local(job, parties, out=tmp_path / "after")
    for party in HELD:
        fitted = [(tmp_path / when / party / "final/features.json").read_bytes() for when in ("before", "after")]
        assert fitted[0] == fitted[1], party
    for one, other in zip(weights_in(tmp_path / "before"), weights_in(tmp_path / "after"), strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())

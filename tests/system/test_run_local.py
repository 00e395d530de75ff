"""Split equals joined, on whole runs: real tables, real channels, a plain PyTorch loop as the judge."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sl_queue
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from tests.support.secured import write_keys

N_ROWS = 203  # 203 = 6 * 32 + 11: the last batch is short
BATCH = 32
EPOCHS = 3


class BaseModel(nn.Module):
    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class FuseModel(nn.Module):
    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(input_dim, output_dim)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return self.fc(torch.cat(inputs, dim=1))


def columns() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    features = rng.normal(size=(N_ROWS, 6)).astype(np.float32)
    label = (features @ rng.normal(size=6) + 0.3 * rng.normal(size=N_ROWS) > 0).astype(np.int64)
    return {"id": 1000 + rng.permutation(N_ROWS), **{f"f{i}": features[:, i] for i in range(6)}, "label": label}


def write(folder: Path, name: str, names: list[str], seed: int, extension: str) -> Path:
    """Write a party's own table: its columns, its rows in an order of its own."""
    order = np.random.default_rng(seed).permutation(N_ROWS)
    table = pa.table({column: columns()[column][order] for column in names})
    path = folder / f"{name}.{extension}"
    (pa.parquet.write_table if extension == "parquet" else pa.csv.write_csv)(table, path)
    return path


def fresh_models() -> dict[str, nn.Module]:
    torch.manual_seed(11)
    return {
        "bank": BaseModel(2, 8),
        "telco": BaseModel(3, 5),
        "insurer": BaseModel(1, 4),
        "fuse": FuseModel(17, 1),
    }


PARTY_COLUMNS = {"bank": ["f0", "f1"], "telco": ["f2", "f3", "f4"], "insurer": ["f5"]}


def job(**overrides: Any) -> sl_queue.Job:
    values: dict[str, Any] = {
        "name": "credit",
        "seed": 7,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "parties": {
            "bank": {"role": "feature", "cut": [8]},
            "telco": {"role": "feature", "cut": [5]},
            "insurer": {"role": "label", "cut": [4]},
        },
        "pipeline": {"micro_batches": 3, "depth": 3, "checkpoint_every": 4},
        "broker": {"patience": 10.0},
    }
    return sl_queue.Job(**(values | overrides))


def party_files(folder: Path) -> list[sl_queue.PartyFile]:
    models = fresh_models()
    files = []
    for seed, (party, names) in enumerate(PARTY_COLUMNS.items()):
        is_label = party == "insurer"
        extension = "csv" if party == "telco" else "parquet"
        path = write(folder, party, ["id", *names, *(["label"] if is_label else [])], seed, extension)
        data = {"path": str(path), "id": "id"} | ({"label": "label"} if is_label else {})
        adam = {"name": "adam", "lr": 0.01}
        fuse = {"model": models["fuse"], "optimizer": adam, "loss": "bce_with_logits", "metrics": ["accuracy", "auroc"]}
        base = {"model": models[party], "optimizer": adam}
        files.append(
            sl_queue.PartyFile(party=party, data=data, base=base, threads=1, **({"fuse": fuse} if is_label else {}))
        )
    return files


def joined(shuffle: bool, micro_batches: int, epochs: int = EPOCHS) -> dict[str, nn.Module]:
    """Train the same layers as one module by a loop that knows nothing of sl_queue but the order of rows."""
    models = fresh_models()
    order = np.argsort(columns()["id"])
    inputs = {
        party: torch.from_numpy(np.stack([columns()[n][order] for n in names], axis=1))
        for party, names in PARTY_COLUMNS.items()
    }
    labels = torch.from_numpy(columns()["label"][order]).float()
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models.values()]
    for epoch in range(epochs):
        rows = sl_queue.row_order(N_ROWS, 7, epoch) if shuffle else np.arange(N_ROWS)
        for first in range(0, N_ROWS, BATCH):
            step = rows[first : first + BATCH]
            for part in np.array_split(step, micro_batches):
                outputs = [models[party](inputs[party][part]) for party in PARTY_COLUMNS]
                logits = models["fuse"](outputs).squeeze(1)
                loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[part])
                (loss * len(part) / len(step)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return models


def weights(result: sl_queue.Result) -> dict[str, dict[str, torch.Tensor]]:
    modules = {party: result.base(party) for party in PARTY_COLUMNS} | {"fuse": result.fuse}
    return {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in modules.items()}


def difference(a: dict[str, dict[str, torch.Tensor]], b: dict[str, Any]) -> float:
    states = {n: m.state_dict() if isinstance(m, nn.Module) else m for n, m in b.items()}
    return max(float((a[n][k] - states[n][k]).abs().max()) for n in a for k in a[n])


@pytest.mark.parametrize("shuffle", [True, False])
def test_three_parties_over_memory_end_with_the_weights_of_one_process(shuffle: bool, tmp_path: Path) -> None:
    result = sl_queue.run_local(job(shuffle=shuffle), party_files(tmp_path))
    assert difference(weights(result), joined(shuffle, micro_batches=3)) < 1e-6
    assert [line["epoch"] for line in result.history] == list(range(EPOCHS))
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("sealed", [False, True])
def test_memory_and_rabbitmq_are_bit_equal(shuffle: bool, sealed: bool, tmp_path: Path, broker_url: str) -> None:
    over_memory = sl_queue.run_local(job(shuffle=shuffle), party_files(tmp_path))
    security = write_keys(tmp_path / "keys", (*PARTY_COLUMNS, SCHEDULER, OPERATOR)) if sealed else ""
    agreed = job(shuffle=shuffle, **tomllib.loads(security))
    over_rabbitmq = sl_queue.run_local(agreed, party_files(tmp_path), broker=broker_url, keys=tmp_path / "keys")
    assert difference(weights(over_memory), weights(over_rabbitmq)) == 0.0


@pytest.mark.parametrize(("micro_batches", "depth"), [(1, 1), (4, 4), (4, 2)])
def test_the_pipeline_changes_nothing_but_time(micro_batches: int, depth: int, tmp_path: Path) -> None:
    pipeline = {"micro_batches": micro_batches, "depth": depth, "checkpoint_every": 3}
    result = sl_queue.run_local(job(pipeline=pipeline), party_files(tmp_path))
    assert difference(weights(result), joined(True, micro_batches)) < 1e-6


def test_the_result_files_are_the_modules_own_state_dicts_and_the_history_has_a_line_an_epoch(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = sl_queue.run_local(job(holdout=0.2), party_files(tmp_path), out=out)
    fresh = fresh_models()
    for party in PARTY_COLUMNS:
        state = load_file(out / party / "final" / "base.safetensors")
        fresh[party].load_state_dict(state)
        assert difference({party: state}, {party: result.base(party)}) == 0.0
    fresh["fuse"].load_state_dict(load_file(out / "insurer" / "final" / "fuse.safetensors"))
    lines = (out / "scheduler" / "history.jsonl").read_text().splitlines()
    assert len(lines) == EPOCHS
    assert set(result.history[0]) == {"epoch", "step", "loss", "holdout", "seconds"}
    assert set(result.history[0]["holdout"]) == {"loss", "accuracy", "auroc"}


def test_a_finished_run_that_is_run_again_says_so_and_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = sl_queue.run_local(job(), party_files(tmp_path), out=out)
    again = sl_queue.run_local(job(), party_files(tmp_path), out=out)
    assert difference(weights(first), weights(again)) == 0.0
    assert again.history == first.history


def test_a_run_that_is_interrupted_and_run_again_ends_equal(tmp_path: Path) -> None:
    quiet = sl_queue.run_local(job(), party_files(tmp_path))

    class Enough(Exception):
        pass

    def interrupt(status: Any) -> None:
        if status["epoch"] >= 1:
            raise Enough

    with pytest.raises(Enough):
        sl_queue.run_local(job(), party_files(tmp_path), out=tmp_path / "out", on_status=interrupt)
    resumed = sl_queue.run_local(job(), party_files(tmp_path), out=tmp_path / "out")
    assert difference(weights(quiet), weights(resumed)) == 0.0


def test_an_error_in_one_partys_model_ends_the_run_everywhere_with_its_reason(tmp_path: Path) -> None:
    class Bad(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Bad.calls += 1
            return self.fc(x) if Bad.calls < 20 else self.fc(x)[:, :7]

    files = party_files(tmp_path)
    adam = {"name": "adam", "lr": 0.01}
    files[0] = sl_queue.PartyFile(party="bank", data=files[0].data, base={"model": Bad(), "optimizer": adam}, threads=1)
    with pytest.raises(sl_queue.ShapeError, match="bank") as caught:
        sl_queue.run_local(job(), files)
    assert caught.value.exit_code == 5


Change = Callable[[list[sl_queue.PartyFile]], None]


def test_parties_whose_ids_differ_are_told_both_row_counts_and_no_id(tmp_path: Path) -> None:
    files = party_files(tmp_path)
    bank = pa.parquet.read_table(tmp_path / "bank.parquet")
    pa.parquet.write_table(bank.slice(1), tmp_path / "bank.parquet")
    with pytest.raises(sl_queue.AlignmentError) as caught:
        sl_queue.run_local(job(), files)
    message = str(caught.value)
    assert "203" in message
    assert "202" in message
    assert str(bank["id"][0].as_py()) not in message

"""From raw tables that overlap partly to a model, in one command: the model of the pre-joined, pre-encoded tables."""

import json
import os
import signal
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from torch import nn

import sl_queue
from sl_queue.cli.main import app
from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.errors import AlignmentError, CheckpointError, JobError
from sl_queue.launch.operator import read_status
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.security.keys import PrivateKey, read_key, write_key
from tests.support import raw_tables
from tests.support.local_run import started

PSI = raw_tables.JOB + '\n[alignment]\nmethod = "psi"\nnormalise = ["strip", "casefold"]\npad = 50\n'
BANK, INSURER = raw_tables.customers(60), raw_tables.customers(70, first=20)
SHARED = sorted(set(BANK) & set(INSURER))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    raw_tables.write_all(tmp_path, BANK, INSURER, PSI)
    return tmp_path


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """Write the same companies, with the rows that both hold and no others."""
    other = tmp_path / "joined"
    other.mkdir()
    raw_tables.write_all(other, SHARED, SHARED[::-1], raw_tables.JOB)
    return other


def loaded(folder: Path) -> tuple[Any, list[Any]]:
    files = [PartyFile.load(folder / f"{name}.toml") for name in ("bank", "insurer")]
    return Job.load(folder / "job.toml"), files


def weights(out: Path) -> dict[str, bytes]:
    found = {f"{p.parent.parent.name}/{p.name}": p.read_bytes() for p in out.glob("*/final/*.safetensors")}
    assert len(found) == 3
    return found


def test_a_run_aligns_its_rows_first_and_equals_the_run_on_joined_tables(folder: Path, joined: Path) -> None:
    assert len(SHARED) == 40
    statuses: list[Any] = []
    aligned = sl_queue.run_local(*loaded(folder), out=folder / "out", on_status=statuses.append)
    plain = sl_queue.run_local(*loaded(joined), out=joined / "out")
    for one, other in zip(aligned.fuse.parameters(), plain.fuse.parameters(), strict=True):
        assert torch.equal(one, other)
    assert weights(folder / "out") == weights(joined / "out")
    assert aligned.history[-1]["holdout"] == plain.history[-1]["holdout"]
    found = json.loads((folder / "out/bank/aligned.json").read_text())
    assert [sorted(BANK)[position] for position in found["positions"]] == SHARED
    assert not (folder / "out/bank/alignment.key").exists()
    assert statuses[0]["phase"] == "aligning"
    assert any("of its set masked" in s["parties"]["bank"]["phase"] for s in statuses if s["phase"] == "aligning")


def test_a_finished_run_is_compared_with_the_rows_that_were_aligned(folder: Path) -> None:
    sl_queue.run_local(*loaded(folder), out=folder / "out")
    sl_queue.run_local(*loaded(folder), out=folder / "out")
    raw_tables.write_bank(folder / "bank.csv", BANK[1:])
    run = json.loads((folder / "out/bank/final/run.json").read_text())
    (folder / "out/bank/final/run.json").write_text(json.dumps({**run, "told": False, "reported": False}))
    with pytest.raises(CheckpointError, match="differ from those that were aligned"):
        sl_queue.run_local(*loaded(folder), out=folder / "out")


def test_align_alone_tells_sizes_and_a_run_goes_on_from_there(
    folder: Path, joined: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(folder / name) for name in ("job.toml", "bank.toml", "insurer.toml")]
    app(["align", *files, "--out", str(folder / "out")], standalone_mode=False)
    said = capsys.readouterr().out
    assert "bank: 40 of its 60 rows are shared by all" in said
    assert "insurer: 40 of its 70 rows are shared by all" in said
    app(["align", *files, "--out", str(folder / "out")], standalone_mode=False)
    assert capsys.readouterr().out == said
    before = (folder / "out/bank/aligned.json").read_bytes()
    sl_queue.run_local(*loaded(folder), out=folder / "out")
    assert (folder / "out/bank/aligned.json").read_bytes() == before
    sl_queue.run_local(*loaded(joined), out=joined / "out")
    assert weights(folder / "out") == weights(joined / "out")


def test_tables_without_a_shared_row_are_told_how_their_ids_are_written(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw_tables.write_bank(folder / "bank.csv", [f"c-{number}" for number in range(100, 160)])
    with pytest.raises(AlignmentError) as raised:
        sl_queue.run_local(*loaded(folder), out=folder / "out")
    assert "no row is shared by all: insurer up to 100, bank up to 100 rows" in str(raised.value)
    assert "those of 'bank' are text of 5 characters (\"a-ddd\")" in caplog.text
    assert "those of 'insurer' are text of 7 characters (\"a-ddddd\")" in caplog.text
    assert not (folder / "out/bank/aligned.json").exists()


def test_a_table_of_more_rows_than_agreed_is_refused_at_home(folder: Path) -> None:
    text = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(text.replace("pad = 50", "pad = 5000\nat_most = 30"))
    with pytest.raises(JobError, match=r"it has more rows than alignment.at_most = 30; leave some out"):
        sl_queue.run_local(*loaded(folder), out=folder / "out")


def test_align_without_an_alignment_in_the_job_says_what_to_set(
    joined: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        app(["align", str(joined / "job.toml"), str(joined / "bank.toml")], standalone_mode=False)
    assert 'set it to "psi"' in capsys.readouterr().err


def test_processes_over_a_broker_align_through_kills_to_the_same_weights(
    folder: Path, joined: Path, broker_url: str, unique: str
) -> None:
    for place in (folder, joined):
        text = (place / "job.toml").read_text()
        (place / "job.toml").write_text(text.replace('name = "raw"', f'name = "{unique}"'))
    sl_queue.run_local(*loaded(joined), out=joined / "out")
    files = [folder / name for name in ("job.toml", "bank.toml", "insurer.toml")]
    with started(files, folder / "out", broker_url) as run:
        run.until_it_is_so((folder / "out/bank/alignment.key").exists, "a key")
        os.kill(run.workers()["bank"], signal.SIGKILL)
        run.until_it_is_so((folder / "out/scheduler/alignment.json").exists, "an alignment")
        os.kill(run.workers()["scheduler"], signal.SIGKILL)
        run.finish()
    assert weights(folder / "out") == weights(joined / "out")
    job = Job.load(folder / "job.toml")
    status = read_status(job, broker_url)
    assert status is not None


def test_a_sealed_run_over_a_broker_aligns_to_the_same_weights(
    folder: Path, joined: Path, broker_url: str, unique: str
) -> None:
    roles = ("bank", "insurer", SCHEDULER, OPERATOR)
    for role in roles:
        (folder / "keys" / role).mkdir(parents=True)
        write_key(folder / "keys" / role / "seal.key", PrivateKey.generate(signs=role == SCHEDULER))
    public = {role: read_key(folder / "keys" / role / "seal.key").public.texts() for role in roles}
    job, files = loaded(folder)
    sealed = Job(**{**tomllib.loads(PSI), "name": unique, "security": {"seal": True, "keys": public}})
    result = sl_queue.run_local(sealed, files, broker=broker_url, out=folder / "out", keys=folder / "keys")
    plain = sl_queue.run_local(*loaded(joined), out=joined / "out")
    for one, other in zip(result.fuse.parameters(), plain.fuse.parameters(), strict=True):
        assert torch.equal(one, other)
    assert job.digest != sealed.digest


def trained_of_three(folder: Path, tables: Mapping[str, Path], *, aligned: bool) -> Any:
    job = Job(
        **{
            "name": "three", "seed": 3, "epochs": 2, "batch_size": 8, "holdout": 0.2,
            "parties": {
                "bank": {"role": "feature", "cut": [3]},
                "telco": {"role": "feature", "cut": [3]},
                "court": {"role": "label"},
            },
        }
        | ({"alignment": {"method": "psi", "pad": 7}} if aligned else {})
    )  # fmt: skip
    files = []
    for name, path in tables.items():
        data: Any = {"path": path, "id": "customer", "csv": {"delimiter": ";", "decimal": ","}}
        features = {"income": {"kind": "number", "missing": "mean"}, "*": {"kind": "category", "rare": 100}}
        base = {"model": Base, "args": {"width": 5}, "optimizer": {"name": "sgd", "lr": 0.1}}
        files.append(PartyFile(party=name, data=data, features=features, base=base))
    data = {"path": folder / "court.parquet", "id": "customer", "label": "claim"}
    fuse = {"model": Fuse, "optimizer": {"name": "sgd", "lr": 0.1}, "loss": "bce_with_logits"}
    files.append(PartyFile(party="court", data=data, fuse=fuse))
    return sl_queue.run_local(job, files)


def test_three_companies_and_a_label_holder_without_columns(tmp_path: Path) -> None:
    """Mixed formats, shuffled rows, 30 % in common; the label holder has labels only."""
    everyone = raw_tables.customers(100)
    names = {"bank": everyone[:65], "telco": everyone[35:], "court": everyone[20:80]}
    shared = sorted(set.intersection(*map(set, names.values())))
    assert len(shared) == 30
    tables = {name: tmp_path / f"{name}.csv" for name in ("bank", "telco")}
    for name, path in tables.items():
        raw_tables.write_bank(path, names[name])
    labels = raw_tables.insurer_table(names["court"]).select(["customer", "claim"])
    pyarrow.parquet.write_table(labels, tmp_path / "court.parquet")

    found = trained_of_three(tmp_path, tables, aligned=True)
    for name, path in tables.items():
        raw_tables.write_bank(path, shared if name == "bank" else shared[::-1])
    labels = raw_tables.insurer_table(shared).select(["customer", "claim"])
    pyarrow.parquet.write_table(labels, tmp_path / "court.parquet")
    plain = trained_of_three(tmp_path, tables, aligned=False)
    for one, other in zip(found.fuse.parameters(), plain.fuse.parameters(), strict=True):
        assert torch.equal(one, other)


class Base(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(rows))


class Fuse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = self.layer(torch.cat(inputs, dim=1)).squeeze(1)
        return found

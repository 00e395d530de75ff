"""From two tables to a trained model with the files that `sl-queue init` writes."""

import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

import sl_queue
from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.data.spec import Rows
from tests.support import raw_tables
from tests.system.test_cli import COMMAND, environment

pytestmark = pytest.mark.timeout(240)
PARTIES = ("--party", "insurer:insurer.parquet:customer", "--party", "bank:bank.csv:customer")


def run(*words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *map(str, words)], capture_output=True, text=True, env=environment(), stdin=subprocess.DEVNULL, **more
    )


def write_tables(folder: Path) -> None:
    raw_tables.write_bank(folder / "bank.csv", raw_tables.customers(60))
    table = raw_tables.insurer_table(raw_tables.customers(70, first=20))
    pyarrow.parquet.write_table(table, folder / "insurer.parquet")


def test_its_files_and_proposed_features_train_on_tables_as_they_are(tmp_path: Path) -> None:
    done = run("init", tmp_path / "claims", *PARTIES, "--label", "claim")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "claims"
    assert sorted(path.name for path in folder.iterdir()) == ["bank.toml", "insurer.toml", "job.toml", "models.py"]
    write_tables(folder)
    bank = (folder / "bank.toml").read_text()
    (folder / "bank.toml").write_text(bank.replace("# csv = {", "csv = {"))
    for party in ("bank", "insurer"):
        proposed = run("features", folder / "job.toml", folder / f"{party}.toml", "--write")
        assert proposed.returncode == 0, proposed.stderr
    job, files = (
        Job.load(folder / "job.toml"),
        [PartyFile.load(folder / f"{name}.toml") for name in ("bank", "insurer")],
    )
    assert job.name == "claims" and job.alignment.method == "psi"
    found = sl_queue.run_local(job.replace(epochs=1, batch_size=16), files)
    assert set(found.history[-1]["holdout"]) == {"loss", "auroc", "accuracy"}


def test_tables_are_found_from_the_files_wherever_the_command_was_given(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_tables(tmp_path / "raw")
    (tmp_path / "there").mkdir()
    there = tmp_path / "there" / "bank.csv"  # of a table that is at both places, the one beside the files
    there.write_bytes((tmp_path / "raw" / "bank.csv").read_bytes())
    done = run(
        "init", "../there", *PARTIES, "--party", f"post:{there}:customer", "--label", "claim", cwd=tmp_path / "raw"
    )
    assert done.returncode == 0, done.stderr
    paths = {name: PartyFile.load(there.with_name(f"{name}.toml")).data.path for name in ("insurer", "bank", "post")}
    assert paths["insurer"] is not None
    assert paths["insurer"].resolve() == tmp_path / "raw" / "insurer.parquet"
    assert paths["bank"] == there and paths["post"] == there


@pytest.mark.parametrize(("task", "loss", "outputs"), [("multiclass", "cross_entropy", 5), ("regression", "mse", 1)])
def test_each_task_has_its_loss_and_its_outputs(tmp_path: Path, task: str, loss: str, outputs: int) -> None:
    done = run("init", tmp_path / "x", *PARTIES, "--label", "y", "--task", task, "--classes", 5, "--same-ids")
    assert done.returncode == 0, done.stderr
    file = PartyFile.load(tmp_path / "x/insurer.toml")
    assert file.fuse is not None and file.fuse.loss == loss and file.fuse.args["outputs"] == outputs
    assert Job.load(tmp_path / "x/job.toml").alignment.method == "equal"


def test_a_regression_learns_numbers_as_they_are_once_its_model_is_told_their_scale(tmp_path: Path) -> None:
    done = run("init", tmp_path / "x", *PARTIES, "--label", "y", "--task", "regression", "--same-ids")
    assert done.returncode == 0, done.stderr
    draw = np.random.default_rng(3)
    columns = {"insurer": draw.normal(size=(400, 2)), "bank": draw.normal(size=(400, 3))}
    labels = 3500.0 + 800.0 * (columns["bank"][:, 0] + columns["insurer"][:, 1])
    job = Job.load(tmp_path / "x/job.toml").replace(epochs=30, batch_size=32)

    def mae(*scale: float) -> float:
        files = [PartyFile.load(tmp_path / "x" / f"{name}.toml") for name in columns]
        fuse = dict(files[0].fuse or {})
        fuse["args"] = {**fuse["args"], **dict(zip(("mean", "deviation"), scale, strict=False))}
        given = {"insurer": labels, "bank": None}
        with_rows = [f.replace(data=Rows(np.arange(400), columns[f.party], given[f.party])) for f in files]
        with_rows[0] = with_rows[0].replace(fuse=fuse)
        return float(sl_queue.run_local(job, with_rows).history[-1]["holdout"]["mae"])

    assert mae(float(labels.mean()), float(labels.std())) < 300 < 3000 < mae()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "which tables? give --party NAME:TABLE:ID"),
        (PARTIES, "which column holds the labels?"),
        ((*PARTIES[:2], "--label", "y"), "at least two parties"),
        (("--party", "a:b", "--label", "y"), "it must be NAME:TABLE:ID"),
        ((*PARTIES, "--party", "a b:t.csv:i", "--label", "y"), "is no name of a party"),
        ((*PARTIES, "--party", "job:t.csv:i", "--label", "y"), "a party 'job' would have the job's file, job.toml"),
        ((*PARTIES, "--party", "scheduler:t.csv:i", "--label", "y"), "no party may be called 'scheduler', 'operator'"),
        ((*PARTIES, "--name", "a b", "--label", "y"), "name = 'a b'; it must be a name of letters"),
        ((*PARTIES, "--label", "customer"), "insurer.toml: data names a column more than once"),
    ],
)
def test_what_is_missing_or_wrong_is_named_and_nothing_is_written(
    tmp_path: Path, words: tuple[str, ...], why: str
) -> None:
    done = run("init", tmp_path / "x", *words)
    assert done.returncode == 2 and why in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_folder_whose_name_no_job_has_needs_another_one(tmp_path: Path) -> None:
    done = run("init", tmp_path / "Prüfung", *PARTIES, "--label", "y")
    assert done.returncode == 2 and "name = 'Prüfung'; it must be" in done.stderr
    assert "nothing is written; give another --name" in done.stderr and not (tmp_path / "Prüfung").exists()
    done = run("init", tmp_path / "Prüfung", *PARTIES, "--label", "y\t\x7f\u0085ü", "--name", "audit")
    assert done.returncode == 0, done.stderr
    assert Job.load(tmp_path / "Prüfung/job.toml").name == "audit"
    assert PartyFile.load(tmp_path / "Prüfung/insurer.toml").data.label == "y\t\x7f\u0085ü"  # type: ignore[union-attr]


def test_files_that_are_there_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "bank.toml").write_text("mine")
    done = run("init", tmp_path, *PARTIES, "--label", "y")
    assert done.returncode == 2 and "is there already" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bank.toml"]


def test_at_a_terminal_it_asks(tmp_path: Path) -> None:
    mine, theirs = pty.openpty()
    answers = ["insurer", "i.parquet", "id", "claim", "bank", "b.csv", "", "", "regression"]
    process = subprocess.Popen(
        [COMMAND, "init", str(tmp_path / "asked")], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment(),
    )  # fmt: skip
    os.write(mine, "".join(f"{answer}\n" for answer in answers).encode())
    said, _ = process.communicate(timeout=300)
    os.close(theirs)
    os.close(mine)
    assert process.returncode == 0, said
    bank = PartyFile.load(tmp_path / "asked/bank.toml")
    assert bank.data.id == "id" and str(bank.data.path).endswith("b.csv")  # type: ignore[union-attr]
    assert PartyFile.load(tmp_path / "asked/insurer.toml").fuse.loss == "mse"  # type: ignore[union-attr]

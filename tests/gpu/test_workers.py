"""Workers on a GPU, each a process of its own: killed equals undisturbed, and `check` says that split equals joined."""

import re
from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest

from tests.support.credit import edit, write_credit
from tests.support.crew import FILES, write_job
from tests.support.everything import use_everything
from tests.support.forked import sl_queue


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Write a job of which both parties compute on the GPU, with all that a recovery has to bring back."""
    job = write_job(tmp_path)
    use_everything(tmp_path, micro_batches=2)
    paths = [tmp_path / name for name in FILES]
    for path in paths:
        path.write_text('device = "cuda"\n' + path.read_text())
    return [job, *paths]


def test_killed_workers_and_a_killed_broker_change_no_bit(files: list[Path]) -> None:
    run = sl_queue(
        "chaos", *files, "--kills", "3", "--broker-restarts", "1", "--cuts", "1", "--seed", "5", timeout_s=580.0
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": equal\n") == 3
    assert re.search(r"^passed: .*3 x SIGKILL", run.stdout, re.MULTILINE)


def test_check_finds_split_and_joined_equal(files: list[Path]) -> None:
    done = sl_queue("check", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all weights are equal bit for bit" in done.stdout
    compared = sl_queue("compare", *files)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "joined in one process: weights differ by at most 0 " in compared.stdout


def test_a_model_trained_on_a_gpu_predicts_there_and_on_a_cpu(tmp_path: Path) -> None:
    job, data = write_credit(tmp_path), {"bank.toml": "bank.parquet", "insurer.toml": "insurer.csv"}
    for name, table in data.items():
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(f'device = "cuda"\n{text}\n[predict]\npath = "{table}"\n')
    edit(tmp_path / "insurer.toml", "[predict]\n", '[predict]\nout = "predictions.csv"\n')
    paths = [job, *(tmp_path / name for name in data)]
    trained = sl_queue("local", *paths)
    assert trained.returncode == 0, trained.stderr

    def predicted() -> list[float]:
        done = sl_queue("predict", *paths)
        assert done.returncode == 0, done.stdout + done.stderr
        found: list[float] = pyarrow.csv.read_csv(tmp_path / "predictions.csv")["probability"].to_pylist()
        return found

    first = predicted()
    assert predicted() == first
    for name in data:
        edit(tmp_path / name, 'device = "cuda"', 'device = "cpu"')
    assert np.allclose(predicted(), first, atol=1e-5)

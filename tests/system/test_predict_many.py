"""Many rows are predicted in parts, in memory that hardly grows with their number."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.support.credit import FILES, write_credit
from tests.system.test_cli import COMMAND, environment, sl_queue

FEW, MANY = 600, 60_000
MOST_GROWTH_MB = 80  # tables and predictions are 5 MB, read and written as a whole; activations alone would be 35

_PEAK = """import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.stderr[-2000:])
"""


def peak_mb(folder: Path, rows: int) -> float:
    """Predict so many rows in a process of its own; return the most memory that it has held."""
    rng = np.random.default_rng(1)
    ids = np.arange(10**6, 10**6 + rows)
    columns = {"bank": ["age", "income", "balance"], "insurer": ["claims", "mileage"]}
    for party, names in columns.items():
        order = rng.permutation(rows)
        table = {"customer_id": ids[order]} | {name: rng.standard_normal(rows) for name in names}
        pa.parquet.write_table(pa.table(table), folder / f"{party}-{rows}.parquet")
        text = (folder / f"{party}.toml").read_text()
        (folder / f"{party}-{rows}.toml").write_text(f'{text}\n[predict]\npath = "{party}-{rows}.parquet"\n')
    files = [folder / "job.toml", *(folder / f"{party}-{rows}.toml" for party in columns)]
    command = [sys.executable, "-c", _PEAK, str(COMMAND), "predict", *map(str, files)]
    told = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout
    code, peak, *said = told.split(maxsplit=2)
    assert code == "0", said
    assert len(pa.parquet.read_table(folder / "predictions.parquet")) == rows
    return int(peak) / 1024 if sys.platform.startswith("linux") else int(peak) / 2**20


@pytest.mark.timeout(300)
def test_a_hundred_times_as_many_rows_take_hardly_more_memory(tmp_path: Path) -> None:
    job = write_credit(tmp_path)
    assert sl_queue("local", job, *(tmp_path / name for name in FILES)).returncode == 0
    few = peak_mb(tmp_path, FEW)
    assert few > 50, "the peak was not measured"
    assert peak_mb(tmp_path, MANY) - few < MOST_GROWTH_MB

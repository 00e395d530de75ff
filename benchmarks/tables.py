"""A party's table: how much memory reading it takes, and what training from a file costs when memory is short.

Each table is read in a process of its own, whose peak is told against what it held before, as a multiple of the
table's numbers in float32. What is mapped from a file is not counted: it is the system's to keep or to drop.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from benchmarks import goals, processes
from benchmarks.report import machine, table

ROWS, QUICK_ROWS, COLUMNS = 2_000_000, 100_000, 50
MOST_MEMORY = 1.5  # of the float32 table
LEAST_SPEED = 0.8  # of training from memory
PART = 100_000  # rows that are written at a time
BATCH, STEPS = 512, 2000


def write(path: Path, rows: int) -> None:
    """Write a table of made-up numbers with ids in no order, a part at a time."""
    rng = np.random.default_rng(7)
    ids = rng.permutation(np.arange(10_000_000, 10_000_000 + rows))
    schema = pa.schema([("id", pa.int64()), *((f"x{place}", pa.float64()) for place in range(COLUMNS))])
    opened: Callable[..., Any] = pa.csv.CSVWriter if path.suffix == ".csv" else pa.parquet.ParquetWriter
    with opened(str(path), schema) as writer:
        for first in range(0, rows, PART):
            own = ids[first : first + PART]
            numbers = [np.round(rng.standard_normal(len(own)) * 100, 2) for _ in range(COLUMNS)]
            writer.write_table(pa.table([own, *numbers], schema=schema))


def peak_of(path: str, features: bool, mapped: str | None = None) -> dict[str, float]:
    """Read a table in this process; returns its peak, in bytes and as a multiple of the numbers, and the seconds."""
    from sl_queue.data.feature_specs import Number
    from sl_queue.data.spec import FileSpec, TableSpec
    from sl_queue.data.table import read_table
    from sl_queue.config.user_code import Importer

    declared = {"*": Number()} if features else None
    data = FileSpec(Path(path), ("id",), map_to=None if mapped is None else Path(mapped))
    spec = TableSpec("bank", data, True, False, 7, Importer().within(None), declared)
    _forget_peak()
    before, began = _anonymous(), time.monotonic()
    found = read_table(spec)
    seconds, peak = time.monotonic() - began, _peak() - before
    assert found.features is not None
    return {"seconds": seconds, "bytes": peak, "ratio": peak / (found.n_rows * COLUMNS * 4)}


def _forget_peak() -> None:
    """Begin anew with the peak of this process."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _anonymous() -> int:
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")

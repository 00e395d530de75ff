"""A party's table: how much memory reading it takes, and what training from a file costs when memory is short.

Each table is read in a process of its own, whose peak beyond what it held before is given as a multiple of the
table's numbers in float32. What is mapped from a file is not counted: it is the system's to keep or to drop.
"""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from benchmarks import goals, processes
from benchmarks.report import table

if TYPE_CHECKING:
    from sl_queue.config.job import Job
    from sl_queue.config.party import PartyFile

ROWS, QUICK_ROWS, COLUMNS = 2_000_000, 100_000, 50
WIDTHS = (300, 1000)  # of tables of as many numbers, read without [features]
MOST_MEMORY = 1.5  # of the float32 table
LEAST_SPEED = 0.8  # of training from memory
PART = 20_000  # rows that are written at a time
BATCH, LIMIT_S = 512, 1800.0
WIDE, WIDE_ROWS, QUICK_WIDE_ROWS = 400, 250_000, 50_000  # of the table that is larger than memory
STACK_BYTES = 2**20  # of a thread, which the limit counts


def write(path: Path, rows: int, columns: int = COLUMNS) -> None:
    """Write a table of made-up numbers with ids in no order, a part at a time."""
    rng = np.random.default_rng(7)
    ids = rng.permutation(np.arange(10_000_000, 10_000_000 + rows))
    schema = pa.schema([("id", pa.int64()), *((f"x{place}", pa.float64()) for place in range(columns))])
    opened: Callable[..., Any] = pa.csv.CSVWriter if path.suffix == ".csv" else pa.parquet.ParquetWriter
    with opened(str(path), schema) as writer:
        for first in range(0, rows, PART):
            own = ids[first : first + PART]
            numbers = [np.round(rng.standard_normal(len(own)) * 100, 2) for _ in range(columns)]
            writer.write_table(pa.table([own, *numbers], schema=schema))


def peak_of(path: str, features: bool, columns: int) -> dict[str, float]:
    """Read a table as a worker does, in this process, with [features] or without.

    Returns its peak as a multiple of the numbers in float32, and the seconds that it took, by the clock and of CPUs.
    """
    from sl_queue.data.table import read_table

    small = Path(path).with_name(f"small{Path(path).suffix}")
    read_table(_spec(small, features), narrow=True)  # so that libraries are loaded, which are no part of a table
    Path("/proc/self/clear_refs").write_text("5")  # begin anew with the peak
    before, began, computed = _status("VmRSS:"), time.monotonic(), time.process_time()
    found = read_table(_spec(Path(path), features), narrow=True)
    ratio = (_status("VmHWM:") - before) / (found.n_rows * columns * 4)
    return {"seconds": time.monotonic() - began, "cpu": time.process_time() - computed, "ratio": ratio}


def _spec(path: Path, features: bool) -> Any:
    from sl_queue.config.user_code import Importer
    from sl_queue.data.feature_specs import Number
    from sl_queue.data.spec import FileSpec, TableSpec

    code = Importer().within(None)
    return TableSpec("bank", FileSpec(path, ("id",)), True, False, 7, code, {"*": Number()} if features else None)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def speed_of(path: str, mapped: bool, limited: bool) -> dict[str, float]:
    """Train on a table in this process; returns the rows a second once its table is there, of the clock and of CPUs.

    Both are those of the median step, which says little of other load. `limited`: besides what the process has
    before, it may take half of what the numbers take, for all that it needs (RLIMIT_DATA, which counts memory but no
    file that is mapped).
    """
    from sl_queue.compute.threads import limit_threads
    from sl_queue.local.threads import run_local

    limit_threads(1)
    threading.stack_size(STACK_BYTES)
    rows = pa.parquet.read_metadata(path).num_rows
    marks = list[tuple[float, float]]()
    run_local(*_trained_on("warm", Path(path).with_name("small.parquet"), mapped, marks))
    marks.clear()
    if limited:
        most = _status("VmData:") + rows * WIDE * 4 // 2
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with TemporaryDirectory(prefix="sl_queue-tables-", dir=Path(path).parent) as out:
        try:
            run_local(*_trained_on("tables", Path(path), mapped, marks), out=out)
        except BaseException as error:
            if not limited or mapped:
                raise
            return {"failed": 1.0, "speed": 0.0, "cpu_speed": 0.0, "error": hash(type(error))}
    steps = np.diff(np.array(marks[len(marks) // 10 :]), axis=0)  # the first ones warm up
    return {
        "failed": 0.0,
        "speed": BATCH / float(np.median(steps[:, 0])),
        "cpu_speed": BATCH / float(np.median(steps[:, 1])),
    }


def _trained_on(name: str, path: Path, mapped: bool, marks: list[tuple[float, float]]) -> "tuple[Job, list[PartyFile]]":
    """Return one epoch on a table, which marks when each forward pass begins."""
    import torch

    from sl_queue.config.job import Job
    from sl_queue.config.party import PartyFile
    from sl_queue.data.spec import Rows

    class Base(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            marks.append((time.monotonic(), time.process_time()))
            return super().forward(input)

    ids = np.sort(pa.parquet.read_table(path, columns=["id"])["id"].to_numpy())
    sgd = {"name": "sgd", "lr": 0.01}
    job = Job(
        name=name, seed=7, epochs=1, batch_size=BATCH, pipeline={"checkpoint_every": 10**6},
        parties={"bank": {"role": "feature", "cut": [16]}, "insurer": {"role": "label"}},
    )  # fmt: skip
    bank = PartyFile(
        party="bank", data={"path": path, "id": "id", "mapped": mapped}, features={"*": {"kind": "number"}},
        base={"model": Base, "args": {"in_features": WIDE, "out_features": 16}, "optimizer": sgd},
    )  # fmt: skip
    fuse = {"model": Fuse, "optimizer": sgd, "loss": "bce_with_logits"}
    labels = Rows(ids, labels=(ids % 7 < 3).astype(np.float32))
    return job, [bank, PartyFile(party="insurer", data=labels, fuse=fuse)]


class Fuse:
    """The label holder's part of the model, made when it is asked for: only a child process loads torch."""

    def __new__(cls) -> Any:
        import torch

        class _Fuse(torch.nn.Linear):
            def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
                return super().forward(inputs[0]).squeeze(1)

        return _Fuse(16, 1)


def run(quick: bool) -> Iterator[str]:
    """Measure all of it; yields the parts of the report."""
    rows, wide = (QUICK_ROWS, QUICK_WIDE_ROWS) if quick else (ROWS, WIDE_ROWS)
    with TemporaryDirectory(prefix="sl_queue-tables-") as folder:
        read = _reading(Path(folder), rows)
        cells = [
            (kind, f"{columns:,}", "with" if features else "without", *_told(one))
            for (kind, columns, features), one in read.items()
        ]
        head = (
            "file",
            "columns",
            "[features]",
            "peak, of the size of the numbers in float32",
            "seconds",
            "CPU seconds",
        )
        yield f"### Reading {rows * COLUMNS:,} numbers\n\n{table(head, cells)}"
        memory, short, mapped = _training(Path(folder), wide)
        share = mapped["cpu_speed"] / memory["cpu_speed"]
        ways: list[tuple[str, ...]] = [
            ("in memory, without a limit", *_speeds(memory), "1"),
            ("in memory, limited", *_speeds(short), ""),
            ("mapped, limited", *_speeds(mapped), f"{share:.2f}"),
        ]
        told = (
            f"{wide:,} rows of {WIDE} columns; the limit (RLIMIT_DATA) is half of what their numbers take. Both that "
            "train do so at the same time."
        )
        titles = ("numbers", "rows/s", "rows a CPU second", "of memory")
        yield f"### Training on a table of twice the memory\n\n{told}\n\n{table(titles, ways)}"
        yield goals.listed(_goals(read, share))


def _reading(folder: Path, rows: int) -> dict[tuple[str, int, bool], dict[str, float]]:
    found = {}
    for kind, columns in product(("csv", "parquet"), (COLUMNS, *WIDTHS)):
        small, large = folder / f"small.{kind}", folder / f"large.{kind}"
        write(small, 1000, columns)
        write(large, rows * COLUMNS // columns, columns)
        for features in (True, False) if columns == COLUMNS else (False,):
            work: processes.Work = (peak_of, (str(large), features, columns))
            found[kind, columns, features] = processes.together({"read": work}, LIMIT_S)["read"]
        large.unlink()
        small.unlink()
    return found


def _told(one: dict[str, float]) -> tuple[str, str, str]:
    return f"{one['ratio']:.2f}", f"{one['seconds']:.1f}", f"{one['cpu']:.1f}"


def _speeds(one: dict[str, float]) -> tuple[str, str]:
    if one["failed"]:
        return "out of memory", ""
    return f"{one['speed']:,.0f}", f"{one['cpu_speed']:,.0f}"


def _training(folder: Path, rows: int) -> list[dict[str, float]]:
    write(folder / "small.parquet", 1000, WIDE)
    write(folder / "wide.parquet", rows, WIDE)
    path = str(folder / "wide.parquet")
    works: dict[str, processes.Work] = {
        "memory": (speed_of, (path, False, False)),
        "mapped": (speed_of, (path, True, True)),
    }
    found = processes.together(works, LIMIT_S)
    short = processes.together({"short": (speed_of, (path, False, True))}, LIMIT_S)["short"]
    return [found["memory"], short, found["mapped"]]


def _goals(read: Any, share: float) -> Iterator[str]:
    for (kind, columns, features), one in read.items():
        how = "with" if features else "without"
        yield goals.line(f"peak of reading {columns:,} columns of {kind} {how} [features]", one["ratio"], MOST_MEMORY)
    yield goals.line("rows a CPU second of a mapped table, to those in memory", share, LEAST_SPEED, at_least=True)

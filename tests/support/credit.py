"""The example's bank and insurer in a folder of a test's own, with small tables, to be spoiled at will."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

EXAMPLE = Path(__file__).parents[2] / "examples" / "numbers"
ROWS = 200
FILES = ("bank.toml", "insurer.toml")


def write_credit(folder: Path, rows: int = ROWS) -> Path:
    """Job, party files and models of the example, and made-up tables; returns the job file."""
    for name in ("job.toml", "bank.toml", "insurer.toml", "bank.py", "insurer.py"):
        shutil.copy(EXAMPLE / name, folder)
    random = np.random.default_rng(0)
    bank, insurer = random.standard_normal((3, rows)), random.standard_normal((2, rows))
    labels = (bank[0] + insurer[0] > 0).astype(np.int64)
    write_bank(folder, {"customer_id": np.arange(rows), "age": bank[0], "income": bank[1], "balance": bank[2]})
    columns = {"customer_id": np.arange(rows), "claims": insurer[0], "mileage": insurer[1], "defaulted": labels}
    write_insurer(folder, columns)
    return folder / "job.toml"


def write_bank(folder: Path, columns: dict[str, object]) -> None:
    pa.parquet.write_table(pa.table(columns), folder / "bank.parquet")


def write_insurer(folder: Path, columns: dict[str, object]) -> None:
    pa.csv.write_csv(pa.table(columns), folder / "insurer.csv")


def edit(path: Path, old: str, new: str) -> None:
    """Replace what must be there."""
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new))


def bank_columns(folder: Path) -> dict[str, object]:
    """Read the bank's table, to change and write again."""
    table = pa.parquet.read_table(folder / "bank.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}

"""Reading the columns of a CSV or Parquet file that a party file selects, and no others.

Arrow's own errors may quote a row, so their text is not shown.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sl_queue.declared import nearest
from sl_queue.errors import JobError
from sl_queue.party_file import DataFile

_BLOCK_BYTES = 2**24  # of a CSV file; Arrow needs a whole row in one, and some tables have very many columns
_MANY = 20  # columns that an error lists


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What was read of a file, in its order."""

    ids: Any = field(repr=False)  # an Arrow array of any type
    ids_are_csv: bool  # text of which nobody said whether it means numbers
    names: tuple[str, ...]  # of the features
    features: npt.NDArray[Any] | None = field(repr=False)  # (rows, columns)
    labels: npt.NDArray[Any] | None = field(repr=False)  # (rows,)


def read_columns(data: DataFile, where: str, *, features: bool, labels: bool) -> Columns:
    """Ids, and features and labels if they are asked for. Raises JobError that begins with `where`."""
    assert data.path is not None
    assert data.id is not None
    is_csv = data.path.suffix.lower() == ".csv"
    if not is_csv and data.path.suffix.lower() != ".parquet":
        raise JobError(f"{where}: the name of a table ends in .csv or .parquet; for anything else use data.source")
    try:
        known = _names_in_csv(data.path) if is_csv else list(pa.parquet.read_schema(data.path).names)
        wanted = _features(data, known, where) if features else []
        label = [data.label] if labels and data.label is not None else []
        selected = [data.id, *wanted, *label]
        _require(selected, known, where)
        table = _read_csv(data.path, data.id, selected, where) if is_csv else _read_parquet(data.path, selected)
    except FileNotFoundError:
        raise JobError(f"{where}: there is no such file") from None
    except (OSError, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        kind = "comma-separated UTF-8 text with a header" if is_csv else "a Parquet file"
        raise JobError(f"{where}: cannot be read ({reason}); is it {kind}?") from None
    columns = {name: _plain(table[name]) for name in (*wanted, *label)}
    _require_numbers({name: columns[name].type for name in wanted}, where)
    if label and not _is_number(columns[label[0]].type):
        raise JobError(f"{where}: {_text_labels(label[0], columns[label[0]].type)}")
    _require_no_gaps(columns, where)
    return Columns(
        table[data.id].combine_chunks(),
        is_csv,
        tuple(wanted),
        _side_by_side([columns[name] for name in wanted]) if wanted else None,
        columns[label[0]].to_numpy() if label else None,
    )


def _features(data: DataFile, known: Sequence[str], where: str) -> list[str]:
    """The names of the feature columns."""
    if data.features is not None:
        return data.features
    others = [name for name in known if name not in (data.id, data.label)]
    found = [name for name in others if not name.startswith("__index_level_")]  # pandas writes its row numbers so
    if not found and data.id in known:
        raise JobError(f"{where}: there are no features: no column besides those of id and label")
    return found


def _require(selected: Sequence[str], known: list[str], where: str) -> None:
    counts = Counter(known)
    for name in selected:
        if counts[name] > 1:
            raise JobError(f"{where}: {counts[name]} columns are called {name!r}; rename them")
        if counts[name] == 0:
            there = listed(map(repr, known)) or "none"
            raise JobError(f"{where}: there is no column {name!r}; {nearest(name, known)}its columns are {there}")


# Reading --------------------------------------------------------------------------------------------------------


def _names_in_csv(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(filter(None, csv.reader(file)), [])


def _read_csv(path: Path, id_column: str, selected: list[str], where: str) -> Any:
    bad_rows: list[str] = []

    def skip(_: Any) -> str:
        bad_rows.append("skip")
        return bad_rows[-1]

    table = pa.csv.read_csv(
        path,
        pa.csv.ReadOptions(block_size=_BLOCK_BYTES),
        pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        # Ids stay text, so that "001" does not become 1.
        pa.csv.ConvertOptions(include_columns=selected, column_types={id_column: pa.string()}),
    )
    if bad_rows:
        raise JobError(f"{where}: {len(bad_rows)} rows have more or fewer fields than the header")
    return table


def _read_parquet(path: Path, selected: list[str]) -> Any:
    with pa.parquet.ParquetFile(path) as file:
        return file.read(columns=selected)


# From Arrow to NumPy --------------------------------------------------------------------------------------------


def _plain(column: Any) -> Any:
    """A column without encodings that NumPy does not know."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.float64()) if pa.types.is_decimal(column.type) else column


def _is_number(kind: Any) -> bool:
    """Also a column without any value: that one is complained about as empty."""
    types = pa.types
    return any(is_a(kind) for is_a in (types.is_integer, types.is_floating, types.is_boolean, types.is_null))


def _require_numbers(kinds: dict[str, Any], where: str) -> None:
    others = [f"{name!r} ({_kind(kind)})" for name, kind in kinds.items() if not _is_number(kind)]
    if others:
        raise JobError(
            f"{where}: features must be numbers, these columns are not: {listed(others)}; encode them as numbers, "
            "or list only the others as data.features"
        )


def _text_labels(name: str, kind: Any) -> str:
    return f"label column {name!r} holds {_kind(kind)}; write labels as numbers, classes as 0, 1, 2, ..."


def _require_no_gaps(columns: dict[str, Any], where: str) -> None:
    gaps = [f"{name!r} in {c.null_count} of {len(c)} rows" for name, c in columns.items() if c.null_count]
    if gaps:
        raise JobError(f"{where}: values are missing in column {listed(gaps)}; fill them or leave them out")


def _side_by_side(columns: Sequence[Any]) -> npt.NDArray[Any]:
    """(rows, columns), float64 if any column is, else float32."""
    wide = any(pa.types.is_float64(column.type) for column in columns)
    matrix = np.empty((len(columns[0]), len(columns)), np.float64 if wide else np.float32)
    for position, column in enumerate(columns):
        matrix[:, position] = column.to_numpy()
    return matrix


def _kind(kind: Any) -> str:
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else str(kind)


def listed(names: Iterable[str]) -> str:
    """A few of many names, as an error shows them."""
    found = list(names)
    more = f" and {len(found) - _MANY} more" if len(found) > _MANY else ""
    return ", ".join(found[:_MANY]) + more

"""Reading the columns of a CSV or Parquet file that a party file selects, and no others."""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from sl_queue.data import csv_file
from sl_queue.data.faults import listed, refuse
from sl_queue.data.matrices import Array, Numbers, gaps, label_array, matrix, plain
from sl_queue.data.spec import FileSpec
from sl_queue.errors import JobError
from sl_queue.protocol.text import nearest

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_NAMELESS = re.compile(r"\s*|Unnamed: \d+(_level_\d+)?(\.\d+)?|__index_level_\d+__")  # as pandas, R and others write


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The part of a file that a party trains on, in the file's order of rows; None where a fault stands for it."""

    ids: Any = field(repr=False)  # an Arrow array of any type
    ids_are_csv: bool  # text that may mean whole numbers
    names: tuple[str, ...]  # of the features
    features: Array | None = field(repr=False)  # (rows, columns)
    labels: Array | None = field(repr=False)  # (rows,)
    notes: tuple[str, ...]  # what a person should know of a table that can be trained on
    faults: tuple[str, ...]  # what is wrong with it


@dataclass(frozen=True, slots=True)
class _Selection:
    """The columns to read, by what they are for."""

    ids: str
    features: tuple[str, ...]
    labels: str | None
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [self.ids, *self.features, *([] if self.labels is None else [self.labels])]


def read_columns(data: FileSpec, where: str, *, features: bool, labels: bool) -> Columns:
    """Read ids, and features and labels if they are asked for; all faults that can be seen are returned.

    Raises JobError that begins with `where` if nothing can be read.
    """
    assert data.path is not None
    is_csv = data.path.suffix.lower() == ".csv"
    if not is_csv and data.path.suffix.lower() != ".parquet":
        raise JobError(f"{where}: the name of a table ends in .csv or .parquet; for anything else use data.source")
    try:
        return _read(data, data.path, where, is_csv=is_csv, features=features, labels=labels)
    except FileNotFoundError:
        raise JobError(f"{where}: there is no such file") from None
    except (OSError, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        kind = "comma-separated UTF-8 text with a header" if is_csv else "a Parquet file"
        raise JobError(f"{where}: cannot be read ({reason}); is it {kind}?") from None


def _read(data: FileSpec, path: Path, where: str, *, is_csv: bool, features: bool, labels: bool) -> Columns:
    if is_csv and (fault := csv_file.quote_fault(path)):  # before names are read: an open quote makes rows a name
        refuse(where, [fault])
    known = csv_file.names_in(path) if is_csv else list(pa.parquet.read_schema(path).names)
    selection = _selected(data, known, features=features, labels=labels)
    faults = list(_about_names(selection.names, known))
    if features and not selection.features and data.id in known:
        faults.append("there are no features: no column besides those of id and label")
    readable = [name for name in selection.names if known.count(name) == 1]
    if not readable:
        refuse(where, faults)
    ids = selection.ids if selection.ids in readable else None
    table, bad_rows = csv_file.read(path, ids, readable) if is_csv else (_parquet(path, readable), [])
    columns = {name: plain(table[name]) for name in readable if name != ids}
    faults += [*bad_rows, *(_rounded(path, columns) if is_csv and not bad_rows else [])]
    found = _numbers(selection, columns)
    return Columns(
        None if ids is None else table[ids].combine_chunks(),
        is_csv,
        selection.features,
        found.features.array,
        found.labels,
        (*selection.notes, *found.features.notes),
        (*faults, *found.faults),
    )


def _parquet(path: Path, selected: list[str]) -> Any:
    with pa.parquet.ParquetFile(path) as file:
        return file.read(columns=selected)


# Names ----------------------------------------------------------------------------------------------------------


def _selected(data: FileSpec, known: Sequence[str], *, features: bool, labels: bool) -> _Selection:
    assert data.id is not None
    wanted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if features and data.features is not None:
        wanted = tuple(data.features)
    elif features:
        others = [(i, name) for i, name in enumerate(known, 1) if name not in (data.id, data.label)]
        nameless = [(i, name) for i, name in others if _NAMELESS.fullmatch(name)]
        wanted = tuple(dict.fromkeys(name for _, name in others if not _NAMELESS.fullmatch(name)))
        if nameless:
            notes = (_left_out(nameless),)
    return _Selection(data.id, wanted, data.label if labels else None, notes)


def _left_out(columns: Sequence[tuple[int, str]]) -> str:
    several = len(columns) > 1
    told = listed(f"{name!r} (column {position})" for position, name in columns)
    return (
        f"left out {told}: without a name of {'their' if several else 'its'} own, {'they are' if several else 'it is'} "
        "most likely the row numbers of the program that wrote the file; to train on such a column, name it in "
        "data.features"
    )


def _about_names(selected: Sequence[str], known: list[str]) -> Iterator[str]:
    counts = Counter(known)
    for name in selected:
        if counts[name] > 1:
            yield f"{counts[name]} columns are called {name!r}; rename them"
        elif counts[name] == 0:
            there = f"its columns are {_told(known)}{_separator(known)}"
            yield f"there is no column {name!r}; {nearest(name, known)}{there}"


def _told(known: list[str]) -> str:
    """List the names of columns, without numbers and further lines: a file without a header has rows there."""
    names = [name.partition("\n")[0] for name in known if not _NUMBER.fullmatch(name)]
    numbers = len(known) - len(names)
    if not numbers:
        return listed(map(repr, names)) or "none"
    told = [*map(repr, names), f"{numbers} whose names are numbers"]
    return f"{listed(told)}; is its first line a header?"


def _separator(known: list[str]) -> str:
    """Advise on a header that was written with another separator."""
    found = [told for sign, told in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")) if sign in "".join(known[:1])]
    return f"; is it separated by {found[0]}? write it with commas" if found and len(known) == 1 else ""


# Values ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    features: Numbers
    labels: Array | None
    faults: tuple[str, ...]


def _numbers(selection: _Selection, columns: dict[str, Any]) -> _Found:
    """Make arrays of Arrow columns, and say what is wrong with them."""
    own = {name: columns[name] for name in selection.features if name in columns}
    features = matrix(own, "list only the others as data.features") if own else Numbers(None)
    faults = list(features.faults)
    labels = None
    if selection.labels in columns:
        column, where = columns[selection.labels], f"label column {selection.labels!r}"
        labels, wrong = label_array(column, where)
        faults += wrong
    return _Found(features, labels, (*faults, *gaps(columns)))


def _rounded(path: Path, columns: dict[str, Any]) -> Iterator[str]:
    found = csv_file.rounded_when_read(path, columns)
    if found:
        told = listed(f"{name!r} in {count} rows" for name, count in found.items())
        yield (
            f"whole numbers of column {told} need more than 64 bits, or more than 53 bits beside fractions, and would "
            "be rounded; if they are codes, number them 0, 1, 2, ..., else write them as fractions"
        )

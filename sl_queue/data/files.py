"""Files of several kinds, read alike: the names of their columns, and some of these as Arrow."""

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet

from sl_queue.data import csv_columns, csv_file, csv_text, row_files
from sl_queue.data.faults import listed
from sl_queue.data.later import Later
from sl_queue.data.spec import CsvSpec, FileKind, FileSpec
from sl_queue.errors import JobError

_ENDINGS: Mapping[str, FileKind] = {
    ".csv": "csv",
    ".csv.gz": "csv",
    ".tsv": "csv",
    ".tsv.gz": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".svmlight": "svmlight",
    ".libsvm": "svmlight",
}
DESCRIBED: Mapping[FileKind, str] = {
    "csv": "comma-separated UTF-8 text with a header",
    "parquet": "a Parquet file",
    "arrow": "an Arrow file",
    "svmlight": "text with rows like `id label 3:0.5 7:1`",
    "tag:value": "text with rows like `id,tag:value,tag:value`",
}
WITH_TEXT = ("csv", "svmlight", "tag:value")


class Unlike(Exception):
    """Files that are no table together; the message names columns, types and files."""


class Source(Protocol):
    """A table in a file, or in several."""

    ids_are_text: bool  # which may mean whole numbers
    leaves_zeros_out: bool  # a column that is 0 in every row is not there

    def fault(self) -> str | None:
        """Say what makes it unreadable as it was meant."""

    def names(self) -> list[str]:
        """Read the names of its columns."""

    def read(self, selected: Sequence[str], texts: Sequence[str]) -> tuple[Any, list[str]]:
        """Read these columns as an Arrow table, `texts` among them as text where the file does not say, and faults."""

    def later(self, selected: Sequence[str], texts: Sequence[str]) -> Later | None:
        """Return these columns to be read one at a time; None if this file cannot be read so."""

    def rounded(self, columns: Mapping[str, Any]) -> dict[str, int]:
        """Count the whole numbers that reading has rounded, by column."""


def kind_of(data: FileSpec, where: str) -> FileKind:
    """Return what kind of file a party's table is. Raises JobError if neither its name nor its party says so."""
    assert data.path is not None
    if data.format is not None:
        return data.format
    name = data.path.name.lower()
    for ending, kind in _ENDINGS.items():
        if name.endswith(ending):
            return kind
    if data.path.is_dir():
        return "parquet"
    raise JobError(
        f"{where}: the name of a table ends in .csv or .parquet (also .csv.gz, .tsv, .arrow); say data.format for one "
        "that does not, and for anything else use data.source"
    )


@contextmanager
def opened(data: FileSpec, path: Path, kind: FileKind) -> Iterator[Source]:
    """Open a table. What is read of it raises OSError, UnicodeError, ArrowException, csv_text.DAMAGED, Unlike."""
    match kind:
        case "csv":
            dialect = data.csv
            if ".tsv" in path.suffixes and not dialect.delimiter_given:
                dialect = replace(dialect, delimiter="\t")
            with csv_text.plain(path, dialect) as text:
                yield _Csv(text, dialect)
        case "parquet":
            yield _Parquet(path)
        case "arrow":
            with pa.memory_map(str(path)) as mapped:
                yield _Arrow(pa.ipc.open_file(mapped))
        case "svmlight" | "tag:value":
            with csv_text.plain(path, data.csv) as text:
                yield row_files.RowFile(text, kind, data.csv.delimiter)


@dataclass(frozen=True, slots=True)
class _Csv:
    path: Path
    dialect: CsvSpec
    ids_are_text, leaves_zeros_out = True, False

    def fault(self) -> str | None:
        return csv_file.quote_fault(self.path, self.dialect.delimiter)

    def names(self) -> list[str]:
        return csv_file.names_in(self.path, self.dialect.delimiter)

    def read(self, selected: Sequence[str], texts: Sequence[str]) -> tuple[Any, list[str]]:
        return csv_file.read(self.path, texts, selected, self.dialect)

    def later(self, selected: Sequence[str], texts: Sequence[str]) -> Later | None:
        return csv_columns.later(self.path, texts, selected, self.dialect)

    def rounded(self, columns: Mapping[str, Any]) -> dict[str, int]:
        return csv_file.rounded_when_read(self.path, columns, self.dialect)


@dataclass(frozen=True, slots=True)
class _Parquet:
    """A Parquet file, or a folder of them with the same columns, in the order of their names."""

    path: Path
    ids_are_text, leaves_zeros_out = False, False

    @property
    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        found = sorted(self.path.rglob("*.parquet"))
        if not found:
            raise OSError(errno.ENODATA, "a folder without .parquet files")
        return found

    def fault(self) -> str | None:
        first, *others = (pa.parquet.read_schema(path) for path in self._files)
        differing = sum(set(schema.names) != set(first.names) for schema in others)
        return f"{differing} of its files have other columns than the first" if differing else None

    def names(self) -> list[str]:
        return list(pa.parquet.read_schema(self._files[0]).names)

    def read(self, selected: Sequence[str], texts: Sequence[str]) -> tuple[Any, list[str]]:
        return self._read(selected, {}), []

    def later(self, selected: Sequence[str], texts: Sequence[str]) -> Later | None:
        footers = {path: pa.parquet.read_metadata(path) for path in self._files}  # once: a wide file's is long
        return Later(tuple(selected), lambda name: self._read([name], footers)[name])

    def _read(self, selected: Sequence[str], footers: Mapping[Path, Any]) -> Any:
        tables = []
        for path in self._files:
            footer = footers.get(path)
            with pa.parquet.ParquetFile(path, memory_map=True, pre_buffer=False, metadata=footer) as file:
                tables.append(file.read(columns=list(selected), use_threads=len(selected) > 1))
        try:
            return pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException:
            raise Unlike(self._unlike(tables)) from None

    def _unlike(self, tables: Sequence[Any]) -> str:
        """Say which columns have types of which Arrow makes none that holds the values of all files."""
        names, found = [str(path.relative_to(self.path)) for path in self._files], []
        for name in tables[0].column_names:
            try:
                pa.concat_tables([table.select([name]) for table in tables], promote_options="permissive")
            except pa.ArrowException:
                types: dict[Any, str] = {}
                for table, file in zip(tables, names, strict=True):
                    types.setdefault(table.schema.field(name).type, file)
                found.append(f"column {name!r} is {' and '.join(f'{kind} in {file}' for kind, file in types.items())}")
        return f"{listed(found)}; write a column as one type in all files, or leave it out"

    def rounded(self, columns: Mapping[str, Any]) -> dict[str, int]:
        return {}


@dataclass(frozen=True, slots=True)
class _Arrow:
    """An Arrow file, mapped into memory."""

    file: Any
    ids_are_text, leaves_zeros_out = False, False

    def fault(self) -> str | None:
        return None

    def names(self) -> list[str]:
        return list(self.file.schema.names)

    def read(self, selected: Sequence[str], texts: Sequence[str]) -> tuple[Any, list[str]]:
        return self.file.read_all().select(list(selected)), []

    def later(self, selected: Sequence[str], texts: Sequence[str]) -> Later | None:
        return None  # it is mapped into memory, and read as it is used

    def rounded(self, columns: Mapping[str, Any]) -> dict[str, int]:
        return {}

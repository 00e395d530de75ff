"""Columns of a CSV file, written a block at a time to files of a few columns each, and read from there one at a time.

Arrow finds out the type of a column from its first block. Where a later block does not fit, the column is taken as the
next type that Arrow would try, and the file is read again: so that each column has the type that reading the file as a
whole would give it.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from sl_queue.data import csv_file
from sl_queue.data.later import Later, TemporaryFolder
from sl_queue.data.spec import CsvSpec

_BLOCK_BYTES = 2**21  # of several that Arrow reads ahead
_FILES = 64  # that are open at once
_READINGS = 12  # after which the file is read as a whole
_MISFIT = re.compile(r"In CSV column #(\d+): (?:Row #\d+: )?CSV conversion error to ")
_NEXT = {
    pa.null(): pa.int64(),
    pa.int64(): pa.bool_(),
    pa.bool_(): pa.date32(),
    pa.date32(): pa.time32("s"),
    pa.time32("s"): pa.timestamp("s"),
    pa.timestamp("s"): pa.timestamp("ns"),
    pa.timestamp("ns"): pa.float64(),
    pa.float64(): pa.string(),
}


def later(path: Path, texts: Sequence[str], selected: Sequence[str], dialect: CsvSpec) -> Later | None:
    """Write these columns to temporary files, and return them to be read from there.

    None for a file that must be read as a whole to count its faults.
    """
    types: dict[str, Any] = dict.fromkeys(texts, pa.string())
    readings = 0
    while readings < _READINGS:
        folder = TemporaryFolder()
        misfit = _written(path, selected, types, dialect, folder.path)
        if misfit is None:
            load = partial(_loaded, folder.path, tuple(selected), dialect, tuple(texts))
            return Later(tuple(selected), load, folder)
        folder.remove()
        if misfit.name in texts or misfit.type not in _NEXT:
            return None
        types[misfit.name] = _NEXT[misfit.type]
        readings += not misfit.at_once
    return None


@dataclass(frozen=True, slots=True)
class _Misfit:
    """A column of another type than it seemed; without a name, what makes a file unreadable so."""

    name: str = ""
    type: Any = None  # that it seemed to have
    at_once: bool = False  # in the first block


def _written(
    path: Path, selected: Sequence[str], types: Mapping[str, Any], dialect: CsvSpec, folder: Path
) -> _Misfit | None:
    """Write the columns; returns what keeps it from that, or None. Raises UnicodeError."""
    options = csv_file.options(dialect, selected, types, block=_BLOCK_BYTES)
    schema: Any = None
    try:
        with ExitStack() as stack:
            reader = stack.enter_context(pa.csv.open_csv(path, **options))
            schema = reader.schema
            csv_file.require_text(schema)
            writers = [
                stack.enter_context(_writer(stack, folder / str(place), schema, names))
                for place, names in enumerate(_groups(selected))
            ]
            for batch in reader:
                for writer, names in zip(writers, _groups(selected), strict=True):
                    writer.write_batch(batch.select(names))
    except pa.ArrowInvalid as error:
        found = _MISFIT.match(str(error))
        if found is None:
            return _Misfit()
        name = csv_file.names_in(path, dialect.delimiter)[int(found[1])]
        return _Misfit(name, types.get(name), True) if schema is None else _Misfit(name, schema.field(name).type)
    return None


def _writer(stack: ExitStack, path: Path, schema: Any, names: Sequence[str]) -> Any:
    file = stack.enter_context(pa.OSFile(str(path), "wb"))
    return pa.ipc.new_file(file, pa.schema([schema.field(name) for name in names]))


def _groups(selected: Sequence[str]) -> list[list[str]]:
    """Deal the columns out to files, neighbours to one."""
    width = -(-len(selected) // _FILES)
    return [list(selected[first : first + width]) for first in range(0, len(selected), width)]


def _loaded(folder: Path, selected: tuple[str, ...], dialect: CsvSpec, texts: tuple[str, ...], name: str) -> Any:
    width = -(-len(selected) // _FILES)
    place = folder / str(selected.index(name) // width)
    with pa.OSFile(str(place)) as file:  # not mapped: pages of other columns would count as memory too
        table = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(use_threads=False)).read_all()
    return csv_file.cleaned(table.select([name]), dialect, texts)[name]

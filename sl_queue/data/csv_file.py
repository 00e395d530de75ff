"""Reading a CSV file, and finding the faults that would otherwise move values into other rows or columns.

Arrow's own errors may quote a row, so their text is not shown. No Python callback is given to Arrow's thread pool: a
pool thread that still holds one when the interpreter ends aborts the process. Only a file that was refused is read
once more, in this thread, to count its bad rows.
"""

import csv
import math
import mmap
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from sl_queue.protocol.exactness import BITS

_BLOCK_BYTES = 2**24  # Arrow needs a whole row in one block, and some tables have very many columns
_SCANNED_BYTES = 2**19  # at a time, for quotes: a few arrays of as many bytes fit into a processor's cache
_BAD_ROW = re.compile(r"Expected \d+ columns, got \d+")
_BOM = b"\xef\xbb\xbf"
_QUOTE = ord('"')
_BESIDE_QUOTES = np.zeros(256, np.bool_)  # the bytes that may stand before an opening and after a closing quote
_BESIDE_QUOTES[[_QUOTE, *b",\r\n"]] = True
_OPENING = re.compile(rb'[,\r\n]"')
_TO_CLOSING = re.compile(rb'[^"]*+(?:""[^"]*+)*+"')  # from behind an opening quote
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_DECIMAL_COMMA = r"^\s*[+-]?(\d*|\d{1,3}(\.\d{3})+),\d+\s*$"
_WHOLE = r"^\s*[+-]?\d{16,300}\s*$"  # shorter ones are exact in float64


def names_in(path: Path) -> list[str]:
    """Read the names of the columns, without a byte order mark and after empty lines."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(filter(None, csv.reader(file)), [])


def read(path: Path, id_column: str | None, selected: Sequence[str]) -> tuple[Any, list[str]]:
    """Read these columns as an Arrow table, and say which faults the rows have; rows of another length are left out.

    Ids stay text, so that "001" does not become 1. Raises OSError and ArrowException.
    """
    types = {} if id_column is None else {id_column: pa.string()}
    convert = pa.csv.ConvertOptions(include_columns=list(selected), column_types=types)
    try:
        return pa.csv.read_csv(path, _reading(threads=True), _parsing(), convert), []
    except pa.ArrowInvalid as error:
        if not _BAD_ROW.search(str(error)):
            raise
    numbers: list[int] = []

    def skip(row: Any) -> str:
        numbers.append(row.number)
        return "skip"

    table = pa.csv.read_csv(path, _reading(threads=False), _parsing(skip), convert)
    first = f", the first of them is row {numbers[0]} of the file" if numbers else ""
    return table, [f"{len(numbers)} rows have more or fewer fields than the header{first}"]


def _reading(*, threads: bool) -> Any:
    return pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=threads)


def _parsing(bad_row: Any = None) -> Any:
    return pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=bad_row)


# Quotes ---------------------------------------------------------------------------------------------------------


def quote_fault(path: Path) -> str | None:
    """Say where a quote opens a value that swallows the rows below it; None if none does."""
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b'"') < 0 or _is_regular(content):
                return None
            return _swallowing(content)


def _is_regular(content: mmap.mmap) -> bool:
    """Return True if every other quote opens a value and every other one closes it; one pass over the bytes."""
    count, end, start = 0, len(content), content.find(b'"')
    while 0 <= start < end:
        stop = min(start + _SCANNED_BYTES, end)
        before = b"," if _starts(content, start) else content[start - 1 : start]
        block = np.frombuffer(before + content[start : stop + 1] + b"\n", np.uint8)
        at = np.flatnonzero(block[1 : stop - start + 1] == _QUOTE) + 1
        opening, closing = at[count % 2 :: 2], at[1 - count % 2 :: 2]
        if not (_BESIDE_QUOTES[block[opening - 1]].all() and _BESIDE_QUOTES[block[closing + 1]].all()):
            return False
        count += len(at)
        start = content.find(b'"', stop)
    return count % 2 == 0


def _starts(content: mmap.mmap, position: int) -> bool:
    return position == (len(_BOM) if content[: len(_BOM)] == _BOM else 0)


def _swallowing(content: mmap.mmap) -> str | None:
    """Walk from quote to quote as a reader of the file does; a quote inside of a value without quotes means itself."""
    start = len(_BOM) if content[: len(_BOM)] == _BOM else 0
    opened = start + 1 if content[start : start + 1] == b'"' else _next_opening(content, start)
    while opened is not None:
        closed = _TO_CLOSING.match(content, opened)
        if closed is None:
            return _said(content, opened, "never closes")
        behind = content[closed.end() : closed.end() + 1]
        if behind not in (b"", b",", b"\r", b"\n") and b"\n" in closed[0]:
            return _said(content, opened, "closes in another line, in the middle of a value")
        opened = _next_opening(content, closed.end())
    return None


def _next_opening(content: mmap.mmap, position: int) -> int | None:
    """Return the position behind the next quote that opens a value."""
    found = _OPENING.search(content, position)
    return None if found is None else found.end()


def _said(content: mmap.mmap, opened: int, how: str) -> str:
    line = 1
    for start in range(0, opened, _BLOCK_BYTES):
        line += content[start : min(start + _BLOCK_BYTES, opened)].count(b"\n")
    return (
        f'line {line}: a quote (") opens a value there and {how}, so the rows below would be taken as its text; '
        'close the quote, or write "" inside of quotes where a quote is meant'
    )


# Values that were not read as what they are ---------------------------------------------------------------------


def text_kind(column: Any) -> str:
    """Say which text a column holds that should hold numbers: decimal commas, or a few values that are not numbers."""
    column = column.filter(pc.is_valid(column))
    numbers = _matching(column, _NUMBER)
    commas = _matching(column, _DECIMAL_COMMA)
    if commas and numbers + commas == len(column):
        return "text: numbers with a decimal comma; write a decimal point"
    if numbers:
        return f"text: {len(column) - numbers} of {len(column)} values are not numbers"
    return "text"


def _matching(column: Any, pattern: str) -> int:
    return pc.sum(pc.match_substring_regex(column, pattern)).as_py() or 0


def rounded_when_read(path: Path, columns: Mapping[str, Any]) -> dict[str, int]:
    """Count the whole numbers that Arrow has rounded because their column became float64, by column."""
    large = [name for name, column in columns.items() if pa.types.is_float64(column.type) and _is_large(column)]
    if not large:
        return {}
    convert = pa.csv.ConvertOptions(include_columns=large, column_types=dict.fromkeys(large, pa.string()))
    texts = pa.csv.read_csv(path, _reading(threads=True), _parsing(), convert)
    found = {}
    for name in large:
        whole = texts[name].filter(pc.match_substring_regex(texts[name], _WHOLE)).to_pylist()
        found[name] = sum(math.isfinite(float(text)) and int(text) != int(float(text)) for text in whole)
    return {name: count for name, count in found.items() if count}


def _is_large(column: Any) -> bool:
    extremes = pc.min_max(column).as_py()
    found = [abs(value) for value in extremes.values() if value is not None]
    return bool(found) and max(found) >= 2 ** BITS["float64"]

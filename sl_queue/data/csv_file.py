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
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from sl_queue.data.spec import CsvSpec
from sl_queue.protocol.exactness import BITS
from sl_queue.protocol.text import counted

COMMAS = CsvSpec()

_BLOCK_BYTES = 2**24  # Arrow needs a whole row in one block, and some tables have very many columns
_SCANNED_BYTES = 2**19  # at a time, for quotes: a few arrays of as many bytes fit into a processor's cache
_BAD_ROW = re.compile(r"Expected \d+ columns, got \d+")
_BOM = b"\xef\xbb\xbf"
_QUOTE = ord('"')
_TO_CLOSING = re.compile(rb'[^"]*+(?:""[^"]*+)*+"')  # from behind an opening quote
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_DECIMAL_COMMA = r"^\s*[+-]?(\d*|\d{1,3}(\.\d{3})+),\d+\s*$"
_MARKS, _LONGEST_MARK, _LEAST_ROWS = 3, 12, 3  # texts that stand for a gap: how many, characters, rows of each
_GAPS = pa.array(pa.csv.ConvertOptions().null_values)
_WHOLE = r"^\s*[+-]?\d{16,300}\s*$"  # shorter ones are exact in float64


def names_in(path: Path, delimiter: str = ",") -> list[str]:
    """Read the names of the columns, without a byte order mark and after empty lines."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(filter(None, csv.reader(file, delimiter=delimiter)), [])


def read(path: Path, texts: Sequence[str], selected: Sequence[str], dialect: CsvSpec = COMMAS) -> tuple[Any, list[str]]:
    """Read these columns as an Arrow table, and say which faults the rows have; rows of another length are left out.

    Those among `texts` stay text, ids for instance, so that "001" does not become 1. Raises OSError, UnicodeError,
    ArrowException.
    """
    convert = _converting(dialect, selected, dict.fromkeys(texts, pa.string()))
    delimiter = dialect.delimiter
    try:
        return cleaned(pa.csv.read_csv(path, _reading(threads=True), _parsing(delimiter), convert), dialect, texts), []
    except pa.ArrowInvalid as error:
        if not _BAD_ROW.search(str(error)):
            raise
    numbers: list[int] = []

    def skip(row: Any) -> str:
        numbers.append(row.number)
        return "skip"

    table = pa.csv.read_csv(path, _reading(threads=False), _parsing(delimiter, skip), convert)
    first = f", the first of them is row {numbers[0]} of the file" if numbers else ""
    faults = [f"{counted(len(numbers), 'row has', 'rows have')} more or fewer fields than the header{first}"]
    return cleaned(table, dialect, texts), faults


def options(dialect: CsvSpec, selected: Sequence[str], types: Mapping[str, Any], *, block: int) -> dict[str, Any]:
    """Return how Arrow is to read these columns in blocks of so many bytes."""
    reading, parsing = _reading(threads=True, block=block), _parsing(dialect.delimiter)
    return {
        "read_options": reading,
        "parse_options": parsing,
        "convert_options": _converting(dialect, selected, types),
    }


def _reading(*, threads: bool, block: int = _BLOCK_BYTES) -> Any:
    return pa.csv.ReadOptions(block_size=block, use_threads=threads)


def _parsing(delimiter: str, bad_row: Any = None) -> Any:
    return pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=bad_row)


def _converting(dialect: CsvSpec, selected: Sequence[str], types: Mapping[str, Any]) -> Any:
    convert = pa.csv.ConvertOptions(include_columns=list(selected), column_types=dict(types))
    convert.decimal_point = dialect.decimal
    if dialect.missing:
        convert.null_values = [*convert.null_values, *dialect.missing]
    return convert


def require_text(schema: Any) -> None:
    """Raise UnicodeError for a column that Arrow takes for bytes, since it is not all UTF-8."""
    if any(pa.types.is_binary(column.type) for column in schema):
        raise UnicodeError("not all of it is UTF-8")


def cleaned(table: Any, dialect: CsvSpec, texts: Sequence[str]) -> Any:
    """Make gaps of the texts that stand for one, and numbers of those in groups. Raises UnicodeError."""
    require_text(table.schema)
    for place, name in enumerate(table.column_names):
        column = table[name]
        if dialect.missing and pa.types.is_string(column.type):
            gap = pc.is_in(column, pa.array(dialect.missing, pa.string()))
            table = table.set_column(place, name, pc.if_else(gap, pa.scalar(None, pa.string()), column))
    return _grouped(table, dialect, texts)


def without_gaps(column: Any) -> Any:
    """Make gaps of the texts that stand for one among numbers; anything but text stays what it is."""
    if not pa.types.is_string(column.type):
        return column
    return pc.if_else(pc.is_in(column, _GAPS), pa.scalar(None, pa.string()), column)


def _grouped(table: Any, dialect: CsvSpec, texts: Sequence[str]) -> Any:
    """Make numbers of columns whose thousands are written in groups, like 1.234,5; other text stays what it is."""
    if not dialect.thousands:
        return table
    sign, point = re.escape(dialect.thousands), re.escape(dialect.decimal)
    number = rf"^\s*[+-]?(\d{{1,3}}({sign}\d{{3}})+|\d+)({point}\d*)?\s*$"
    for place, name in enumerate(table.column_names):
        if name in texts or not pa.types.is_string(table[name].type):
            continue
        column = without_gaps(table[name])
        if pc.all(pc.match_substring_regex(column, number)).as_py():
            bare = pc.replace_substring(pc.utf8_trim_whitespace(column), dialect.thousands, "")
            numbers = pc.replace_substring(bare, dialect.decimal, ".").cast(pa.float64())
            table = table.set_column(place, name, numbers)
    return table


# Quotes ---------------------------------------------------------------------------------------------------------


def quote_fault(path: Path, delimiter: str = ",") -> str | None:
    """Say where a quote opens a value that swallows the rows below it; None if none does."""
    sign = delimiter.encode()
    with path.open("rb") as file:
        if not _holds_a_quote(file):
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if len(sign) == 1 and _is_regular(content, sign):
                return None
            return _swallowing(content, sign)


def _holds_a_quote(file: BinaryIO) -> bool:
    """Look a block at a time: what is mapped would count as memory of this process."""
    return any(b'"' in block for block in iter(lambda: file.read(_BLOCK_BYTES), b""))


def _is_regular(content: mmap.mmap, sign: bytes) -> bool:
    """Return True if every other quote opens a value and every other one closes it; one pass over the bytes."""
    beside = np.zeros(256, np.bool_)  # the bytes that may stand before an opening and after a closing quote
    beside[[_QUOTE, *sign, *b"\r\n"]] = True
    count, end, start = 0, len(content), _quote_from(content, 0)
    while 0 <= start < end:
        stop = min(start + _SCANNED_BYTES, end)
        before = sign if _starts(content, start) else content[start - 1 : start]
        block = np.frombuffer(before + content[start : stop + 1] + b"\n", np.uint8)
        at = np.flatnonzero(block[1 : stop - start + 1] == _QUOTE) + 1
        opening, closing = at[count % 2 :: 2], at[1 - count % 2 :: 2]
        if not (beside[block[opening - 1]].all() and beside[block[closing + 1]].all()):
            return False
        count += len(at)
        start = _quote_from(content, stop)
    return count % 2 == 0


def _quote_from(content: mmap.mmap, position: int) -> int:
    """Find the next quote, -1 if there is none; what was looked at no longer counts as memory of this process."""
    for first in range(position, len(content), _BLOCK_BYTES):
        found = content.find(b'"', first, first + _BLOCK_BYTES)
        if found >= 0:
            return found
        content.madvise(mmap.MADV_DONTNEED)
    return -1


def _starts(content: mmap.mmap, position: int) -> bool:
    return position == (len(_BOM) if content[: len(_BOM)] == _BOM else 0)


def _swallowing(content: mmap.mmap, sign: bytes) -> str | None:
    """Walk from quote to quote as a reader of the file does; a quote inside of a value without quotes means itself."""
    opening = re.compile(rb'(?:%s|[\r\n])"' % re.escape(sign))
    start = len(_BOM) if content[: len(_BOM)] == _BOM else 0
    opened = start + 1 if content[start : start + 1] == b'"' else _next(opening, content, start)
    while opened is not None:
        closed = _TO_CLOSING.match(content, opened)
        if closed is None:
            return _said(content, opened, "never closes")
        behind = content[closed.end() : closed.end() + len(sign)]
        if behind not in (b"", sign) and behind[:1] not in (b"\r", b"\n") and b"\n" in closed[0]:
            return _said(content, opened, "closes in another line, in the middle of a value")
        opened = _next(opening, content, closed.end())
    return None


def _next(opening: re.Pattern[bytes], content: mmap.mmap, position: int) -> int | None:
    """Return the position behind the next quote that opens a value."""
    found = opening.search(content, position)
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
        return 'text: numbers with a decimal comma; write a decimal point, or say data.csv.decimal = ","'
    if numbers == len(column):
        return "numbers as text; of a CSV, see data.csv.decimal and data.csv.thousands" if numbers else "text"
    if numbers:
        return f"text: {len(column) - numbers} of {len(column)} values are not numbers"
    return "text"


def marks_in(column: Any) -> list[str] | None:
    """Return the texts that may stand for a gap among numbers; None for a column that is something else.

    They are few, short, without digits and in several rows each, so none is the value of a row.
    """
    others = column.filter(pc.invert(pc.match_substring_regex(column, _NUMBER)))
    counts = {each["values"]: each["counts"] for each in others.value_counts().to_pylist()}
    few = 0 < len(counts) <= _MARKS and len(others) < len(column) / 2
    short = all(len(text) <= _LONGEST_MARK and not any(map(str.isdigit, text)) for text in counts)
    return list(counts) if few and short and min(counts.values()) >= _LEAST_ROWS else None


def _matching(column: Any, pattern: str) -> int:
    return pc.sum(pc.match_substring_regex(column, pattern)).as_py() or 0


def rounded_when_read(path: Path, columns: Mapping[str, Any], dialect: CsvSpec = COMMAS) -> dict[str, int]:
    """Count the whole numbers that Arrow has rounded because their column became float64, by column."""
    large = [name for name, column in columns.items() if pa.types.is_float64(column.type) and _is_large(column)]
    if not large:
        return {}
    convert = _converting(dialect, large, dict.fromkeys(large, pa.string()))
    texts = pa.csv.read_csv(path, _reading(threads=True), _parsing(dialect.delimiter), convert)
    found = {}
    for name in large:
        column = pc.replace_substring(texts[name], dialect.thousands, "") if dialect.thousands else texts[name]
        whole = column.filter(pc.match_substring_regex(column, _WHOLE)).to_pylist()
        found[name] = sum(math.isfinite(float(text)) and int(text) != int(float(text)) for text in whole)
    return {name: count for name, count in found.items() if count}


def _is_large(column: Any) -> bool:
    extremes = pc.min_max(column).as_py()
    found = [abs(value) for value in extremes.values() if value is not None]
    return bool(found) and max(found) >= 2 ** BITS["float64"]

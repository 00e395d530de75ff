"""Arrow columns of any type as what a feature is made of: float64 numbers, texts, or days; gaps stay gaps."""

from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data.csv_file import text_kind
from sl_queue.data.date_patterns import digits, instead, spelled_out
from sl_queue.data.encodings import plain
from sl_queue.data.matrices import is_number
from sl_queue.protocol.exactness import BITS, rounded_whole

Floats = npt.NDArray[np.float64]

EPOCH = date(1970, 1, 1)
_ISO = "%Y-%m-%d"
_WITH_TIME = r"(?s)^(.{10})\D.*$"
_WITH_OFFSET = (
    r"^(\d{4}-\d\d-\d\d)(?:[Tt]| +)(\d\d):?(\d\d)(?::?\d\d(?:[.,]\d*)?)?"
    r" ?(?:UTC|GMT)?([+-]\d\d(?::?\d\d)?)(?:\[.*\])?$"
)
_WITH_ZONE = r"^.{10}(?:[Tt]| +)\d\d(?:.*[+-]\d\d?(?::?\d\d)?|[^+-]* ?[A-Z]{3,5}|[^+-]*[A-Z][a-z]+/\w+\]?)$"
_IN_UTC = r"(?:UTC|GMT)$"


class Unusable(Exception):
    """A column that cannot become what was declared; the message has counts and no values."""


def numbers(column: Any) -> Floats:
    """Return float64, NaN for a gap. Raises Unusable for text, and for infinities."""
    column, types = plain(_whole(column)), pa.types
    if types.is_null(column.type):
        return np.full(len(column), np.nan)
    if not is_number(column.type):
        raise Unusable(f'holds no numbers ({kind_of(column)}); say kind = "category" or kind = "date", or exclude it')
    if types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values: Floats = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    if infinite := int(np.isinf(values).sum()):
        raise Unusable(f"infinity in {infinite} of {len(values)} rows; replace those values, or leave them empty")
    return values


def rounded(name: str, column: Any, written: npt.NDArray[np.float32]) -> list[str]:
    """Say how many whole numbers of a column float32 has rounded where they are written as they are."""
    bits = BITS["float32"]
    if not (np.abs(written) >= 2.0**bits).any():
        return []
    values = numbers(column)
    count = int(rounded_whole(values[~np.isnan(values)], "float32").sum())
    told = f"[features] {name}: whole numbers beyond 2**{bits} are rounded in float32 in {count} of {len(values)} rows"
    return [f'{told}; if they are codes, say kind = "category", else scale them'] if count else []


def texts(column: Any) -> Any:
    """Return large strings, null for a gap and for empty text; 7, 7.0 and "7" are one category."""
    column, types = plain(_whole(column)), pa.types
    if types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        whole = pc.all(pc.equal(pc.floor(column), column)).as_py()
        within = pc.all(pc.less(pc.abs(column), 2.0**53)).as_py()
        if whole is not False and within is not False:
            column = column.cast(pa.int64())
    try:
        found = column.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise Unusable(f"is {column.type}, which cannot be a category; exclude it") from None
    return pc.if_else(pc.equal(found, ""), pa.scalar(None, pa.large_string()), found)


def days(column: Any, pattern: str | None) -> Any:
    """Return dates as date32, null for a gap; text is read by `pattern`, or as ISO 8601. Raises Unusable."""
    column, types = plain(_whole(column)), pa.types
    if types.is_date(column.type) or types.is_timestamp(column.type):
        return column.cast(pa.date32(), safe=False)
    if types.is_null(column.type):
        return column.cast(pa.date32())
    if pattern is not None and types.is_integer(column.type):  # 20260131
        column = column.cast(pa.string())
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        raise Unusable(f'is {kind_of(column)}, not dates; say kind = "number", or write dates like 2026-01-31')
    column = pc.utf8_trim_whitespace(column.cast(pa.string()))
    column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    form = _ISO if pattern is None else spelled_out(pattern)
    if pattern is None:
        require_offsets(column)
        told = pc.replace_substring_regex(column, _WITH_TIME, r"\1")
    else:
        told = pc.utf8_lpad(column, digits(form), "0")
    read = _read(told, form)
    unread = read.null_count - column.null_count or _carried_over(told, read, form)
    if unread:
        like = "like 2026-01-31" if pattern is None else f"of the form {pattern!r}"
        remedy = 'give their form: format = "%d.%m.%Y"' if pattern is None else "correct them, or leave them empty"
        if read.null_count == column.null_count:
            remedy = "no month has such a day: correct them, or leave them empty"
        elif pattern is not None and _read(column, _ISO).null_count == column.null_count:
            remedy = "they are written like 2026-01-31: leave format out"
        elif pattern is not None and read.null_count == len(read):
            remedy = "no row is, so correct the format: 31012026 is %d%m%Y, 31.01.2026 is %d.%m.%Y"
        raise Unusable(f"{unread} of {len(column)} values are not dates {like}; {remedy}")
    found = read.cast(pa.date32(), safe=False)
    return pc.coalesce(days_in_utc(column), found) if pattern is None else found


def days_in_utc(column: Any) -> Any:
    """Return as date32 the day in UTC of each text that is a time in ISO 8601 with an offset, null for any other."""
    told = pc.replace_substring_regex(column, _WITH_OFFSET, r"\1 \2:\3\4")
    return _read(told, "%Y-%m-%d %H:%M%z").cast(pa.date32(), safe=False)


def require_offsets(column: Any) -> None:
    """Raise Unusable for times in ISO 8601 with a zone that is neither UTC nor an offset like +02:00."""
    known = pc.or_(*(pc.match_substring_regex(column, each) for each in (_WITH_OFFSET, _IN_UTC)))
    others = pc.and_not(pc.match_substring_regex(column, _WITH_ZONE), known)
    if count := pc.sum(others).as_py():
        told = "have a zone that is no offset like +02:00; write it so, or leave it out"
        raise Unusable(f"{count} of {len(column)} times {told}")


def _carried_over(column: Any, read: Any, form: str) -> int:
    """Count the days that no month has, 30 February for instance, of which the C library makes days of the next.

    The same text is read as a day of January, without its zone: that day must be the same. A day 366 and a week 53 that
    the year does not have become days years later.
    """
    local = read if "%z" not in form else _read(column, instead(form, {"z": "%Z"}))
    wrong = pc.not_equal(pc.day(local), pc.day(_read(column, instead(form, {"m": "%I", "z": "%Z"}))))
    if "%j" in form:
        wrong = pc.or_(wrong, pc.and_(_says_366(column, form), pc.not_equal(pc.day_of_year(local), 366)))
    if "%U" in form or "%W" in form:
        first_day = _read(column, instead(form, {"U": "%S", "W": "%S", "z": "%Z"}))
        wrong = pc.or_(wrong, pc.not_equal(pc.year(local), pc.year(first_day)))
    return pc.sum(wrong).as_py() or 0


def _says_366(column: Any, form: str) -> Any:
    """Return where a text names the day 366, told by the first year of a century: it has that day, or is left by it."""
    found = _read(column, instead(form, {"Y": "%C%g", "y": "%g" if "%C" in form else "%C", "z": "%Z"}))
    centuries = pc.multiply(pc.divide(pc.year(found), 100), 100)
    return pc.or_(pc.not_equal(pc.year(found), centuries), pc.equal(pc.day_of_year(found), 366))


def _read(column: Any, form: str) -> Any:
    return pc.strptime(column, format=form, unit="s", error_is_null=True)


def part(dates: Any, name: str, at: date | None) -> Floats:
    """Return one part of dates as float64, NaN for a gap; an age counts days up to `at`."""
    if name == "age":
        assert at is not None
        values: Floats = dates.cast(pa.int32()).cast(pa.float64()).to_numpy(zero_copy_only=False)
        return float((at - EPOCH).days) - values
    read = {"year": pc.year, "month": pc.month, "day": pc.day, "weekday": pc.day_of_week}[name]
    found: Floats = read(dates).cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    return found


def kind_of(column: Any) -> str:
    """Name what a column holds, for people."""
    types = pa.types
    if any(is_a(column.type) for is_a in (types.is_string, types.is_large_string, types.is_string_view)):
        return text_kind(column.cast(pa.large_string()))
    if types.is_date(column.type) or types.is_timestamp(column.type):
        return "dates"
    return str(column.type)


def _whole(column: Any) -> Any:
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

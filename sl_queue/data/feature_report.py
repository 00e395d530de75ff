"""Report of what [features] makes of a table, and a first [features] for one that has none; never a row."""

import json
from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data.csv_file import marks_in, text_kind
from sl_queue.data.faults import listed
from sl_queue.data.feature_values import EPOCH, Unusable, days, kind_of, numbers, texts
from sl_queue.data.features import Fitted, Learned, pieces
from sl_queue.protocol.text import counted

_SHOWN = 12  # categories that a line names
_CODE = 20  # different whole numbers, up to which they may be a code
_OWN_VALUE = 0.5  # share of rows with a value of their own, from which text says nothing
_RARE = 20


def describe(fitted: Fitted) -> Iterator[str]:
    """Yield a line for each raw column: its gaps, what was learned of it, and the columns that come out."""
    come, rows = counted(len(fitted.names), "column comes", "columns come"), counted(fitted.rows, "row", "rows")
    yield f"{come} out of {len(fitted.columns)}, fitted on {rows.replace('row', 'training row')}"
    for column, learned, names in pieces(fitted):
        out = names[0] if len(names) == 1 else f"{len(names)} columns" if len(names) > 6 else ", ".join(names)
        yield f"  {column}: {_told(learned)} -> {out}"


def _told(learned: Learned) -> str:
    match learned["kind"]:
        case "category":
            return _of_category(learned)
        case "date":
            return f"date, {'; '.join(f'{name} {_of_number(of)}' for name, of in learned['parts'].items())}"
        case _:
            return f"number, {_of_number(learned)}"


def _of_number(learned: Learned) -> str:
    fill = "" if learned["fill"] is None else f" (filled with {learned['missing']} {learned['fill']:.6g})"
    gaps = f"{counted(learned['gaps'], 'gap', 'gaps')}{fill}"
    match learned["scale"]:
        case "standard":
            return f"{gaps}, mean {learned['mean']:.6g}, standard deviation {learned['std']:.6g}"
        case "minmax":
            return f"{gaps}, from {learned['low']:.6g} to {learned['high']:.6g}"
        case "quantile":
            return f"{gaps}, ranks by {len(learned['at'])} knots"
        case _:
            return f"{gaps}, as it is"


def _of_category(learned: Learned) -> str:
    each = sorted(zip(learned["counts"], learned["categories"], strict=True), reverse=True)
    named = ", ".join(f"{category} {count}" for count, category in each[:_SHOWN])
    more = f" and {len(each) - _SHOWN} more" if len(each) > _SHOWN else ""
    swallowed = len(learned["rare"])
    rare = f"; rare = {learned['least']} made {swallowed} more one" if swallowed else ""
    gaps, categories = counted(learned["gaps"], "gap", "gaps"), counted(len(each), "category", "categories")
    return f"category ({learned['encode']}), {gaps}, {categories}: {named}{more}{rare}"


# A first [features] ---------------------------------------------------------------------------------------------


def propose(columns: Mapping[str, Any]) -> str:
    """Write a [features] table in TOML for raw Arrow columns, for a person to look through."""
    lines = [_line(name, column) for name, column in columns.items()]
    width = max((len(text) for text, _ in lines), default=0)
    told = [f"{text:{width}}  # {remark}".rstrip(" #") if remark else text for text, remark in lines]
    return "\n".join(["[features]  # a proposal from the table: look through every line", *told, ""])


def _line(name: str, column: Any) -> tuple[str, str]:
    key = name if name.isascii() and name.replace("_", "a").replace("-", "a").isalnum() else _quoted(name)
    gaps = f"{column.null_count} of {len(column)} rows are empty" if column.null_count else ""
    types = pa.types
    if types.is_date(column.type) or types.is_timestamp(column.type):
        return _date_line(key, days(column, None), "")
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        try:
            return _number_line(key, column, gaps)
        except Unusable:
            return f"# {key} is {kind_of(column)}:", "leave it out with data.exclude"
    for pattern in (None, "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%Y/%m/%d"):
        try:
            return _date_line(key, days(column, pattern), "" if pattern is None else f', format = "{pattern}"')
        except Unusable:
            continue
    return _text_line(key, column, gaps)


def _quoted(name: str) -> str:
    """Return a name as TOML takes it in quotes, readable where it is not ASCII."""
    return json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")


def _number_line(key: str, column: Any, gaps: str) -> tuple[str, str]:
    values = numbers(column)
    seen = values[~np.isnan(values)]
    if not len(seen):
        return f"# {key} is empty:", "leave it out with data.exclude"
    missing = ', missing = "median", indicator = true' if column.null_count else ""
    if seen.min() == seen.max():
        return f"# {key} has one value in all rows:", "leave it out with data.exclude"
    if set(np.unique(seen[:1000])) <= {0.0, 1.0} and set(np.unique(seen)) <= {0.0, 1.0}:
        return f'{key} = {{ kind = "number", scale = "none"{missing} }}', gaps
    scale = ', scale = "quantile"' if _is_skewed(seen) else ""
    remark = gaps
    if pa.types.is_integer(column.type) and len(np.unique(seen)) <= _CODE:
        remark = f'{gaps + "; " if gaps else ""}{len(np.unique(seen))} whole numbers: if a code, kind = "category"'
    return f'{key} = {{ kind = "number"{missing}{scale} }}', remark


def _is_skewed(seen: Any) -> bool:
    """Return True for a long tail: then ranks say more than distances."""
    half, most, nearly_all = np.quantile(seen, [0.5, 0.9, 0.999])
    return bool(nearly_all - half > 8 * (most - half) > 0)


def _date_line(key: str, dates: Any, more: str) -> tuple[str, str]:
    if dates.null_count == len(dates):
        return f"# {key} is empty:", "leave it out with data.exclude"
    after, last = pc.max(dates.cast(pa.int32())).as_py() + 1, (date.max - EPOCH).days
    at = EPOCH + timedelta(days=max((date.min - EPOCH).days, min(after, last)))
    missing = ', missing = "median"' if dates.null_count else ""
    text = f'{key} = {{ kind = "date", parts = ["year", "month", "age"], at = {at.isoformat()}{more}{missing} }}'
    if after > last:
        return text, f"some dates are {at.isoformat()} or later; if that stands for no date, empty it"
    return text, "at: the day after the latest one"


def _text_line(key: str, column: Any, gaps: str) -> tuple[str, str]:
    found = texts(column).drop_null()
    different = pc.count_distinct(found).as_py()
    if not different:
        return f"# {key} is empty:", "leave it out with data.exclude"
    if different > _CODE and (instead := _other_than_text(key, found)) is not None:
        return instead
    if different > _CODE and different > _OWN_VALUE * len(found):
        return f"# {key}: {different} different texts in {len(found)} rows:", "leave it out with data.exclude"
    rare = f", rare = {_RARE}" if len(found) >= 50 * _RARE else ""
    remark = f"{gaps + '; ' if gaps else ''}{counted(different, 'category', 'categories')}"
    return f'{key} = {{ kind = "category"{rare} }}', remark


def _other_than_text(key: str, found: Any) -> tuple[str, str] | None:
    """Return what a column of many different texts may be instead: numbers written otherwise, or beside marks for gaps.

    What may be the value of a row is not shown: a mark is short, without digits, and in several rows.
    """
    kind, instead = text_kind(found), "leave it out with data.exclude"
    if "data.csv" in kind:
        return f"# {key} is {kind}:", f"or {instead}"
    marks = marks_in(found)
    if marks is None:
        return None
    told = f"# {key} is numbers but for {listed(map(repr, marks))}:"
    csv = f"csv = {{ missing = [{', '.join(map(_quoted, marks))}] }}"
    return told, f"if that stands for a gap, write {csv} under [data], or empty those fields; else {instead}"

"""Ids of one type in canonical order: ascending, numbers by value and text by its UTF-8 bytes.

Ids of different types are different ids, so that a number never passes for its text by chance. `data.id_type` says
which of the two they are where the files of the parties do not agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

IdType = Literal["integer", "text"]
Positions = npt.NDArray[np.int64]

_CANONICAL_INTEGER = r"^(0|-?[1-9][0-9]*)$"  # "7", but not "007"
_INTEGER = r"^\s*-?[0-9]+(\.0*)?\s*$"
_WITH_POINT = r"^-?[0-9]+\.0$"  # as pandas writes whole numbers of a column where one was missing


@dataclass(frozen=True, slots=True, eq=False)
class Ids:
    """The ids of a table in canonical order, as text."""

    texts: Any = field(repr=False)  # an Arrow array of large strings
    type: IdType
    order: Positions = field(repr=False)  # the rows of the table by ascending id
    notes: tuple[str, ...] = ()  # what a person should know of them


def canonical_ids(ids: Any, *, are_csv: bool, id_type: IdType | None) -> tuple[Ids | None, list[str]]:
    """Put ids in order, or say everything that is wrong with them.

    `are_csv`: text may mean whole numbers. `id_type`: the type to take them as; None: the one they have.
    """
    n_rows = len(ids)
    ids = _decoded(ids)
    present = _present(ids)
    faults = []
    if missing := n_rows - (pc.sum(present).as_py() or 0):
        faults.append(f"{missing} of {n_rows} rows have no id; give them one or leave them out")
        ids = ids.filter(present)
    typed, fault = _typed(ids, are_csv=are_csv, id_type=id_type)
    if typed is None:
        return None, [*faults, fault]
    order = pc.array_sort_indices(typed)
    ordered = typed.take(order)
    if repeated := pc.sum(pc.equal(ordered[1:], ordered[:-1])).as_py() or 0:
        faults.append(f"{repeated} of {n_rows} rows repeat the id of another row; each id may occur once")
    if faults:
        return None, faults
    kind: IdType = "integer" if pa.types.is_integer(typed.type) else "text"
    texts = ordered.cast(pa.large_string())
    return Ids(texts, kind, order.to_numpy().astype(np.int64), tuple(_notes(texts, id_type))), []


def _notes(texts: Any, id_type: IdType | None) -> Iterator[str]:
    if id_type is None and len(texts) and pc.all(pc.match_substring_regex(texts, _WITH_POINT)).as_py():
        yield (
            "all ids are text like 7.0, as pandas writes whole numbers where one was missing; if they are whole "
            'numbers at the other parties, say so: data.id_type = "integer"'
        )


def _decoded(ids: Any) -> Any:
    """Take off encodings; a decimal without a fraction is a whole number."""
    types = pa.types
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    if types.is_string(ids.type) or types.is_string_view(ids.type):
        return ids.cast(pa.large_string())
    if types.is_decimal(ids.type) and ids.type.scale <= 0:
        return _first_cast(ids, pa.int64(), pa.uint64()) or ids
    return ids


def _present(ids: Any) -> Any:
    """Return True for each id that is neither missing nor empty."""
    present = pc.is_valid(ids)
    if pa.types.is_large_string(ids.type):
        return pc.and_(present, pc.fill_null(pc.not_equal(ids, ""), False))
    if pa.types.is_floating(ids.type):
        return pc.and_(present, pc.fill_null(pc.invert(pc.is_nan(ids)), False))
    return present


def _typed(ids: Any, *, are_csv: bool, id_type: IdType | None) -> tuple[Any | None, str]:
    """Ids without gaps as integers or text, or what is wrong with them."""
    types = pa.types
    if types.is_large_string(ids.type):
        if id_type == "text":
            return ids, ""
        numbers = _integers(ids, _CANONICAL_INTEGER if id_type is None else _INTEGER)
        if id_type is None:
            return (ids if numbers is None or not are_csv else numbers), ""
        return (
            numbers,
            f'{_others(ids)} of {len(ids)} ids are not whole numbers of 64 bits, as data.id_type = "integer" says',
        )
    if types.is_integer(ids.type):
        return ids.cast(pa.large_string()) if id_type == "text" else ids, ""
    if types.is_floating(ids.type) and _all_whole(ids):
        return (ids.cast(pa.int64()), "") if id_type == "integer" else (None, _told(ids, _WHOLE_FLOATS))
    if types.is_binary(ids.type) or types.is_large_binary(ids.type):
        texts = _first_cast(ids, pa.large_string()) if id_type == "text" else None
        return texts, _told(ids, 'if they are UTF-8 text, say so: data.id_type = "text"')
    return None, _told(ids, "")


_WHOLE_FLOATS = (
    "all of them are whole: pandas makes whole numbers floating where one of them is missing. Write them as whole "
    'numbers (astype("int64")), or say that they are: data.id_type = "integer"'
)


def _told(ids: Any, more: str) -> str:
    return f"ids are of type {ids.type}; they must be whole numbers or text" + (f"; {more}" if more else "")


def _integers(texts: Any, pattern: str) -> Any | None:
    """Text as integers, if every one is written as the pattern says."""
    if not pc.all(pc.match_substring_regex(texts, pattern)).as_py():
        return None
    whole = pc.replace_substring_regex(pc.utf8_trim_whitespace(texts), r"\.0*$", "")
    return _first_cast(whole, pa.int64(), pa.uint64())


def _others(texts: Any) -> int:
    return len(texts) - (pc.sum(pc.match_substring_regex(texts, _INTEGER)).as_py() or 0)


def _all_whole(ids: Any) -> bool:
    exact = pc.and_(pc.equal(pc.floor(ids), ids), pc.less_equal(pc.abs(ids), 2.0**53))
    return len(ids) > 0 and bool(pc.all(exact).as_py())


def _first_cast(ids: Any, *kinds: Any) -> Any | None:
    """Cast the ids to the first of these types that holds them all."""
    for kind in kinds:
        try:
            return ids.cast(kind)
        except pa.ArrowInvalid:
            continue
    return None

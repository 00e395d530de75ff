"""Ids of one type in canonical order: ascending, numbers by value and text by its UTF-8 bytes.

Ids of different types are different ids, so that a number never passes for its text by chance. `data.id_type` says
which of the two they are where the files of the parties do not agree. UUIDs are text in their canonical form, and
several columns are one text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data.encodings import unpacked

IdType = Literal["integer", "text"]
Declared = Literal["integer", "text", "uuid"]
Positions = npt.NDArray[np.int64]

_CANONICAL_INTEGER = r"^(0|-?[1-9][0-9]*)$"  # "7", but not "007"
_INTEGER = r"^\s*-?[0-9]+(\.0*)?\s*$"
_UUID = r"^[{]?[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}[}]?$"
UNIT = "\x1f"  # between the parts of an id of several columns
_SLICE = 1000  # numbers that become text at a time
_FIRST_ROWS = 5  # that a fault names
_WITH_POINT = r"^-?[0-9]+\.0$"  # as pandas writes whole numbers of a column where one was missing


@dataclass(frozen=True, slots=True, eq=False)
class Ids:
    """The ids of a table in canonical order, as text."""

    texts: Any = field(repr=False)  # an Arrow array of large strings
    type: IdType
    order: Positions = field(repr=False)  # the rows of the table by ascending id
    notes: tuple[str, ...] = ()  # what a person should know of them

    def only(self, positions: Positions) -> "Ids":
        """Return those at these positions, which are ascending."""
        return replace(self, texts=self.texts.take(pa.array(positions)), order=self.order[positions])


def canonical_ids(
    ids: Any,
    *,
    are_csv: bool,
    id_type: Declared | None,
    normalise: Sequence[str] = (),
    duplicates: Literal["refuse", "first"] = "refuse",
) -> tuple[Ids | None, list[str]]:
    """Put ids in order, or say everything that is wrong with them.

    `ids`: one Arrow array, or a list of several that are one id together. `are_csv`: text may mean whole numbers.
    `id_type`: the type to take them as; None: the one they have. `normalise`: what is done to text, in this order.
    `duplicates`: "first" leaves out later rows of an id.
    """
    parts = [normalised(_decoded(part), normalise) for part in (ids if isinstance(ids, list) else [ids])]
    if len(parts) > 1:
        joined, fault = _composed(parts, are_csv=are_csv)
        if joined is None:
            return None, [fault]
        parts, id_type = [joined], "text"
    return _canonical(parts[0], are_csv=are_csv, id_type=id_type, duplicates=duplicates)


def readable(ids: Any) -> Any:
    """Return ids as numbers or text, which CSV holds: UUIDs that are bytes in their canonical form."""
    decoded = _decoded(ids)
    return _hexadecimal(decoded) if _are_16_bytes(decoded) else decoded


def _canonical(ids: Any, *, are_csv: bool, id_type: Declared | None, duplicates: str) -> tuple[Ids | None, list[str]]:
    """Put one array of decoded ids in order."""
    n_rows = len(ids)
    present = _present(ids)
    faults = []
    if missing := n_rows - (pc.sum(present).as_py() or 0):
        faults.append(f"{missing} of {n_rows} rows have no id; give them one or leave them out")
        ids = ids.filter(present)
    typed, fault = _typed(ids, are_csv=are_csv, id_type=id_type)
    if typed is None:
        return None, [*faults, fault]
    order = pc.array_sort_indices(typed)  # stable: of equal ids the first row comes first
    ordered = typed.take(order)
    repeats = pc.equal(ordered[1:], ordered[:-1])
    notes = []
    if repeated := pc.sum(repeats).as_py() or 0:
        told = f"{repeated} of {n_rows} rows repeat the id of another row"
        if duplicates == "refuse":
            first = _rows_of(order, repeats) if not missing else ""
            faults.append(f"{told}; each id may occur once{first}")
        else:
            notes.append(f"{told}; the first row of each id is used")
            new = pc.invert(pa.concat_arrays([pa.array([False]), repeats]))
            order, ordered = order.filter(new), ordered.filter(new)
    if faults:
        return None, faults
    kind: IdType = "integer" if pa.types.is_integer(typed.type) else "text"
    texts = _texts(ordered)
    found = (*notes, *_notes(texts, id_type))
    return Ids(texts, kind, order.to_numpy().astype(np.int64), found), []


def _texts(typed: Any) -> Any:
    """Write ids as text; few at a time, because a cast takes many times the memory of what comes of it."""
    if pa.types.is_large_string(typed.type) or not len(typed):
        return typed.cast(pa.large_string())
    firsts = range(0, len(typed), _SLICE)
    return pa.concat_arrays([typed[first : first + _SLICE].cast(pa.large_string()) for first in firsts])


def _rows_of(order: Any, repeats: Any) -> str:
    """Name the first rows that repeat an id, and what can be done."""
    rows = sorted(order[1:].filter(repeats).to_pylist())
    more = ", ..." if len(rows) > _FIRST_ROWS else ""
    told = ", ".join(str(row + 1) for row in rows[:_FIRST_ROWS])
    return (
        f" (the first that repeat one are rows {told}{more} of the table, counted from 1): aggregate the samples of an "
        'id to one row, or say data.duplicates = "first"'
    )


def normalised(ids: Any, steps: Sequence[str]) -> Any:
    """Write text ids alike, as the job says; numbers stay what they are."""
    if not pa.types.is_large_string(ids.type):
        return ids
    for step in steps:
        match step:
            case "strip":
                ids = pc.utf8_trim_whitespace(ids)
            case "nfkc":
                ids = pc.utf8_normalize(ids, form="NFKC")
            case "casefold" if pc.all(pc.string_is_ascii(ids)).as_py() is not False:
                ids = pc.utf8_lower(ids)
            case _:
                ids = pa.array((None if t is None else t.casefold() for t in ids.to_pylist()), pa.large_string())
    return ids


def _composed(parts: Sequence[Any], *, are_csv: bool) -> tuple[Any | None, str]:
    """Join the columns of an id to one text; missing if one of them is."""
    texts = []
    for place, part in enumerate(parts, 1):
        present = _present(part)
        part = pc.if_else(present, part, pa.scalar(None, part.type))
        typed, fault = _typed(part.drop_null(), are_csv=are_csv, id_type=None)
        if typed is None:
            return None, f"column {place} of the id: {fault}"
        text = part.cast(typed.type).cast(pa.large_string())
        if pc.any(pc.match_substring(text, UNIT)).as_py():
            return None, f"column {place} of the id holds the control character U+001F; remove it"
        texts.append(text)
    return pc.binary_join_element_wise(*texts, pa.scalar(UNIT, pa.large_string())), ""


def _notes(texts: Any, id_type: Declared | None) -> Iterator[str]:
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
    ids = unpacked(ids)
    if types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    if types.is_string(ids.type):
        return ids.cast(pa.large_string())
    if types.is_float16(ids.type):
        return ids.cast(pa.float32())
    if isinstance(ids, pa.ExtensionArray) and str(ids.type.extension_name) == "arrow.uuid":
        return _hexadecimal(ids.storage)
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


def _are_16_bytes(ids: Any) -> bool:
    return bool(pa.types.is_fixed_size_binary(ids.type)) and ids.type.byte_width == 16


def _hexadecimal(ids: Any) -> Any:
    """Write UUIDs of 16 bytes as text."""
    return pa.array([None if raw is None else str(UUID(bytes=raw)) for raw in ids.to_pylist()], pa.large_string())


def _uuids(ids: Any) -> tuple[Any | None, str]:
    """Write UUIDs in their canonical form, lower case with hyphens."""
    if _are_16_bytes(ids):
        return _hexadecimal(ids), ""
    if not pa.types.is_large_string(ids.type):
        return None, f'ids are of type {ids.type}; data.id_type = "uuid" takes text or 16 bytes'
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(ids))
    if wrong := len(ids) - (pc.sum(pc.match_substring_regex(lower, _UUID)).as_py() or 0):
        return None, f'{wrong} of {len(ids)} ids are not UUIDs, as data.id_type = "uuid" says'
    plain = pc.replace_substring_regex(lower, "[{}-]", "")
    cuts = ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))
    pieces = [pc.utf8_slice_codeunits(plain, start, stop) for start, stop in cuts]
    return pc.binary_join_element_wise(*pieces, pa.scalar("-", pa.large_string())), ""


def _typed(ids: Any, *, are_csv: bool, id_type: Declared | None) -> tuple[Any | None, str]:
    """Return ids without gaps as integers or text, or what is wrong with them."""
    types = pa.types
    if id_type == "uuid":
        return _uuids(ids)
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
    if _are_16_bytes(ids):
        return None, _told(ids, 'if they are UUIDs, say so: data.id_type = "uuid"')
    return None, _told(ids, "")


_WHOLE_FLOATS = (
    "all of them are whole: pandas makes whole numbers floating where one of them is missing. Write them as whole "
    'numbers (astype("int64")), or say that they are: data.id_type = "integer"'
)


def _told(ids: Any, more: str) -> str:
    return f"ids are of type {ids.type}; they must be whole numbers or text" + (f"; {more}" if more else "")


def _integers(texts: Any, pattern: str) -> Any | None:
    """Return text as integers, if every one is written as the pattern says."""
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

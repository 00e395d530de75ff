"""Ids in a request, in the form and with the keys that a table's have."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sl_queue.data.ids import UNIT, Declared, normalised
from sl_queue.data.spec import FileSpec, TableSpec

Keys = npt.NDArray[np.uint64]

_LONGEST_ID = 1000  # characters


def request_keys(
    given: Sequence[Any], id_type: str, key: bytes, spec: TableSpec | None = None
) -> tuple[Keys | None, list[int]]:
    """Return the keys of ids in a request, as `keyed_ids` makes them of a table's, or the places of unfit ids.

    `spec`: of the party's table, whose text ids are written alike as the job says, and may be of several columns.
    """
    columns = id_columns(spec)
    if columns:
        assert spec is not None
        ids = [parts_asked(one) for one in given]
        wrong = [
            place for place, parts in enumerate(ids) if len(parts) != len(columns) or not all(map(_is_part, parts))
        ]
        return (None, wrong) if wrong else (_keys(joined_ids(ids, spec.normalise), key), [])
    wrong = [place for place, one in enumerate(given) if not _is_of(one, id_type)]
    if wrong:
        return None, wrong
    if spec is not None and id_type == "text":
        declared = spec.data.id_type if isinstance(spec.data, FileSpec) else None
        given = asked_ids(given, spec.normalise, declared)
    return _keys(given, key), []


def id_columns(spec: TableSpec | None) -> tuple[str, ...]:
    """Return the names of the columns that are one id together; none if one is."""
    names = spec.data.ids if spec is not None and isinstance(spec.data, FileSpec) else ()
    return names if len(names) > 1 else ()


def _keys(ids: Sequence[Any], key: bytes) -> Keys:
    hashes = b"".join([blake2b(str(one).encode(), digest_size=8, key=key).digest() for one in ids])
    return np.frombuffer(hashes, "<u8").astype(np.uint64)


def _is_part(one: Any) -> bool:
    return _is_of(one, "integer") or _is_of(one, "text")


def _is_of(one: Any, id_type: str) -> bool:
    if isinstance(one, bool) or not isinstance(one, int | str) or len(str(one)) > _LONGEST_ID:
        return False
    if id_type == "integer":
        return isinstance(one, int)
    return isinstance(one, str) and _is_unicode(one)


def _is_unicode(text: str) -> bool:
    """Return False for half of a surrogate pair, which JSON may hold and UTF-8 may not."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def asked_ids(texts: Sequence[str], normalise: Sequence[str], id_type: Declared | None) -> list[str]:
    """Write ids that are text, as somebody asks for them, in the form in which `canonical_ids` has those of a table."""
    found: list[str] = normalised(pa.array(texts, pa.large_string()), normalise).to_pylist() if normalise else [*texts]
    return [_canonical_uuid(one) for one in found] if id_type == "uuid" else found


def parts_asked(one: Any) -> Sequence[Any]:
    """Return the parts of an id of several columns: a list has them, and text holds them as a table's does."""
    if isinstance(one, str):
        return one.split(UNIT)
    return one if isinstance(one, list) and not any(isinstance(part, str) and UNIT in part for part in one) else ()


def joined_ids(ids: Sequence[Sequence[Any]], normalise: Sequence[str]) -> list[str]:
    """Write ids of several columns, as somebody asks for them, in the form in which `canonical_ids` has a table's."""
    columns = [asked_ids([str(part) for part in column], normalise, None) for column in zip(*ids, strict=True)]
    return [UNIT.join(parts) for parts in zip(*columns, strict=True)]


def _canonical_uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        return text

"""Ids on their way to an alignment: how they are hashed and told apart, and the rows that files at hand share."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from sl_queue.data.ids import Ids, Positions
from sl_queue.data.spec import TableSpec
from sl_queue.data.table import read_ids
from sl_queue.errors import AlignmentError, JobError

_SLICE = 1000  # ids that are Python objects at a time
_LOOKED_AT = 10_000
_LONGEST = 40  # characters of a pattern


def id_texts(ids: Ids) -> Iterator[bytes]:
    """Yield every id with its type, as it is hashed: 7 and "7" are different ids."""
    kind, (ends, text) = f"{ids.type} ".encode(), _raw(ids)
    for first in range(0, len(ids.texts), _SLICE):
        places = ends[first : first + _SLICE + 1]
        part = bytes(text[places[0] : places[-1]])
        yield from (kind + part[start:end] for start, end in pairwise((places - places[0]).tolist()))


def ids_digest(ids: Ids) -> str:
    """Return a digest of all ids of a table, for its own party only."""
    found, (ends, text) = (
        blake2b(f"{ids.type} {len(ids.texts)} ".encode(), digest_size=16, person=b"sl_queue table"),
        _raw(ids),
    )
    for first in range(0, len(ids.texts), _SLICE):
        found.update(np.diff(ends[first : first + _SLICE + 1]).data)
    found.update(text[ends[0] : ends[-1]])
    return found.hexdigest()


def _raw(ids: Ids) -> tuple[npt.NDArray[np.int64], memoryview]:
    """View ids as where each begins and the last one ends, and the UTF-8 text of all."""
    _, offsets, text = ids.texts.buffers()
    ends = np.frombuffer(offsets, "<i8")[ids.texts.offset :][: len(ids.texts) + 1]
    return ends, memoryview(b"" if text is None else text)


def described(ids: Ids) -> str:
    """Say how most ids are written, without a character of one: for their own party, to compare by telephone."""
    shapes: Counter[str] = Counter(_shape(text) for text in ids.texts[:_LOOKED_AT].to_pylist())
    if not shapes:
        return "there are none"
    shape, _ = shapes.most_common(1)[0]
    kind = "whole numbers of" if ids.type == "integer" else "text of"
    return f'{kind} {len(shape)} characters ("{shape[:_LONGEST]}")'


def _shape(text: str) -> str:
    """Write d for a digit, a for a letter, and keep what separates them."""
    return re.sub(r"\d", "d", re.sub(r"[^\W\d_]", "a", re.sub(r"[^\w\-./ ]", "?", text)))


def ids_of(specs: Sequence[TableSpec]) -> Mapping[str, Ids]:
    """Read the ids of files at hand, by party. Raises JobError."""
    return {spec.party: read_ids(spec)[0] for spec in specs}


def shared_rows(ids: Mapping[str, Ids]) -> Mapping[str, Positions]:
    """Intersect ids, in the clear: positions of the shared rows of each party, ascending.

    Raises AlignmentError for ids of different types, JobError if no row is shared.
    """
    types = {party: found.type for party, found in ids.items()}
    if len(set(types.values())) > 1:
        told = ", ".join(f"{party} {kind}" for party, kind in types.items())
        raise AlignmentError(
            f'the parties\' ids are of different types: {told}; give data.id_type = "text" in all files'
        )
    masks: dict[str, Any] = {}
    for party, own in ids.items():
        present: npt.NDArray[np.bool_] = np.ones(len(own.texts), np.bool_)
        for other in ids.values():
            present &= pc.is_in(own.texts, other.texts).to_numpy(zero_copy_only=False)
        masks[party] = np.flatnonzero(present).astype(np.int64)
    if masks and not len(next(iter(masks.values()))):
        raise JobError(f"no row is shared by {', '.join(masks)}; are the ids written alike?")
    return masks

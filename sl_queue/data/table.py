"""A party's table in canonical order: ascending id, numbers by value and text by its UTF-8 bytes.

The order is the same at every party that holds the same ids, and so are the keys and the digest that are made of them.
Both come from one hash over all ids, and neither yields the other: the digest is told to the scheduler when a party
joins, the keys never leave the party. Whoever does not know all ids can compute neither.
"""

from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data.rows import Arrays, read_ids, read_rows
from sl_queue.errors import JobError
from sl_queue.job import Job
from sl_queue.party_file import DataFile, PartyFile
from sl_queue.ports import Table
from sl_queue.protocol.row_order import id_hashes, split_by_id

_CANONICAL_INTEGER = r"^(0|-?[1-9][0-9]*)$"

Positions = npt.NDArray[np.int64]


def read_table(job: Job, party_file: PartyFile) -> Table:
    """Read a party's rows and put them into canonical order. Raises JobError for everything that is wrong with them."""
    party = party_file.party
    empty = isinstance(party_file.data, DataFile) and party_file.data.features == []
    arrays = read_rows(party_file, features=job.cut(party) is not None and not empty, labels=party == job.label_holder)
    if party == job.label_holder and arrays.labels is None:
        raise JobError(f"{arrays.where}: there are no labels, and {party!r} is the label holder")
    ids, id_type = _typed(arrays)
    order, ordered = _canonical(ids, arrays.where)
    texts = _texts(ordered)
    row_keys, digest = _fingerprints(texts, pc.binary_length(ordered), id_type)
    hashes = id_hashes(texts, job.seed_of_holdout) if job.holdout else None
    features, labels = _ordered(arrays.features, order), _ordered(arrays.labels, order)
    return Table(features, labels, row_keys, digest, id_type, arrays.names, hashes)


def holdout_rows(ids: Any, seed: int, holdout: float) -> npt.NDArray[np.bool_]:
    """Say which rows a job holds out, in the order of `ids`: shape (rows,), True for held out.

    `seed` is the job's `holdout_seed`, or its `seed` if it has none. Raises JobError for ids that no table may have.
    """
    arrays = read_ids(ids, "holdout_rows")
    found, _ = _typed(arrays)
    order, ordered = _canonical(found, arrays.where)
    mask = np.zeros(len(order), np.bool_)
    mask[order[split_by_id(id_hashes(_texts(ordered), seed), holdout)[1]]] = True
    return mask


def _typed(arrays: Arrays) -> tuple[Any, str]:
    """Ids without gaps as integers or text, and which of the two."""
    ids, where = arrays.ids, arrays.where
    if pa.types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    text = any(is_a(ids.type) for is_a in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
    ids = ids.cast(pa.large_string()) if text else ids
    missing = ids.null_count + (pc.sum(pc.equal(ids, "")).as_py() or 0 if text else 0)
    if missing:
        raise JobError(f"{where}: {missing} of {len(ids)} rows have no id; give them one or leave them out")
    if text:
        numbers = _integers(ids) if arrays.ids_are_csv else None
        return (ids, "text") if numbers is None else (numbers, "integer")
    if pa.types.is_integer(ids.type):
        return ids, "integer"
    raise JobError(f"{where}: ids are of type {ids.type}; they must be whole numbers or text")


def _integers(ids: Any) -> Any | None:
    """Text as integers, if every one is written as a number would be: "7", but not "007"."""
    if not pc.all(pc.match_substring_regex(ids, _CANONICAL_INTEGER)).as_py():
        return None
    for kind in (pa.int64(), pa.uint64()):
        try:
            return ids.cast(kind)
        except pa.ArrowInvalid:
            continue
    return None


def _canonical(ids: Any, where: str) -> tuple[Positions, Any]:
    """The positions of the rows by ascending id, and the ids in that order, as text."""
    order = pc.array_sort_indices(ids)
    ordered = ids.take(order)
    repeated = pc.sum(pc.equal(ordered[1:], ordered[:-1])).as_py() or 0
    if repeated:
        raise JobError(f"{where}: {repeated} of {len(ids)} rows repeat the id of another row; each id may occur once")
    return order.to_numpy().astype(np.int64), ordered.cast(pa.large_string())


def _texts(ids: Any) -> list[bytes]:
    """Ids as text, in UTF-8."""
    found: list[bytes] = ids.cast(pa.large_binary()).to_numpy(zero_copy_only=False).tolist()
    return found


def _fingerprints(texts: list[bytes], lengths: Any, id_type: str) -> tuple[npt.NDArray[np.uint64], str]:
    """The key of every row and the digest of all, from canonical ids as text and their lengths."""
    everything = blake2b(f"{id_type} {len(texts)} ".encode())
    everything.update(lengths.to_numpy().astype("<i8").tobytes())  # so that no two lists read the same
    everything.update(b"".join(texts))
    secret = everything.digest()
    key = blake2b(secret, person=b"sl_queue row key").digest()
    keys = b"".join([blake2b(text, digest_size=8, key=key).digest() for text in texts])
    digest = blake2b(secret, digest_size=32, person=b"sl_queue digest").hexdigest()
    return np.frombuffer(keys, "<u8").astype(np.uint64), digest


def _ordered(array: npt.NDArray[Any] | None, order: Positions) -> npt.NDArray[Any] | None:
    return None if array is None else array[order]

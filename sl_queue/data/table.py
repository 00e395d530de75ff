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

from sl_queue.data.faults import refuse
from sl_queue.data.ids import Positions, canonical_ids
from sl_queue.data.rows import read_rows
from sl_queue.job import Job
from sl_queue.party_file import DataFile, PartyFile
from sl_queue.ports import Table


def read_table(job: Job, party_file: PartyFile) -> Table:
    """Read a party's rows and put them into canonical order. Raises one JobError for everything that is wrong."""
    party, data = party_file.party, party_file.data
    id_type = data.id_type if isinstance(data, DataFile) else None
    empty = isinstance(data, DataFile) and data.features == []
    arrays = read_rows(party_file, features=job.cut(party) is not None and not empty, labels=party == job.label_holder)
    ids, faults = None, list(arrays.faults)
    if arrays.ids is not None:
        ids, wrong = canonical_ids(arrays.ids, are_csv=arrays.ids_are_csv, id_type=id_type)
        faults += wrong
    if party == job.label_holder and arrays.labels is None and not faults:
        faults.append(f"there are no labels, and {party!r} is the label holder")
    refuse(arrays.where, faults)
    assert ids is not None
    row_keys, digest = _fingerprints(ids.texts, ids.type)
    features, labels = _ordered(arrays.features, ids.order), _ordered(arrays.labels, ids.order)
    return Table(features, labels, row_keys, digest, ids.type, columns=arrays.names, notes=(*arrays.notes, *ids.notes))


def _fingerprints(ids: Any, id_type: str) -> tuple[npt.NDArray[np.uint64], str]:
    """The key of every row and the digest of all, from canonical ids as text."""
    texts: list[bytes] = ids.cast(pa.large_binary()).to_numpy(zero_copy_only=False).tolist()
    everything = blake2b(f"{id_type} {len(texts)} ".encode())
    everything.update(pc.binary_length(ids).to_numpy().astype("<i8").tobytes())  # so that no two lists read the same
    everything.update(b"".join(texts))
    secret = everything.digest()
    key = blake2b(secret, person=b"sl_queue row key").digest()
    keys = b"".join([blake2b(text, digest_size=8, key=key).digest() for text in texts])
    digest = blake2b(secret, digest_size=32, person=b"sl_queue digest").hexdigest()
    return np.frombuffer(keys, "<u8").astype(np.uint64), digest


def _ordered(array: npt.NDArray[Any] | None, order: Positions) -> npt.NDArray[Any] | None:
    return None if array is None else array[order]

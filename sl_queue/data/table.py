"""A party's table in canonical order: ascending id, numbers by value and text by its UTF-8 bytes.

The order is the same at every party that holds the same ids, and so are the keys and the digest that are made of them.
Both come from one hash over all ids, and neither yields the other: the digest is sent to the scheduler when a party
joins, the keys never leave the party. Whoever does not know all ids can compute neither.
"""

from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data.faults import refuse
from sl_queue.data.features import Fitted, apply, fit
from sl_queue.data.given import ids_of
from sl_queue.data.ids import Ids, Positions, canonical_ids
from sl_queue.data.rows import Arrays, read_rows
from sl_queue.data.spec import FileSpec, TableSpec
from sl_queue.protocol.fingerprints import BY_POSITION, RULES
from sl_queue.protocol.schedule.row_order import id_hashes, split_by_id
from sl_queue.protocol.table import Table


def read_table(
    spec: TableSpec, aligned: Positions | None = None, rules: int = RULES, token_key: bytes | None = None
) -> Table:
    """Read a party's rows and put them into canonical order. Raises one JobError for everything that is wrong.

    `aligned`: positions in canonical order of the rows that all parties hold; None: all rows. `rules`: those of the
    run, which choose the rows that are held out, and so those that [features] is fitted on. `token_key` makes the
    tokens of the rows' ids, for draws that a row keeps in other tables too.
    """
    empty = isinstance(spec.data, FileSpec) and spec.data.features == ()
    arrays = read_rows(spec, features=spec.features and not empty, labels=spec.labels)
    ids, faults = _ids(spec, arrays)
    faults = [*arrays.faults, *faults]
    if spec.labels and arrays.labels is None and not faults:
        faults.append(f"there are no labels, and {spec.party!r} is the label holder")
    refuse(arrays.where, faults)
    assert ids is not None
    ids = ids if aligned is None else ids.only(aligned)
    texts = _texts(ids)
    row_keys, digest = _fingerprints(texts, pc.binary_length(ids.texts), ids.type)
    hashes = None if spec.holdout_seed is None else id_hashes(texts, spec.holdout_seed)
    features, labels = _ordered(arrays.features, ids.order), _ordered(arrays.labels, ids.order)
    notes = (*arrays.notes, *ids.notes)
    tokens = None if token_key is None else _keyed(texts, token_key)
    names, recipe = arrays.names, None
    if arrays.raw is not None:
        training = spec.training(len(texts), hashes if rules != BY_POSITION else None)
        features, fitted = _made(arrays, ids.order, training)
        names, recipe = fitted.names, fitted.as_json()
    return Table(features, labels, row_keys, digest, ids.type, names, hashes, notes, tokens, fitted=recipe)


def read_ids(spec: TableSpec) -> tuple[Ids, str]:
    """Read the ids of a party's rows alone; and say what complaints about them begin with. Raises JobError."""
    arrays = read_rows(spec, features=False, labels=False)
    ids, faults = _ids(spec, arrays)
    refuse(arrays.where, [*arrays.faults, *faults])
    assert ids is not None
    return ids, arrays.where


def _ids(spec: TableSpec, arrays: Arrays) -> tuple[Ids | None, list[str]]:
    """Put ids into canonical order, as job and party say."""
    if arrays.ids is None:
        return None, []
    data = spec.data if isinstance(spec.data, FileSpec) else FileSpec()
    return canonical_ids(
        arrays.ids,
        are_csv=arrays.ids_are_csv,
        id_type=data.id_type,
        normalise=spec.normalise,
        duplicates=data.duplicates,
    )


def _made(arrays: Arrays, order: Positions, training: Positions) -> tuple[npt.NDArray[Any], Fitted]:
    """Make numbers of raw columns as [features] says, fitted on the training rows alone."""
    assert arrays.raw is not None and arrays.specs is not None
    taken = pa.array(order)
    columns = {name: column.take(taken) for name, column in arrays.raw.items()}
    fitted, faults = fit(arrays.specs, columns, training)
    refuse(arrays.where, faults)
    features, faults = apply(fitted, columns)
    refuse(arrays.where, faults)
    return features, fitted


def holdout_rows(ids: Any, seed: int, holdout: float) -> npt.NDArray[np.bool_]:
    """Say which rows a job holds out, in the order of `ids`: shape (rows,), True for held out.

    `seed` is the job's `holdout_seed`, or its `seed` if it has none. Raises JobError for ids that no table may have.
    """
    given, faults = ids_of(ids)
    found = None
    if given is not None:
        found, wrong = canonical_ids(given, are_csv=False, id_type=None)
        faults += wrong
    refuse("holdout_rows", faults)
    assert found is not None
    mask = np.zeros(len(found.order), np.bool_)
    mask[found.order[split_by_id(id_hashes(_texts(found), seed), holdout)[1]]] = True
    return mask


def _texts(ids: Ids) -> list[bytes]:
    """Ids as text, in UTF-8."""
    found: list[bytes] = ids.texts.cast(pa.large_binary()).to_numpy(zero_copy_only=False).tolist()
    return found


def _fingerprints(texts: list[bytes], lengths: Any, id_type: str) -> tuple[npt.NDArray[np.uint64], str]:
    """Return the key of every row and the digest of all, from canonical ids as text and their lengths."""
    everything = blake2b(f"{id_type} {len(texts)} ".encode())
    everything.update(lengths.to_numpy().astype("<i8").tobytes())  # so that no two lists read the same
    everything.update(b"".join(texts))
    secret = everything.digest()
    key = blake2b(secret, person=b"sl_queue row key").digest()
    digest = blake2b(secret, digest_size=32, person=b"sl_queue digest").hexdigest()
    return _keyed(texts, key), digest


def _keyed(texts: list[bytes], key: bytes) -> npt.NDArray[np.uint64]:
    """Return 64 bits of each text that depend on it and on the key alone."""
    hashes = b"".join([blake2b(text, digest_size=8, key=key).digest() for text in texts])
    return np.frombuffer(hashes, "<u8").astype(np.uint64)


def _ordered(array: npt.NDArray[Any] | None, order: Positions) -> npt.NDArray[Any] | None:
    return None if array is None else array[order]

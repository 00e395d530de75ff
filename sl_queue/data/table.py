"""A party's table in canonical order: ascending id, numbers by value and text by its UTF-8 bytes.

The order is the same at every party that holds the same ids, and so are the keys and the digest that are made of them.
Both come from one hash over all ids, and neither yields the other: the digest is sent to the scheduler when a party
joins, the keys never leave the party. Whoever does not know all ids can compute neither.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data.faults import refuse
from sl_queue.data.features import Fitted, fit_and_apply
from sl_queue.data.given import ids_of
from sl_queue.data.holdout import choose, date_formats
from sl_queue.data.ids import Ids, Positions, canonical_ids
from sl_queue.data.later import Later
from sl_queue.data.mapped import MappedColumns, scratch_of
from sl_queue.data.matrices import Matrix
from sl_queue.data.rows import Arrays, read_rows
from sl_queue.data.spec import FileSpec, TableSpec
from sl_queue.protocol.fingerprints import BY_POSITION, RULES
from sl_queue.protocol.holdout import Chosen
from sl_queue.protocol.schedule.row_order import Hashes, hashes_of, held_out, id_hashes, split_by_id
from sl_queue.protocol.table import Table

_SLICE = 1000  # ids that are Python objects at a time


FOR_THE_LABEL_HOLDER = "which rows are held out is for the label holder to say; here all count as training rows"


def read_table(
    spec: TableSpec,
    aligned: Positions | None = None,
    rules: int = RULES,
    token_key: bytes | None = None,
    *,
    chosen: Chosen | None = None,
    choice_key: bytes | None = None,
    narrow: bool = False,
) -> Table:
    """Read a party's rows and put them into canonical order. Raises one JobError for everything that is wrong.

    `aligned`: positions in canonical order of the rows that all parties hold; None: all rows. `rules`: those of the
    run, which choose the rows that are held out, and so those that [features] is fitted on. `token_key` makes the
    tokens of the rows' ids, for draws that a row keeps in other tables too. `chosen`: the rows that the label holder
    chose to hold out; None: it chooses here, with `choice_key` in the place of the job's seed. `narrow`: keep the
    numbers of a file as float32, with what a model of that dtype should know of them.
    """
    empty = isinstance(spec.data, FileSpec) and spec.data.features == ()
    chooses = spec.choices is not None and spec.labels and chosen is None
    arrays = read_rows(spec, features=spec.features and not empty, labels=spec.labels, choosing=chooses)
    ids = _sound_ids(spec, arrays, aligned)
    row_keys, digest = fingerprints_of(ids)
    hashes = None if spec.holdout_seed is None else id_hashes(texts_of(ids), spec.holdout_seed, len(ids.texts))
    labels, weights = in_order(arrays.labels, ids.order), in_order(arrays.weights, ids.order)
    notes, id_type, order = (*arrays.notes, *ids.notes), ids.type, ids.order
    tokens = None if token_key is None else keyed_ids(ids, token_key)
    if spec.choices is not None and chosen is None:
        if chooses and hashes is not None:
            chosen = _chosen(spec, arrays, ids, labels, hashes, choice_key)
        else:
            chosen, notes = Chosen.none(), (*notes, FOR_THE_LABEL_HOLDER)
    arrays = replace(arrays, ids=None, choosing={})
    del ids  # before numbers are made
    about = (arrays.names, hashes, notes, tokens)
    table = Table(None, labels, row_keys, digest, id_type, *about, weights=weights, chosen=chosen)
    if arrays.raw is not None:
        return _fitted(spec, arrays, order, table, rules)
    again = partial(_again, spec, aligned, digest) if narrow else None
    return _placed(spec, arrays.features, order, table, again)


def _fitted(spec: TableSpec, arrays: Arrays, order: Positions, table: Table, rules: int) -> Table:
    """Return the table with features that [features] makes, fitted on its training rows."""
    by = table.hashes if rules != BY_POSITION else None
    training = spec.training(len(order), by if table.chosen is None else table.chosen)
    features, fitted, notes = _made(arrays, order, training, scratch_of(spec))
    told = (*table.notes, *notes)
    return replace(table, features=features, columns=fitted.names, notes=told, fitted=fitted.as_json())


def _placed(
    spec: TableSpec,
    found: npt.NDArray[Any] | Matrix | None,
    order: Positions,
    table: Table,
    exact: Callable[[], npt.NDArray[Any]] | None,
) -> Table:
    """Return the table with features in this order; as float32 if `exact` can read them again as they are."""
    if exact is None or not isinstance(found, Matrix):
        return replace(table, features=in_order(found, order))
    features, narrowed = found.narrowed(order, cache(exact), spec.scratch)
    return replace(table, features=features, narrowed=narrowed)


def _again(spec: TableSpec, aligned: Positions | None, digest: str) -> npt.NDArray[Any]:
    """Read the features once more, as they are in the file. Raises JobError if the table is another by now."""
    arrays = read_rows(spec, features=True, labels=False)
    ids = _sound_ids(replace(spec, labels=False), arrays, aligned)
    if fingerprints_of(ids)[1] != digest:
        refuse(arrays.where, ["the table has changed while it was read; start again"])
    features = in_order(arrays.features, ids.order)
    assert features is not None
    return features


def _sound_ids(spec: TableSpec, arrays: Arrays, aligned: Positions | None) -> Ids:
    """Return the ids of the rows that all hold, if nothing is wrong with any row. Raises JobError for all that is."""
    ids, faults = ids_in(spec, arrays)
    faults = [*arrays.faults, *faults]
    if spec.labels and arrays.labels is None and not faults:
        faults.append(f"there are no labels, and {spec.party!r} is the label holder")
    refuse(arrays.where, faults)
    assert ids is not None
    return ids if aligned is None else ids.only(aligned)


def read_row_keys(spec: TableSpec, aligned: Positions | None = None) -> tuple[npt.NDArray[np.uint64], str]:
    """Read the ids of a party's rows alone; returns the key of each in canonical order, and the digest of all."""
    ids, _ = read_ids(spec)
    return fingerprints_of(ids if aligned is None else ids.only(aligned))


def read_ids(spec: TableSpec) -> tuple[Ids, str]:
    """Read the ids of a party's rows alone; and say what complaints about them begin with. Raises JobError."""
    arrays = read_rows(spec, features=False, labels=False)
    ids, faults = ids_in(spec, arrays)
    where = arrays.where
    refuse(where, [*arrays.faults, *faults])
    assert ids is not None
    del arrays
    pa.default_memory_pool().release_unused()  # sorting took several times as much as is kept
    return ids, where


def ids_in(spec: TableSpec, arrays: Arrays) -> tuple[Ids | None, list[str]]:
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


def _chosen(
    spec: TableSpec, arrays: Arrays, ids: Ids, labels: npt.NDArray[Any] | None, hashes: Hashes, key: bytes | None
) -> Chosen:
    """Choose the rows to hold out, as the label holder; `key` in the place of the job's seed."""
    assert spec.choices is not None
    taken, private = pa.array(ids.order), hashes if key is None else keyed_ids(ids, key)
    columns = {name: column.take(taken) for name, column in arrays.choosing.items()}
    formats = date_formats(arrays.specs or {})
    chosen, faults = choose(spec.choices, columns, labels, hashes, private, formats)
    refuse(arrays.where, faults)
    return chosen


def _made(
    arrays: Arrays, order: Positions, training: Positions, scratch: Path | None
) -> tuple[npt.NDArray[Any], Fitted, list[str]]:
    """Make numbers of raw columns as [features] says, fitted on the training rows alone; in a file if there is one."""
    assert arrays.raw is not None and arrays.specs is not None
    taken, raw = pa.array(order), arrays.raw
    columns = Later(tuple(raw), lambda name: raw[name].take(taken))
    if scratch is None:
        fitted, features, faults, notes = fit_and_apply(arrays.specs, columns, training, len(order))
    else:
        with MappedColumns(scratch) as file:
            fitted, _, faults, notes = fit_and_apply(arrays.specs, columns, training, len(order), file.columns)
            features = file.by_row()
    refuse(arrays.where, faults)
    return features, fitted, notes


def holdout_rows(ids: Any, seed: int, holdout: float) -> npt.NDArray[np.bool_]:
    """Say which rows a job holds out, in the order of `ids`: shape (rows,), True for held out.

    `seed` is the job's `holdout_seed`, or its `seed` if it has none. Raises JobError for ids that no table may have.
    """
    order, hashes = _hashed(ids, seed, "holdout_rows")
    mask = np.zeros(len(order), np.bool_)
    mask[order[split_by_id(hashes, holdout)[1]]] = True
    return mask


def test_rows(ids: Any, seed: int, test: float) -> npt.NDArray[np.bool_]:
    """Say which rows a job keeps for a test, as `holdout_rows` says which it holds out.

    `seed` is the job's `holdout_seed`, or its `seed` if it has none. Raises JobError for ids that no table may have.
    """
    order, hashes = _hashed(ids, seed, "test_rows")
    mask = np.zeros(len(order), np.bool_)
    first = len(order) - held_out(len(order), test)
    mask[order[np.argsort(hashes, kind="stable")[first:]]] = True
    return mask


def _hashed(ids: Any, seed: int, where: str) -> tuple[Positions, Hashes]:
    """Return the canonical order of ids given in code, and the hashes that choose among them, in that order."""
    given, faults = ids_of(ids)
    found = None
    if given is not None:
        found, wrong = canonical_ids(given, are_csv=False, id_type=None)
        faults += wrong
    refuse(where, faults)
    assert found is not None
    return found.order, id_hashes(texts_of(found), seed)


def texts_of(ids: Ids) -> Iterator[bytes]:
    """Yield ids as text, in UTF-8; few of them are Python objects at a time."""
    for first in range(0, len(ids.texts), _SLICE):
        yield from ids.texts[first : first + _SLICE].cast(pa.large_binary()).to_pylist()


def fingerprints_of(ids: Ids) -> tuple[npt.NDArray[np.uint64], str]:
    """Return the key of every row and the digest of all, from canonical ids as text and their lengths."""
    everything = blake2b(f"{ids.type} {len(ids.texts)} ".encode())
    lengths = pc.binary_length(ids.texts)
    everything.update(lengths.to_numpy().astype("<i8", copy=False).data)  # so that no two lists read the same
    for text in texts_of(ids):
        everything.update(text)
    secret = everything.digest()
    key = blake2b(secret, person=b"sl_queue row key").digest()
    digest = blake2b(secret, digest_size=32, person=b"sl_queue digest").hexdigest()
    return keyed_ids(ids, key), digest


def keyed_ids(ids: Ids, key: bytes) -> npt.NDArray[np.uint64]:
    """Return 64 bits of each id that depend on it and on the key alone."""
    return hashes_of(texts_of(ids), len(ids.texts), key)


def in_order(found: npt.NDArray[Any] | Matrix | None, order: Positions) -> npt.NDArray[Any] | None:
    """Return these rows of an array, or of columns that become one so."""
    if isinstance(found, Matrix):
        return found.array(order)
    return None if found is None else found[order]

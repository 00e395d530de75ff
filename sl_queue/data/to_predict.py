"""Rows that a trained model is asked about: in canonical order, and the way back into the order of their file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sl_queue.data.faults import listed, refuse
from sl_queue.data.feature_specs import matches
from sl_queue.data.features import Fitted, apply
from sl_queue.data.ids import Ids, Positions
from sl_queue.data.rows import Arrays, read_rows
from sl_queue.data.spec import FileSpec, TableSpec
from sl_queue.data.table import fingerprints_of, ids_in, in_order, keyed_ids, read_ids, texts_of
from sl_queue.data.unseen import MOST_UNSEEN, unseen
from sl_queue.errors import JobError
from sl_queue.protocol.schedule.row_order import id_hashes
from sl_queue.protocol.table import Table

Keys = npt.NDArray[np.uint64]

_EXACT = 2**53  # up to which float64 holds every whole number
LACKING, REPEATED = -1, -2  # in the place of a row's position: another party lacks the row; it repeats an id


@dataclass(frozen=True, slots=True, eq=False)
class ToPredict:
    """A party's rows to predict."""

    table: Table
    ids: Mapping[str, Any] = field(repr=False)  # Arrow arrays by column, in the order of the file
    positions: Positions = field(repr=False)  # of each row of the file in the table; else LACKING or REPEATED
    unseen: tuple[str, ...] = ()  # what training had not seen: counts of categories by column, or fractions
    keys: Keys | None = field(default=None, repr=False)  # of the table's rows, as requests name them

    @property
    def missing(self) -> int:
        """Count the rows of the file that get no prediction, since another party lacks them."""
        return int((self.positions == LACKING).sum())


_AS_LEARNED = "another line of [features] takes effect when it is trained with"


def read_to_predict(
    spec: TableSpec,
    aligned: Positions | None,
    recipe: str | None,
    columns: Sequence[str] | None = None,
    key: bytes | None = None,
    *,
    whole: bool = False,
) -> ToPredict:
    """Read rows; `recipe` is what [features] learned of the training rows, and nothing is learned here.

    `aligned`: positions in canonical order of the rows that all parties hold; None: all rows. `columns`: names of those
    that were trained on, in order; None if they had no names. `key`: of what requests name rows by. `whole`: columns
    were whole numbers all. Raises one JobError for everything that is wrong, and for a table without rows.
    """
    data = spec.data
    fitted = None if recipe is None or spec.declared is None else Fitted.of_json(recipe)
    trained = columns if spec.declared is None else None if fitted is None else tuple(fitted.columns)
    spec = spec if trained is None else _declaring(spec, trained)
    arrays = read_rows(spec, features=spec.features and not _is_empty(data), labels=spec.labels, trained=trained)
    ids, wrong = ids_in(spec, arrays)
    faults = [*arrays.faults, *wrong]
    if spec.labels and arrays.labels is None and not faults:
        faults.append("there are no labels to compare predictions with")
    refuse(arrays.where, faults)
    assert ids is not None
    own, ids = ids.order, ids if aligned is None else ids.only(aligned)
    if not len(ids.order):
        raise JobError(f"{arrays.where}: there are no rows to predict")
    if arrays.raw is None:
        features, names, told = _given(arrays, ids.order, whole=whole)
    else:
        features, names, told = _made(arrays.where, arrays.raw, ids.order, fitted, strict=_is_strict(data))
    labels, weights = in_order(arrays.labels, ids.order), in_order(arrays.weights, ids.order)
    hashes = None if spec.holdout_seed is None else id_hashes(texts_of(ids), spec.holdout_seed)
    about = (*fingerprints_of(ids), ids.type, names, hashes, (*arrays.notes, *ids.notes))
    table = Table(features, labels, *about, weights=weights)
    in_file = _columns(data, arrays.ids)
    places = _places(ids.order, own, len(next(iter(in_file.values()))))
    return ToPredict(table, in_file, places, tuple(told), None if key is None else keyed_ids(ids, key))


def _is_empty(data: Any) -> bool:
    return isinstance(data, FileSpec) and data.features == ()


def _is_strict(data: Any) -> bool:
    return not isinstance(data, FileSpec) or data.unseen == "refuse"


def _places(order: Positions, own: Positions, n_rows: int) -> Positions:
    """Return the place of each row of a file in the order, else LACKING or REPEATED; `own`: rows whose ids are new."""
    places = np.full(n_rows, REPEATED, np.int64)
    places[own] = LACKING
    places[order] = np.arange(len(order))
    return places


def ids_to_predict(spec: TableSpec) -> Ids:
    """Read the ids of rows that a service answers for, in canonical order. Raises JobError."""
    return read_ids(spec)[0]


def _declaring(spec: TableSpec, trained: Sequence[str]) -> TableSpec:
    """Return a table whose [features] says nothing but of the columns that a model was trained on."""
    declared = spec.declared or {}
    known = {name: one for name, one in declared.items() if any(matches(name, column) for column in trained)}
    return spec if spec.declared is None else replace(spec, declared=known)


def _given(
    arrays: Arrays, order: Positions, *, whole: bool
) -> tuple[npt.NDArray[Any] | None, tuple[str, ...] | None, list[str]]:
    """Return numbers and names of columns as a model was trained on them, and what to tell of them."""
    features, names = in_order(arrays.features, order), arrays.names
    if not whole or features is None:
        return features, names, []
    features, told = _whole(features, names)
    return features, names, told


def _whole(features: npt.NDArray[Any], names: Sequence[str] | None) -> tuple[npt.NDArray[Any], list[str]]:
    """Take floating numbers that all are whole for whole ones, as training had them; or tell which columns are not."""
    if features.dtype.kind != "f":
        return features, []
    bad = (features != np.rint(features)) | (np.abs(features) > _EXACT)
    if not bad.any():
        return features.astype(np.int64), []
    columns = np.flatnonzero(bad.reshape(len(bad), len(names) if names else 1, -1).any(axis=(0, 2)))
    told = listed(repr(names[int(place)]) if names else "features" for place in columns)
    return features, [f"training had whole numbers only, and there are others in {told}; a model may not take them"]


def _made(
    where: str, raw: Mapping[str, Any], order: Positions, fitted: Fitted | None, *, strict: bool
) -> tuple[npt.NDArray[Any], tuple[str, ...], list[str]]:
    """Make numbers of raw columns by what was learned in training; and count what training had not seen.

    `strict`: refuse a column in which more rows than a few hold a category that training had not seen.
    """
    if fitted is None:
        raise JobError(
            f"{where}: [features] is there, and the version to predict with has no features.json: it was trained "
            "without; predict with a version that was trained with it, or take [features] out"
        )
    taken = pa.array(order)
    columns = {name: column.take(taken) for name, column in raw.items()}
    features, faults = apply(fitted, columns)
    refuse(where, [f"{fault} ({_AS_LEARNED})" for fault in faults])
    notes, many = unseen(fitted, columns, most=MOST_UNSEEN if strict else 1.0)
    refuse(where, many)
    return features, fitted.names, notes


def _columns(data: Any, ids: Any) -> dict[str, Any]:
    names = data.ids if isinstance(data, FileSpec) and data.ids else ("id",)
    parts = ids if isinstance(ids, list) else [ids]
    return {
        name: part.combine_chunks() if isinstance(part, pa.ChunkedArray) else part
        for name, part in zip(names, parts, strict=True)
    }

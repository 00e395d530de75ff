"""Rows as a notebook has them, by party: arrays, tensors, data frames and datasets, or one joined table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import Dataset, TensorDataset

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import table_spec
from sl_queue.config.user_code import Importer
from sl_queue.data.given import ids_of
from sl_queue.data.ids import canonical_ids
from sl_queue.data.spec import Rows
from sl_queue.data.table import read_table
from sl_queue.errors import JobError
from sl_queue.protocol.table import Table


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """Rows that one party holds, in the order in which they were given."""

    party: str
    ids: Any = field(repr=False)
    features: Any = field(repr=False)
    labels: Any = field(repr=False)

    @property
    def n_rows(self) -> int:
        return len(self.ids)

    def rows(self) -> Rows:
        """Return the same as a party file takes it."""
        return Rows(self.ids, self.features, self.labels)

    def table(self) -> Table:
        """Return the same in canonical order. Raises JobError for rows that cannot be trained on."""
        holds_labels, other = self.labels is not None, f"{self.party[:60]}-or"
        cut = {} if self.features is None else {"cut": [1]}
        role, others = ("label", "feature") if holds_labels else ("feature", "label")
        parties = {self.party: {"role": role, **cut}, other: {"role": others, "cut": [1]}}
        job = Job(name="rows", seed=0, epochs=1, batch_size=1, parties=parties)
        return read_table(table_spec(job, PartyFile(party=self.party, data=self.rows()), Importer()))

    def as_trained(self, names: Sequence[str] | None) -> "Given":
        """Return the same with the columns that a model was trained on, in their order, where columns have names."""
        here = names_of(self.features)
        if not names or here is None or here == list(names):
            return self
        missing = [name for name in names if name not in here]
        if missing:
            told = f"there is no column {missing[0]!r}; the model was trained on {', '.join(names)}"
            raise JobError(f"party {self.party!r}: {told}")
        found = {str(name): name for name in _names(self.features)}
        return replace(self, features=_selected(self.features, [found[name] for name in names]))

    def order(self) -> npt.NDArray[np.int64]:
        """Return the position in the given order of each row of the canonical one."""
        ids, _ = canonical_ids(ids_of(self.ids)[0], are_csv=False, id_type=None)
        assert ids is not None
        return ids.order


def names_of(features: Any) -> list[str] | None:
    """Return the names of the columns of a data frame; None of anything else, and where two have one name."""
    if isinstance(features, Mapping) or not _is_frame(features):
        return None
    names = list(map(str, _names(features)))
    return names if len(set(names)) == len(names) else None


def by_party(
    features: Any,
    parties: Mapping[str, Any],
    columns: Mapping[str, Sequence[Any]] | None,
    label_holder: str,
    labels: Any,
    id: str | None,
) -> dict[str, Given]:
    """Split into each party's rows, in the order of `parties`; the label holder has no base model if there are labels.

    Raises JobError for what is missing or not as long as the rest.
    """
    tables = _tables(features, parties, columns)
    if not isinstance(labels, str | int):
        _require_rows("labels", labels)
    ids = None if id is None or isinstance(features, Mapping) else _column(features, id)
    known = [*parties, *([label_holder] if label_holder not in parties else [])]
    strange = [party for party in tables if party not in known]
    if strange:
        raise JobError(
            f"there are rows for {strange[0]!r}, which is not a party of this model; they are {', '.join(known)}"
        )
    if isinstance(labels, str | int):
        if label_holder not in tables:
            raise JobError(f"labels = {labels!r} names a column, and there is no table of {label_holder!r}")
        labels, tables[label_holder] = _column(tables[label_holder], labels), _without(tables[label_holder], labels)
    found = {}
    for party in parties:
        if party not in tables:
            raise JobError(f"there are no rows for party {party!r}")
        found[party] = _given(party, tables[party], id, ids)
    if label_holder in parties:
        mine = found[label_holder]
        wanted = np.zeros(mine.n_rows, np.int64) if labels is None else labels
        found[label_holder] = Given(label_holder, mine.ids, mine.features, wanted)
    elif labels is not None:
        found[label_holder] = _labels_alone(label_holder, tables.get(label_holder), labels, id, ids)
    _require_as_long(found)
    return found


def rows_of(given: Given) -> Rows:
    """Return the rows as a party file takes them."""
    return given.rows()


def _tables(features: Any, parties: Mapping[str, Any], columns: Any) -> dict[str, Any]:
    if isinstance(features, Mapping):
        return {party: _stacked(table, f"the table of {party!r}") for party, table in features.items()}
    if columns is None:
        raise JobError(
            "features are one table; give a dict with a table for each party, or say whose columns are whose: "
            'SplitModel(..., columns={"bank": ["age", "income"], ...})'
        )
    missing = [party for party in parties if party not in columns]
    if missing:
        raise JobError(f"columns say nothing of party {missing[0]!r}")
    table = _stacked(features, "the table")
    return {party: _selected(table, list(columns[party]), f"columns of {party!r}: ") for party in parties}


def _length(table: Any) -> int:
    """Count the rows of a table, or of several arrays by name."""
    return len(next(iter(table.values()))) if isinstance(table, Mapping) else len(table)


def _require_rows(what: str, rows: Any) -> None:
    """Raise JobError for what has no number of rows, as a table that polars has yet to compute."""
    if hasattr(type(rows), "collect"):
        raise JobError(f"{what}: a {type(rows).__name__} is not computed yet; give .collect()")
    if rows is not None and not hasattr(rows, "__len__"):
        raise JobError(f"{what}: a {type(rows).__name__} has no rows; give an array, or a data frame")


def _stacked(table: Any, what: str) -> Any:
    """Stack a dataset into one array."""
    _require_rows(what, table)
    if isinstance(table, TensorDataset):
        return table.tensors[0]
    if isinstance(table, Dataset):
        items: Any = table
        return torch.stack([torch.as_tensor(items[place]) for place in range(len(items))])
    return table


def _is_frame(table: Any) -> bool:
    return hasattr(table, "columns")


def _names(table: Any) -> list[Any]:
    return table.schema.names if isinstance(table, pa.Table | pa.RecordBatch) else list(table.columns)


def _selected(table: Any, names: list[Any], where: str = "") -> Any:
    """Return some columns of a table; `where` is what complaints begin with."""
    if _is_frame(table):
        names = [_name_in(table, name, where) for name in names]
        return table.select(names) if isinstance(table, pa.Table | pa.RecordBatch) else table[names]
    try:
        return table[:, names]
    except (IndexError, TypeError, ValueError):
        shape = getattr(table, "shape", None)
        about = type(table).__name__ + ("" if shape is None else f" of the shape {tuple(shape)}")
        raise JobError(f"{where}the table, a {about}, does not have all of {names}") from None


def _name_in(table: Any, name: Any, where: str = "") -> Any:
    """Return the name of a column as the table has it: 1 where it is asked for as "1"."""
    known = _names(table)
    found = [each for each in known if each == name] or [each for each in known if str(each) == str(name)]
    if not found:
        raise JobError(f"{where}there is no column {name!r}; the table's are {', '.join(map(str, known))}")
    return found[0]


def _column(table: Any, name: Any) -> Any:
    if not _is_frame(table):
        raise JobError(f"{name!r} names a column, and the table is a {type(table).__name__} without names")
    return table[_name_in(table, name)]


def _without(table: Any, name: Any) -> Any:
    left_out = _name_in(table, name)
    return _selected(table, [each for each in _names(table) if each != left_out])


def _given(party: str, table: Any, id: str | None, ids: Any) -> Given:
    if id is None:
        return Given(party, np.arange(_length(table)), table, None)
    if ids is not None:
        return Given(party, ids, _without(table, id) if id in map(str, _names(table)) else table, None)
    return Given(party, _column(table, id), _without(table, id), None)


def _labels_alone(party: str, table: Any, labels: Any, id: str | None, ids: Any) -> Given:
    """Return the rows of a label holder without a base model."""
    if id is not None and ids is None:
        if table is not None:
            ids = _column(table, id)
        elif _is_frame(labels):
            ids, labels = _column(labels, id), _without(labels, id)
        else:
            raise JobError(f"rows are told apart by {id!r}; give the labels as a data frame with that column")
    return Given(party, np.arange(len(labels)) if ids is None else ids, None, labels)


def _require_as_long(given: Mapping[str, Given]) -> None:
    lengths = {party: each.n_rows for party, each in given.items()}
    for each in given.values():
        if each.labels is not None:
            lengths["labels"] = len(each.labels)
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise JobError(f"there are different numbers of rows: {told}")
    if not next(iter(lengths.values())):
        raise JobError("there are no rows")

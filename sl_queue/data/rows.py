"""A party's rows as arrays that training will not stumble over, in the order in which they were given.

Faults name the party, the file, the column and the count of bad rows, and never show a value.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sl_queue.data.columns import read_columns
from sl_queue.data.faults import refuse
from sl_queue.data.feature_specs import Spec, matches, resolve
from sl_queue.data.frames import frame_columns, frame_names, has_names, only, raw_columns, without
from sl_queue.data.given import features_of, ids_of, labels_of
from sl_queue.data.header import about_trained
from sl_queue.data.holdout import looked_at
from sl_queue.data.matrices import Array, Matrix, Numbers, is_number
from sl_queue.data.spec import FileSpec, Rows, TableSpec
from sl_queue.errors import JobError
from sl_queue.ports import UserCode
from sl_queue.protocol.text import counted

__all__ = ["Arrays", "Rows", "read_rows"]


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """Rows as they were given; features and labels are finite numbers where there are no faults."""

    where: str  # what complaints begin with: the party, and its file or callable
    ids: Any = field(repr=False)  # an Arrow array of any type; None if a fault stands for it
    ids_are_csv: bool  # text that may mean whole numbers
    features: Array | Matrix | None = field(repr=False)  # (rows, *anything)
    labels: Array | None = field(repr=False)  # (rows,) or (rows, *anything)
    names: tuple[str, ...] | None = None  # of the columns of the features, where they have names
    notes: tuple[str, ...] = ()  # what a person should know of rows that can be trained on
    faults: tuple[str, ...] = ()  # what is wrong with them
    raw: Mapping[str, Any] | None = field(default=None, repr=False)  # columns for [features] to make numbers of
    specs: Mapping[str, Spec] | None = None  # what it says of each
    weights: Array | None = field(default=None, repr=False)  # (rows,)
    choosing: Mapping[str, Any] = field(default_factory=dict, repr=False)  # columns that choose rows, as Arrow arrays


def read_rows(
    spec: TableSpec, *, features: bool, labels: bool, choosing: bool = False, trained: Sequence[str] | None = None
) -> Arrays:
    """Read the rows of a party; features, labels and the columns that choose rows only if they are asked for.

    `trained`: columns that a model was trained on, which are the features then; None: those that the party says. Raises
    JobError if nothing can be read; all other faults are returned.
    """
    data, where = spec.data, f"party {spec.party!r}"
    about: Any = {"features": features, "labels": labels, "trained": trained}
    if isinstance(data, Rows):  # whose columns that choose rows are set aside, whether they are asked for or not
        return _given(data, f"{where}, data", spec, **about)
    if not choosing:
        spec = replace(spec, choices=None)
    if data.source is not None:
        name = data.source if isinstance(data.source, str) else getattr(data.source, "__qualname__", "a callable")
        where = f"{where}, data.source = {name!r}"
        return _given(_returned(data.source, spec.code, where), where, spec, **about)
    return _read(data, f"{where}, {data.path}", spec, **about)


def read_raw(spec: TableSpec, declared: Mapping[str, Spec]) -> Mapping[str, Any]:
    """Read the columns of a party's features as they are in its table, as Arrow arrays. Raises JobError."""
    data, where = spec.data, f"party {spec.party!r}"
    if isinstance(data, FileSpec) and data.source is None:
        columns = read_columns(data, f"{where}, {data.path}", features=True, labels=False, declared=declared)
        refuse(f"{where}, {data.path}", columns.faults)
        return columns.raw or {}
    rows = data if isinstance(data, Rows) else _returned(data.source, spec.code, where)
    taken, wrong = _features(rows, spec, None)
    found, faults = raw_columns(taken)
    refuse(where, [*wrong, *faults])
    return found


def _read(
    data: FileSpec, where: str, spec: TableSpec, *, features: bool, labels: bool, trained: Sequence[str] | None
) -> Arrays:
    """Read a file."""
    missing, choosing = spec.missing_labels, {} if spec.choices is None else looked_at(spec.choices)
    about: Any = {"features": features, "labels": labels, "missing": missing, "trained": trained}
    columns = read_columns(data, where, declared=spec.declared, choosing=choosing, **about)
    if columns.ids is not None and not columns.faults:
        _require_rows(len(columns.ids[0] if isinstance(columns.ids, list) else columns.ids), where)
    found = labels_of(columns.labels, f"label column {data.label!r}", missing=missing)
    weights = _weights(columns.weights, f"weight column {data.weight!r}")
    faults = (*columns.faults, *found.faults, *weights.faults)
    names = columns.names if columns.features is not None else None
    csv, notes = columns.ids_are_csv, columns.notes
    raw = (columns.raw, columns.specs, weights.array, columns.choosing or {})
    return Arrays(where, columns.ids, csv, columns.features, found.array, names, notes, faults, *raw)


def _given(
    rows: Rows, where: str, spec: TableSpec, *, features: bool, labels: bool, trained: Sequence[str] | None
) -> Arrays:
    """Take Rows, built in code or returned by a source."""
    ids, wrong = ids_of(rows.ids)
    if ids is not None:
        _require_rows(len(ids), where)
    raw, specs, declared = None, None, spec.declared
    taken, lacking = _features(rows, spec, trained) if features else (None, [])
    wrong += lacking
    if declared is not None and features and rows.features is not None and not lacking:
        raw, more = raw_columns(taken)
        specs, undeclared = ({}, []) if more else resolve(declared, list(raw) if trained is None else trained)
        wrong += [*more, *undeclared]
    n_rows = None if ids is None else len(ids)
    found = features_of(taken, n_rows) if raw is None and not lacking else Numbers(None)
    if features and rows.features is None:
        wrong.append("features are missing; the job gives this party a cut, so its base model needs them")
    targets = labels_of(rows.labels, missing=spec.missing_labels) if labels else Numbers(None)
    weights = _weights(rows.weights, "weights") if labels else Numbers(None)
    faults = [*wrong, *found.faults, *targets.faults, *weights.faults]
    for name, array in (("features", found.array), ("labels", targets.array), ("weights", weights.array)):
        if array is not None and ids is not None and len(array) != len(ids):
            faults.append(
                f"{counted(len(ids), 'id is', 'ids are')} given, but {name} for {counted(len(array), 'row', 'rows')}"
            )
    if raw and ids is not None and any(len(column) != len(ids) for column in raw.values()):
        faults.append(f"{counted(len(ids), 'id is', 'ids are')} given, but features for another number of rows")
    choosing, unfit = ({}, {}) if spec.choices is None else frame_columns(rows.features, spec.choices.columns)
    faults += [fault for fault in unfit.values() if fault not in faults]
    more_of_it = (found.names, found.notes, tuple(faults), raw, specs, weights.array, choosing)
    return Arrays(where, ids, False, found.array, targets.array, *more_of_it)


def _features(rows: Rows, spec: TableSpec, trained: Sequence[str] | None) -> tuple[Any, list[str]]:
    """Return the features without the columns that data.exclude names, and faults.

    Without those that only choose rows, too; or none but those that a model was `trained` on.
    """
    excluded = spec.data.exclude if isinstance(spec.data, FileSpec) and trained is None else ()
    if hasattr(type(rows.features), "collect"):
        return rows.features, [f"features: a {type(rows.features).__name__} is not computed yet; give .collect()"]
    if excluded and rows.features is not None and not has_names(rows.features):
        told = "data.exclude names columns, and these features have no names; return them as a data frame, or remove it"
        return rows.features, [told]
    aside = _aside(rows, spec) if trained is None else ()
    kept = without(rows.features, lambda name: name in aside or any(matches(each, name) for each in excluded))
    if trained is None:
        return kept, []
    known = frame_names(kept)
    return only(kept, trained), [] if known is None else list(about_trained(trained, known))


def _aside(rows: Rows, spec: TableSpec) -> list[str]:
    """Return the columns of a data frame that choose rows and are no features: those of no numbers, or undeclared."""
    choices = () if spec.choices is None else spec.choices.columns
    names = spec.data.set_aside if isinstance(spec.data, FileSpec) else choices
    columns, unfit = frame_columns(rows.features, names) if names else ({}, {})
    declared = spec.declared
    if declared is None:
        return [*unfit, *(name for name, column in columns.items() if not is_number(column.type))]
    return [name for name in (*unfit, *columns) if not any(matches(pattern, name) for pattern in declared)]


def _weights(values: Any, what: str) -> Numbers:
    """Make weights of rows finite numbers of at least 0, some above it."""
    found = labels_of(values, what)
    array = found.array
    if array is None or found.faults:
        return found
    faults = []
    if array.ndim != 1:
        faults.append(f"{what} have the shape {array.shape}; they must have one axis")
    elif negative := int((array < 0).sum()):
        faults.append(f"{what}: {negative} of {len(array)} are below 0; they must be at least 0")
    elif not array.any():
        faults.append(f"{what}: all are 0, so nothing could be learned")
    return Numbers(array.astype(np.float64), faults=tuple(faults))


def _returned(source: Any, code: UserCode, where: str) -> Rows:
    """Call the party's callable, with the party file's folder if it has a parameter of that name."""
    function = code.load(source) if isinstance(source, str) else source
    folder = code.folder or Path.cwd()
    try:
        rows = function(folder=folder) if _takes_folder(function) else function()
    except Exception as error:
        advice = _advice(error, folder, where) if isinstance(error, FileNotFoundError) else ""
        raise JobError(f"{where} fails: {type(error).__name__}: {error}{advice}") from error
    if not isinstance(rows, Rows):
        raise JobError(f"{where} returns a {type(rows).__name__}; it must return sl_queue.Rows")
    return rows


def _takes_folder(function: Any) -> bool:
    try:
        return "folder" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables do not tell
        return False


def _advice(error: FileNotFoundError, folder: Path, where: str) -> str:
    """Advise on a file that was looked for beside the process, and not beside the party file."""
    name = error.filename
    if not isinstance(name, str) or Path(name).is_absolute() or folder == Path.cwd():
        return ""
    return (
        f"; it was looked for in {Path.cwd()}: let the callable take a parameter `folder`, which is the folder of the "
        "party file, and open folder / name"
    )


def _require_rows(n_rows: int, where: str) -> None:
    if n_rows == 0:
        refuse(where, ["there are no rows"])

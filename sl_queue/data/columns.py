"""Reading the columns of a CSV or Parquet file that a party file selects, and no others."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from sl_queue.data import csv_file, files
from sl_queue.data.encodings import plain, unpacked
from sl_queue.data.faults import listed, refuse
from sl_queue.data.feature_specs import Category, Date, Spec, matches, resolve
from sl_queue.data.header import about_names, about_trained, another_separator
from sl_queue.data.later import Later
from sl_queue.data.matrices import (
    Array,
    Beside,
    Matrix,
    beside,
    gaps,
    gaps_in,
    gaps_of_labels,
    in_rows,
    label_array,
)
from sl_queue.data.reading import Reading, reading_of
from sl_queue.data.spec import FileSpec

_NAMELESS = re.compile(r"\s*|Unnamed: \d+(_level_\d+)?(\.\d+)?|__index_level_\d+__")  # as pandas, R and others write


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The part of a file that a party trains on, in the file's order of rows; None where a fault stands for it."""

    ids: Any = field(repr=False)  # an Arrow array of any type, or a list of several that are one id together
    ids_are_csv: bool  # text that may mean whole numbers
    names: tuple[str, ...]  # of the features
    features: Matrix | None = field(repr=False)
    labels: Array | None = field(repr=False)  # (rows,), or (rows, columns) of several
    notes: tuple[str, ...]  # what a person should know of a table that can be trained on
    faults: tuple[str, ...]  # what is wrong with it
    raw: Mapping[str, Any] | None = field(default=None, repr=False)  # Arrow arrays, where [features] says what of them
    specs: Mapping[str, Spec] | None = None  # what it says, column by column
    weights: Array | None = field(default=None, repr=False)  # (rows,)
    choosing: Mapping[str, Any] | None = field(default=None, repr=False)  # Arrow arrays of columns that choose rows


@dataclass(frozen=True, slots=True)
class _Selection:
    """The columns to read, by what they are for."""

    ids: tuple[str, ...]
    features: tuple[str, ...]
    labels: tuple[str, ...]
    weight: str | None
    notes: tuple[str, ...]
    choosing: tuple[str, ...] = ()  # columns that choose rows; they may be others too

    @property
    def names(self) -> list[str]:
        own = [*self.ids, *self.features, *self.labels, *([] if self.weight is None else [self.weight])]
        return [*own, *(name for name in self.choosing if name not in own)]

    @property
    def only_choosing(self) -> tuple[str, ...]:
        own = {*self.ids, *self.features, *self.labels, self.weight}
        return tuple(name for name in self.choosing if name not in own)


_NO_FEATURES = "there are no features: no column besides those of id and label"
_NONE_NEEDED = "; a label holder without any has no [base], no cut, and features = []"


def read_columns(
    data: FileSpec,
    where: str,
    *,
    features: bool,
    labels: bool,
    declared: Mapping[str, Spec] | None = None,
    missing: bool = False,
    choosing: Mapping[str, bool] = MappingProxyType({}),
    trained: Sequence[str] | None = None,
) -> Columns:
    """Read ids, and features and labels if they are asked for; all faults that can be seen are returned.

    `missing`: labels may be; they are NaN then. `declared`: what [features] says; then features stay as they are in the
    file. `choosing`: columns that choose rows, and whether they are looked at as text. `trained`: columns that a model
    was trained on, which are the features then. Raises JobError that begins with `where` if nothing can be read.
    """
    assert data.path is not None
    kind = files.kind_of(data, where)
    reading = partial(reading_of, data, kind, where)
    with reading(), files.opened(data, data.path, kind) as source:
        wanted = trained if features else None
        selecting = partial(_selected, data, features=features, labels=labels, choosing=choosing, trained=wanted)
        asked = declared if features else None
        return _read(data, source, where, selecting, reading, declared=asked, missing=missing)


def _read(
    data: FileSpec,
    source: files.Source,
    where: str,
    selecting: partial[_Selection],
    reading: Reading,
    *,
    declared: Mapping[str, Spec] | None,
    missing: bool,
) -> Columns:
    if fault := source.fault():  # before names are read: an open quote makes rows a name
        refuse(where, [fault])
    trained = selecting.keywords["trained"] or ()
    selection = selecting(known := _known(source, trained))
    faults = [*about_names(selection.names, known), *about_trained(trained, known)]
    refuse(where, faults[:1] if another_separator(known) else [])  # all else follows from another separator
    if selecting.keywords["features"] and not selection.features and set(data.ids) <= set(known) and not trained:
        faults.append(_NO_FEATURES + (_NONE_NEEDED if selection.labels else ""))
    specs, undeclared = ({}, []) if declared is None else resolve(declared, trained or selection.features)
    if not (readable := [name for name in selection.names if known.count(name) == 1]):
        refuse(where, faults)
    ids = [name for name in selection.ids if name in readable]
    taken = _taken(source, readable, ids, specs, selection, selecting.keywords["choosing"], reading)
    selection = selection if declared is None else replace(selection, features=())
    faults += [*taken.bad_rows, *undeclared, *([] if taken.bad_rows else _rounded(source, taken.columns))]
    found = _numbers(selection, taken.columns, missing=missing)
    arrays = [unpacked(taken.table[name]).combine_chunks() for name in ids if len(ids) == len(selection.ids)]
    return Columns(
        None if not arrays else arrays[0] if len(arrays) == 1 else arrays,
        source.ids_are_text,
        selection.features,
        found.features.matrix,
        found.labels,
        (*selection.notes, *found.features.notes),
        (*faults, *found.faults),
        None if declared is None else taken.raw,
        None if declared is None else specs,
        found.weights,
        {name: plain(taken.table[name]) for name in selection.choosing if name in readable},
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Taken:
    """Columns read from a file: some at once, those that [features] declares when they are asked for."""

    table: Any  # all of them, by name
    columns: Mapping[str, Any]
    raw: Mapping[str, Any]
    bad_rows: list[str]


def _taken(
    source: files.Source,
    readable: list[str],
    ids: list[str],
    specs: Mapping[str, Spec],
    selection: _Selection,
    choosing: Mapping[str, bool],
    reading: Reading,
) -> _Taken:
    declared = [name for name in specs if name in readable]
    dates = [name for name in declared if isinstance(spec := specs[name], Date) and spec.format is not None]
    dates = [name for name in dates if choosing.get(name, True)]  # rows may be chosen by it as a number
    texts = [*ids, *(name for name in declared if isinstance(specs[name], Category)), *dates]
    only = selection.only_choosing
    texts += [name for name in only if name in readable and choosing[name]]
    later = source.later(readable, texts) if selection.features else None
    later = None if later is None else later.within(reading)  # whenever that is
    table, bad_rows = (later, []) if later is not None else source.read(readable, texts)
    plainly = Later(tuple(readable), lambda name: table[name]) if later is None else later
    columns = plainly.then(plain, tuple(name for name in readable if name not in {*ids, *specs, *only}))
    raw = Later(tuple(declared), lambda name: _declared(plainly[name], is_date=name in dates), plainly)
    return _Taken(table, columns, raw, bad_rows)


def _declared(column: Any, *, is_date: bool) -> Any:
    """Return a column that [features] declares; dates of a form have the gaps that numbers have."""
    return plain(csv_file.without_gaps(column) if is_date else column)


# Names ----------------------------------------------------------------------------------------------------------


def _known(source: files.Source, trained: Sequence[str]) -> list[str]:
    """Return the names of a file's columns; those that are 0 in every row are left out in files of some kinds."""
    found = source.names()
    return [*found, *(name for name in trained if source.leaves_zeros_out and name not in found)]


def _selected(
    data: FileSpec,
    known: Sequence[str],
    *,
    features: bool,
    labels: bool,
    choosing: Mapping[str, bool],
    trained: Sequence[str] | None,
) -> _Selection:
    wanted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if features and trained is not None:
        wanted = tuple(name for name in trained if name in known)
    elif features and data.features is not None:
        wanted = tuple(dict.fromkeys(name for pattern in data.features for name in _matching(pattern, known, data)))
    elif features:
        others = [(i, name) for i, name in enumerate(known, 1) if name not in data.taken]
        others = [(i, name) for i, name in others if not any(matches(pattern, name) for pattern in data.exclude)]
        nameless = [(i, name) for i, name in others if _NAMELESS.fullmatch(name)]
        wanted = tuple(dict.fromkeys(name for _, name in others if not _NAMELESS.fullmatch(name)))
        if nameless:
            notes = (_left_out(nameless),)
    weight = data.weight if labels else None
    return _Selection(data.ids, wanted, data.labels if labels else (), weight, notes, tuple(choosing))


def _matching(pattern: str, known: Sequence[str], data: FileSpec) -> Iterator[str]:
    """Yield the columns that an entry of data.features stands for: itself, or all that match a pattern."""
    if pattern in known or not set("*?[") & set(pattern):
        yield pattern
        return
    others = [name for name in known if name not in data.taken and matches(pattern, name)]
    yield from (name for name in others if not any(matches(out, name) for out in data.exclude))
    if not others:
        yield pattern  # which no column is called: an error says so


def _left_out(columns: Sequence[tuple[int, str]]) -> str:
    several = len(columns) > 1
    told = listed(f"{name!r} (column {position})" for position, name in columns)
    return (
        f"left out {told}: without a name of {'their' if several else 'its'} own, {'they are' if several else 'it is'} "
        "most likely the row numbers of the program that wrote the file; to train on such a column, name it in "
        "data.features"
    )


# Values ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    features: Beside
    labels: Array | None
    weights: Array | None
    faults: tuple[str, ...]


def _numbers(selection: _Selection, columns: Mapping[str, Any], *, missing: bool) -> _Found:
    """Make numbers of Arrow columns, and say what is wrong with them."""
    own = tuple(name for name in selection.features if name in columns)
    picked = Later(own, lambda name: columns[name])
    features = beside(picked, "list only the others as data.features") if own else Beside(None)
    faults = list(features.faults)
    targets: list[Array | None] = []
    others = {name: columns[name] for name in columns if name not in own}
    for name in selection.labels:
        if name in columns:
            array, wrong = label_array(columns[name], f"label column {name!r}", missing=missing)
            targets.append(array)
            faults += wrong
    weights = None
    if selection.weight is not None and selection.weight in columns:
        weights, wrong = label_array(columns[selection.weight], f"weight column {selection.weight!r}")
        faults += wrong
    faults += gaps([*features.gaps, *gaps_in({n: column for n, column in others.items() if n not in selection.labels})])
    if not missing:
        faults += gaps_of_labels({name: others[name] for name in selection.labels if name in others})
    return _Found(features, _side_by_side(targets, len(selection.labels)), weights, tuple(faults))


def _side_by_side(arrays: Sequence[Array | None], wanted: int) -> Array | None:
    """One label column as (rows,), several as (rows, columns); None if one of them is not there."""
    there = [array for array in arrays if array is not None]
    if not there or len(there) < wanted:
        return None
    return there[0] if wanted == 1 else np.stack(there, axis=1)


def _rounded(source: files.Source, columns: Mapping[str, Any]) -> Iterator[str]:
    found = source.rounded(columns)
    if found:
        told = listed(in_rows(name, count) for name, count in found.items())
        yield (
            f"whole numbers of column {told} need more than 64 bits, or more than 53 bits beside fractions, and would "
            "be rounded; if they are codes, number them 0, 1, 2, ..., else write them as fractions"
        )

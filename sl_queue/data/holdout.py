"""Choice of rows by the label holder: those to hold out, and those for a test, in canonical order.

A row's place follows from its own values, or from its id and its class alone, so it stays where it is when others come
or leave. A share of each class is chosen by hashes that other parties cannot compute, if the label holder has a secret:
by hashes that they know they could tell the class of the rows between the bounds of two classes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data.feature_specs import Date, Spec
from sl_queue.data.feature_values import Unusable, days, days_in_utc, kind_of, numbers, require_offsets, texts
from sl_queue.data.spec import ByColumn, Choice, Choices, Stratified
from sl_queue.protocol.holdout import Chosen
from sl_queue.protocol.schedule.row_order import Hashes, held_out

MOST_CLASSES = 1000  # of labels that a share is chosen of each

Mask = npt.NDArray[np.bool_]
_ISO = r"^\d{4}-\d\d(?:$|[^\d-]|-\d{0,2}(?:$|\D))"


def looked_at(choices: Choices) -> dict[str, bool]:
    """Return the columns that choose rows; True for one whose values are compared as text."""
    found = dict.fromkeys(choices.columns, False)
    for choice in (choices.holdout, choices.test):
        if isinstance(choice, ByColumn):
            said = (choice.first, choice.before, *(choice.values or ()))
            found[choice.column] |= any(isinstance(value, str) for value in said)
    return found


def date_formats(specs: Mapping[str, Spec]) -> dict[str, str | None]:
    """Return how the dates of each column are written that [features] declares as one."""
    return {name: spec.format for name, spec in specs.items() if isinstance(spec, Date)}


def choose(
    choices: Choices,
    columns: Mapping[str, Any],
    labels: npt.NDArray[Any] | None,
    hashes: Hashes,
    private: Hashes,
    formats: Mapping[str, str | None],
) -> tuple[Chosen, list[str]]:
    """Choose rows, and say why that cannot be done; all arguments by row are in canonical order.

    The test is chosen first, and no row of it is held out. `hashes` choose a share of all rows, `private` ones a share
    of each class. `formats`: of dates that are text, by column.
    """
    faults: list[str] = []
    left = np.ones(len(hashes), np.bool_)
    masks = []
    for name, choice, at_end in (("test", choices.test, True), ("holdout", choices.holdout, False)):
        mask = np.zeros(len(hashes), np.bool_)
        try:
            mask = _mask(choice, columns, labels, hashes, private, formats, left, at_end=at_end)
            if choice != 0.0 and not mask.any():
                faults.append(f"{name}: no row is chosen{_by(choice)}; look at the column, and at what the job says")
        except Unusable as error:
            faults.append(f"{name}: {error}")
        masks.append(np.flatnonzero(mask).astype(np.int64))
        left &= ~mask
    if not left.any() and not faults:
        faults.append("holdout and test choose every row, and no row is left to train on")
    return Chosen(masks[1], masks[0]), faults


def _by(choice: Choice) -> str:
    return f" by column {choice.column!r}" if isinstance(choice, ByColumn) else ""


def _mask(
    choice: Choice,
    columns: Mapping[str, Any],
    labels: npt.NDArray[Any] | None,
    hashes: Hashes,
    private: Hashes,
    formats: Mapping[str, str | None],
    left: Mask,
    *,
    at_end: bool,
) -> Mask:
    """Return which of the rows that are `left` are chosen; a share takes the largest hashes `at_end`."""
    match choice:
        case ByColumn():
            if choice.column not in columns:
                raise Unusable(f"there is no column {choice.column!r} to choose rows by; a source gives it in a frame")
            return left & _by_column(choice, columns[choice.column], formats.get(choice.column))
        case Stratified():
            return _of_each_class(choice.share, labels, private, left, at_end=at_end)
        case _:
            return _share(choice, hashes, left, at_end=at_end)


def _share(share: float, hashes: Hashes, among: Mask, *, at_end: bool) -> Mask:
    """Choose a share of some rows by their hashes."""
    places = np.flatnonzero(among)
    ascending = places[np.argsort(hashes[places], kind="stable")]
    count = held_out(len(places), share)
    found = np.zeros(len(among), np.bool_)
    found[ascending[len(places) - count :] if at_end else ascending[:count]] = True
    return found


def _of_each_class(share: float, labels: npt.NDArray[Any] | None, hashes: Hashes, left: Mask, *, at_end: bool) -> Mask:
    """Choose the same share of the rows of each class, and of those whose label is missing."""
    if labels is None or labels.ndim != 1:
        raise Unusable("stratify needs one label a row")
    unknown = np.isnan(labels)
    classes = np.unique(labels[~unknown])
    if len(classes) > MOST_CLASSES or (labels.dtype.kind == "f" and not (classes == np.floor(classes)).all()):
        raise Unusable("stratify needs labels that are classes, whole numbers; these are not")
    found = _share(share, hashes, left & unknown, at_end=at_end)
    for value in classes:
        found |= _share(share, hashes, left & (labels == value), at_end=at_end)
    return found


def _by_column(choice: ByColumn, column: Any, pattern: str | None) -> Mask:
    if choice.values is not None:
        found = texts(column)
        _require_all(choice, len(found), found.null_count)
        wanted = texts(pa.array([_as_text(value) for value in choice.values], pa.large_string()))
        return np.asarray(pc.is_in(found, wanted).to_numpy(zero_copy_only=False), np.bool_)
    values = _dates(choice, column, pattern) if _is_dated(choice) else _numbers(choice, column)
    found = np.ones(len(values), np.bool_)
    if choice.first is not None:
        found &= values >= choice.first
    if choice.before is not None:
        found &= values < choice.before
    return np.asarray(found, np.bool_)


def _is_dated(choice: ByColumn) -> bool:
    return isinstance(choice.first, str) or isinstance(choice.before, str)


def _numbers(choice: ByColumn, column: Any) -> npt.NDArray[Any]:
    try:
        values = numbers(column)
    except Unusable:
        raise Unusable(f"column {choice.column!r} is {kind_of(column)}, and the job gives numbers as bounds") from None
    _require_all(choice, len(values), int(np.isnan(values).sum()))
    return values


def _dates(choice: ByColumn, column: Any, pattern: str | None) -> npt.NDArray[Any]:
    """Return dates as text in ISO 8601, as far as the file writes them: 2026-01 stands for that month."""
    types = pa.types
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    is_date = types.is_date(column.type) or types.is_timestamp(column.type)
    if is_date or pattern is not None:
        try:
            column = days(column, pattern).cast(pa.string())
        except Unusable as error:
            raise Unusable(f"column {choice.column!r}: {error}") from None
    elif not (types.is_string(column.type) or types.is_large_string(column.type)):
        raise Unusable(f"column {choice.column!r} is {kind_of(column)}, and the job gives dates as bounds")
    found = texts(pc.utf8_trim_whitespace(column.cast(pa.large_string())))
    _require_all(choice, len(found), found.null_count)
    try:
        require_offsets(found)
    except Unusable as error:
        raise Unusable(f"column {choice.column!r}: {error}") from None
    found = pc.coalesce(days_in_utc(found).cast(pa.large_string()), found)
    if wrong := len(found) - (pc.sum(pc.match_substring_regex(found, _ISO)).as_py() or 0):
        raise Unusable(
            f"column {choice.column!r}: {wrong} of {len(found)} values are not dates like 2026-01-31 or 2026-01; give "
            'their form in [features]: { kind = "date", format = "%d.%m.%Y" }'
        )
    return np.asarray(found.to_numpy(zero_copy_only=False), np.str_)


def _require_all(choice: ByColumn, n_rows: int, gaps: int) -> None:
    if gaps:
        raise Unusable(
            f"column {choice.column!r} is empty in {gaps} of {n_rows} rows, and nothing says on which side they are; "
            "fill it, or leave those rows out"
        )


def _as_text(value: str | int | float | bool) -> str:
    """Write a value of the job as `texts` writes one of a column."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

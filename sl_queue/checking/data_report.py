"""A party's table as a data scientist looks at it first: rows, labels, columns, memory, and what [features] makes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sl_queue.checking.findings import Check
from sl_queue.compute.weighting import known_rows
from sl_queue.data.feature_report import describe
from sl_queue.data.features import Fitted
from sl_queue.protocol.exactness import BITS, rounded
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.table import Table
from sl_queue.protocol.text import counted, size

CLASSES = 20  # different labels, up to which each is counted
FAR = 1000.0  # a column that goes beyond this is not scaled
NARROW = 1e-3  # nor is one that varies by less than this
SHOWN = 8  # columns that a line names


def report_data(check: Check, party: str, table: Table, batches: Batches) -> None:
    """Tell what the table holds; counts and names of columns, never a row."""
    split = batches.training_positions, batches.holdout_positions, batches.test_positions
    if batches.test_rows:
        check.note(
            f"{party}: {counted(batches.test_rows, 'row is', 'rows are')} for a test, and a run never touches them"
        )
    if batches.chosen is not None and table.labels is not None:
        check.note(f"{party}: chooses {batches.holdout_rows} of {table.n_rows} rows to hold out, and tells which")
    for line in _about_labels(table, split):
        check.note(f"{party}: {line}")
    if table.features is None:
        return
    check.note(f"{party}: features take {size(table.features.nbytes)} of memory as {table.features.dtype}")
    if table.fitted is not None:
        for line in describe(Fitted.of_json(table.fitted)):
            check.note(f"{party}: [features] {line.strip()}")
    for line in _about_columns(table, split[0]):
        check.warn(f"{party}: {line}")


def _about_labels(table: Table, split: Sequence[Any]) -> Iterator[str]:
    """Yield how many labels of each class are trained on, held out, and for a test."""
    labels = table.labels
    if labels is None or labels.ndim != 1 or not len(labels):
        return
    known = known_rows(labels)
    training, held_out, test = parts = [labels[positions][known[positions]] for positions in split]
    if gaps := len(labels) - int(known.sum()):
        yield f"{counted(gaps, 'label is', 'labels are')} missing, and {'counts' if gaps == 1 else 'count'} for nothing"
    classes = np.unique(labels[known])
    if len(classes) > CLASSES:
        means = [
            f"{part.mean():.6g} where {where}"
            for part, where in ((training, "trained on"), (held_out, "held out"))
            if len(part)
        ]
        yield f"labels go from {classes[0]:.6g} to {classes[-1]:.6g}, mean {', '.join(means)}"
        return
    for value in classes:
        counts = [int((part == value).sum()) for part in parts]
        shares = [f" ({count / len(part):.1%})" if len(part) else "" for count, part in zip(counts, parts, strict=True)]
        told = f", {counts[2]} for a test{shares[2]}" if len(test) else ""
        trained = f"{counted(counts[0], 'row', 'rows')} trained on{shares[0]}"
        yield f"label {value:g}: {trained}, {counts[1]} held out{shares[1]}{told}"


def _about_columns(table: Table, training: Any) -> Iterator[str]:
    """Yield what will hinder training: constant and unscaled columns, and whole numbers that float32 rounds."""
    features = table.features
    if features is None or features.ndim != 2 or table.columns is None or not len(training):
        return
    rows = features[training]
    low, high = rows.min(axis=0), rows.max(axis=0)
    constant = [name for name, one in zip(table.columns, low == high, strict=True) if one and not _expected(name)]
    if constant:
        yield f"constant among the training rows: {_named(constant)}; exclude it, it carries no information"
    if table.fitted is not None:
        return
    spread = rows.std(axis=0, dtype=np.float64)
    far = np.maximum(np.abs(low.astype(np.float64)), np.abs(high.astype(np.float64))) > FAR
    unscaled = far | ((spread < NARROW) & (low != high))
    names = [name for name, one in zip(table.columns, unscaled, strict=True) if one]
    if names:
        yield (
            f"not scaled: {_named(names)}; models learn better from standardised columns: `sl-queue features --write` "
            "proposes a [features]"
        )
    if np.issubdtype(features.dtype, np.integer):
        large = [name for place, name in enumerate(table.columns) if rounded(features[:, place], "float32").any()]
        if large:
            yield f"whole numbers beyond 2**{BITS['float32']}, which float32 rounds: {_named(large)}; scale them"


def _expected(name: str) -> bool:
    """Return True for a place that [features] keeps for what may come: rare and missing values."""
    return name.endswith(("=other", " missing"))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"column{'s'[: len(names) > 1]} {', '.join(map(repr, names[:SHOWN]))}{more}"

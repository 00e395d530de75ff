"""Tables to look at when a run has ended, besides its metrics: who was mistaken for whom, and how sure it was.

Tables of plain numbers, of a bounded size, so that a line of the history holds them.
"""

import torch
from torch import Tensor

from sl_queue.compute.other_metrics import Task

Rows = list[list[float]]
MOST_CLASSES = 50  # more make a table that nobody reads
_BINS, _THRESHOLDS = 10, tuple(x / 10 for x in range(1, 10))


def tables_of(task: Task, scores: Tensor, targets: Tensor, weights: Tensor | None = None) -> dict[str, Rows] | None:
    """Return the tables of these predictions, each a list of rows; None of numbers.

    `confusion`: a row for each true class, in it how many were taken for each. `calibration`: of ten ranges of the
    probability [from, to, rows, mean probability, share that was right]; of several classes that of the likeliest.
    `thresholds`, of binary ones: [threshold, precision, recall, f1, accuracy]. Rows count by their weights.
    """
    counts = torch.ones(len(targets), dtype=torch.float64) if weights is None else weights.double()
    match task:
        case Task.REGRESSION:
            return None
        case Task.BINARY:
            confusion = _confusion((scores > 0.5).long(), targets, counts, 2)
            chances, right = scores, targets
        case Task.MULTICLASS:
            chances, guessed = scores.max(1)
            confusion = _confusion(guessed, targets, counts, scores.shape[1])
            right = (guessed == targets).long()
    found = {"calibration": _calibration(chances, right.double(), counts)}
    if len(confusion) <= MOST_CLASSES:
        found["confusion"] = confusion
    if task is Task.BINARY:
        found["thresholds"] = [_at(threshold, scores, targets, counts) for threshold in _THRESHOLDS]
    return found


def _confusion(guessed: Tensor, targets: Tensor, counts: Tensor, classes: int) -> Rows:
    flat = torch.zeros(classes * classes, dtype=torch.float64)
    flat.index_add_(0, targets * classes + guessed, counts)
    return [list(map(float, row)) for row in flat.reshape(classes, classes)]


def _calibration(chances: Tensor, right: Tensor, counts: Tensor) -> Rows:
    places = (chances * _BINS).long().clamp(0, _BINS - 1)
    found = []
    for place in range(_BINS):
        there = places == place
        whole = float(counts[there].sum())
        if whole:
            means = (float((values[there] * counts[there]).sum()) / whole for values in (chances, right))
            found.append([place / _BINS, (place + 1) / _BINS, whole, *means])
    return found


def _at(threshold: float, scores: Tensor, targets: Tensor, counts: Tensor) -> list[float]:
    guessed = scores > threshold
    hits = float(counts[guessed & (targets == 1)].sum())
    wrong = float(counts[guessed & (targets == 0)].sum())
    missed = float(counts[~guessed & (targets == 1)].sum())
    whole = float(counts.sum())
    precision = hits / (hits + wrong) if hits + wrong else 0.0
    recall = hits / (hits + missed) if hits + missed else 0.0
    below = 2 * hits + wrong + missed
    return [threshold, precision, recall, 2 * hits / below if below else 0.0, (whole - wrong - missed) / (whole or 1.0)]

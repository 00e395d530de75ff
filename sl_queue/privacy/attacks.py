"""Attacks of a curious party, as numbers: what it reads of labels from gradients, and of columns from activations.

Every AUC is two-sided: which side is which the attacker learns from one known label, so 0.1 leaks as much as 0.9. Of
several classes an AUC is the mean over each class against the rest. Nothing here is random but what `rng` draws.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float64]  # (rows, numbers)
Classes = npt.NDArray[np.int64]  # (rows,): the class of each
Rng = np.random.Generator

_RIDGE = 1e-3  # of the variance: enough to invert, too little to matter
_HIDDEN = 128  # of the small network
_SHUFFLES = 3  # that the chance line is a mean of


def auc(positive: npt.NDArray[np.bool_], score: npt.NDArray[np.float64]) -> float:
    """Return the two-sided area under the ROC curve, ties counted half; 0.5 without rows on both sides."""
    return auc_of_ranks(positive, ranks_of(score)) if positive.any() and not positive.all() else 0.5


def auc_of_ranks(positive: npt.NDArray[np.bool_], ranks: npt.NDArray[np.float64]) -> float:
    """Return `auc` of scores whose ranks are known, for several ways to part the rows."""
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return 0.5
    one = (ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
    return float(max(one, 1 - one))


def ranks_of(score: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the rank of each score, from 1; equal ones share the mean of theirs."""
    order = np.argsort(score)
    ascending = score[order]
    if (ascending[1:] == ascending[:-1]).any():
        _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
        shared: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[place]
        return shared
    ranks = np.empty(len(score))
    ranks[order] = np.arange(1, len(score) + 1)
    return ranks


def each_class(labels: Classes, scores: Callable[[npt.NDArray[np.bool_]], npt.NDArray[np.float64]]) -> float:
    """Return the mean AUC over the classes of what `scores` says of each against the rest; of two, of the rarer."""
    classes = scored(labels)
    return float(np.mean([auc(labels == c, scores(labels == c)) for c in classes])) if len(classes) else 0.5


def of_ranks(labels: Classes, ranks: npt.NDArray[np.float64]) -> float:
    """Return the same of one score, whose ranks are known, for every class."""
    classes = scored(labels)
    return float(np.mean([auc_of_ranks(labels == c, ranks) for c in classes])) if len(classes) else 0.5


def scored(labels: Classes) -> Classes:
    """Return the classes that an AUC is a mean over: of two the rarer, of more all, of one none."""
    classes, counts = counted(labels)
    if len(classes) < 2:
        return classes[:0]
    return classes[[int(counts.argmin())]] if len(classes) == 2 else classes


def counted(labels: Classes) -> tuple[Classes, Classes]:
    """Return the classes that occur, ascending, and how often each does."""
    counts = np.bincount(labels)
    classes = np.flatnonzero(counts)
    return classes, counts[classes]


def others(count: int, known: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the places below `count` that are not known, ascending."""
    unknown = np.ones(count, bool)
    unknown[known] = False
    return np.flatnonzero(unknown)


def directions(rows: Rows) -> Rows:
    """Return each row with norm 1; a row of zeros stays one."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


# On gradients ---------------------------------------------------------------------------------------------------


def norm(gradients: Rows, labels: Classes) -> float:
    """Return the AUC of the gradient's length: rare classes have longer ones (Li et al. 2022)."""
    return of_ranks(labels, ranks_of(np.linalg.norm(gradients, axis=1)))


def direction(unit: Rows, labels: Classes, rng: Rng) -> float:
    """Return the AUC of the likeness to one row whose class is known; the mean over a few such rows."""
    classes = scored(labels)
    known = 5 if len(classes) == 1 else 1

    def score(of_class: npt.NDArray[np.bool_]) -> float:
        members = np.flatnonzero(of_class)
        chosen = rng.choice(members, min(known, len(members)), replace=False)
        return float(np.mean([auc(of_class, likeness) for likeness in unit[chosen] @ unit.T]))

    return float(np.mean([score(labels == c) for c in classes])) if len(classes) else 0.5


def spectral(unit: Rows, labels: Classes) -> float:
    """Return the AUC of the main direction in which gradients differ: clustering, with no row known."""
    return along(main_directions(unit, len(counted(labels)[0])), labels)


def along(main: Rows, labels: Classes) -> float:
    """Return the AUC of the best of these directions for each class, (directions, rows)."""
    ranks, classes = [ranks_of(each) for each in main], scored(labels)
    found = [max(auc_of_ranks(labels == c, each) for each in ranks) for c in classes] if ranks else []
    return float(np.mean(found)) if found else 0.5


def main_directions(unit: Rows, classes: int) -> Rows:
    """Return the rows along the directions in which they differ most: one for two classes, else as many as classes."""
    if len(unit) < 2:
        return np.zeros((0, len(unit)))
    centred = unit - unit.mean(0)
    found: Rows = (centred @ np.linalg.eigh(centred.T @ centred)[1][:, -(1 if classes <= 2 else classes) :]).T
    return found


def chance(scores: Rows, labels: Classes, rng: Rng) -> float:
    """Return what the best of these scores, (attacks, rows), says of shuffled labels: above 0.5 by chance alone."""
    ranks, found = [ranks_of(score) for score in scores], []
    for _ in range(_SHUFFLES):
        shuffled = rng.permutation(labels)
        found.append(max((of_ranks(shuffled, each) for each in ranks), default=0.5))
    return float(np.mean(found))


def completion(rows: Rows, labels: Classes, rng: Rng, known: int = 40) -> float:
    """Return the AUC of a linear model that is fitted on a few rows whose labels are known, on all others."""
    classes, counts = counted(labels)
    each = max(1, min(known // max(len(classes), 1), int(counts.min()) // 2)) if len(classes) else 0
    if len(classes) < 2 or int(counts.min()) < 2:
        return 0.5
    shown = np.concatenate([rng.choice(np.flatnonzero(labels == c), each, replace=False) for c in classes])
    rest = others(len(labels), shown)
    wanted = (labels[shown][:, None] == classes).astype(np.float64)
    scores = ridge(rows[shown], wanted, rows[rest])
    return each_class(
        labels[rest], lambda of_class: scores[:, int(np.flatnonzero(classes == labels[rest][of_class][0])[0])]
    )


def one_of_each(unit: Rows, labels: Classes, rng: Rng) -> float:
    """Return the share of labels that are read with one known row of each class, by likeness."""
    classes = counted(labels)[0]
    known = np.array([rng.choice(np.flatnonzero(labels == c)) for c in classes])
    rest = others(len(labels), known)
    nearest = classes[np.argmax(unit[rest] @ unit[known].T, axis=1)]
    return float((nearest == labels[rest]).mean()) if len(rest) else 1.0


# On activations -------------------------------------------------------------------------------------------------


def reconstruction(seen: Rows, columns: Rows, rng: Rng, known: int = 100, *, network: bool = False) -> float:
    """Return the share of the columns' variance that is recovered from what is seen, with some rows known; from 0."""
    return together(recovered(seen, columns, rng, known, network=network), columns)


def together(each: npt.NDArray[np.float64], columns: Rows) -> float:
    """Return the share of all columns' variance, from the share of each."""
    variance = columns.var(axis=0)
    total = float(variance.sum())
    return max(0.0, float((each * variance).sum()) / total) if total > 0 else 0.0


def attribute(seen: Rows, columns: Rows, rng: Rng, known: int = 100) -> float:
    """Return the share of variance that is recovered of the one column that is recovered best."""
    each = recovered(seen, columns, rng, known, network=False)
    return max(0.0, float(each.max())) if each.size else 0.0


def attribute_raw(columns: Rows, rng: Rng, known: int = 100) -> float:
    """Return the same from the other columns alone, as whoever knows a row but for one column has it anyway."""
    if columns.shape[1] < 2:
        return 0.0
    tried = range(min(columns.shape[1], 32))
    found = [recovered(np.delete(columns, c, 1), columns[:, [c]], rng, known, network=False)[0] for c in tried]
    return max(0.0, float(max(found)))


def recovered(
    seen: Rows, columns: Rows, rng: Rng, known: int = 100, *, network: bool = False
) -> npt.NDArray[np.float64]:
    """Return the share of variance that is recovered of each column, on the rows that are not known; may be below 0."""
    known = min(known, len(seen) // 2)
    order = rng.permutation(len(seen))
    shown, rest = order[:known], order[known:]
    if known < 2:
        return np.zeros(columns.shape[1])
    features = _hidden(seen, shown, rng) if network else seen
    guess = ridge(features[shown], columns[shown], features[rest])
    missed = ((columns[rest] - guess) ** 2).sum(0)
    varies = ((columns[rest] - columns[shown].mean(0)) ** 2).sum(0)
    found: npt.NDArray[np.float64] = np.where(varies > 0, 1 - missed / np.where(varies > 0, varies, 1.0), 0.0)
    return found


def _hidden(seen: Rows, shown: npt.NDArray[np.int64], rng: Rng) -> Rows:
    """Return the rows with a layer of ReLUs beside them: a network whose last layer alone is fitted."""
    spread = seen[shown].std(0)
    scaled = (seen - seen[shown].mean(0)) / np.where(spread > 0, spread, np.inf)
    weights = rng.standard_normal((seen.shape[1], _HIDDEN)) / np.sqrt(max(seen.shape[1], 1))
    return np.hstack([scaled, np.maximum(scaled @ weights + rng.standard_normal(_HIDDEN), 0)])


def ridge(inputs: Rows, targets: Rows, new: Rows) -> Rows:
    """Return what a ridge regression says of new rows, (new, targets); its strength is chosen by leaving one out."""
    middle, scale = inputs.mean(0), inputs.std(0)
    scale = np.where(scale > 1e-9 * max(float(scale.max(initial=0.0)), 1e-30), scale, np.inf)
    a, mean = (inputs - middle) / scale, targets.mean(0)
    u, squares = _directions_of(a)
    projected, best = u.T @ (targets - mean), (np.inf, 0.0)
    for strength in len(a) * np.array([_RIDGE, 1e-2, 1e-1, 1.0, 10.0]):
        shrink = squares / (squares + strength)
        leverage = np.clip((u**2) @ shrink + 1 / len(a), 0, 1 - 1e-6)
        missed = (targets - mean - u @ (shrink[:, None] * projected)) / (1 - leverage)[:, None]
        best = min(best, (float((missed**2).sum()), float(strength)))
    weights = a.T @ (u @ (projected / (squares + best[1])[:, None]))
    found: Rows = (new - middle) / scale @ weights + mean
    return found


def _directions_of(a: Rows) -> tuple[Rows, Rows]:
    """Return the left singular vectors of a matrix, and the squares of its singular values."""
    if len(a) < a.shape[1]:  # takes less, and loses digits that a ridge does not look at
        squares, u = np.linalg.eigh(a @ a.T)
        return u, np.maximum(squares, 0.0)
    u, s, _ = np.linalg.svd(a, full_matrices=False)
    return u, s**2

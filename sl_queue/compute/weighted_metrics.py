"""The usual metrics of rows that do not count alike: as scikit-learn computes them with sample_weight."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sl_queue.compute.other_metrics import Task

WeightedMetric = Callable[[Tensor, Tensor, Tensor], float | None]  # (predictions, targets, weights), flat


def weighted_metrics(task: Task) -> Mapping[str, WeightedMetric]:
    """Return every metric of a task by name."""
    match task:
        case Task.BINARY:
            return {
                "auroc": _auroc,
                "accuracy": lambda p, y, w: _mean(((p > 0.5).long() == y).double(), w),
                "f1": lambda p, y, w: _fbeta((p > 0.5).long(), y, w, 1),
                "precision": lambda p, y, w: _fbeta((p > 0.5).long(), y, w, 0),
                "recall": lambda p, y, w: _recall((p > 0.5).long(), y, w, 1),
                "average_precision": _average_precision,
            }
        case Task.MULTICLASS:
            return {
                "auroc": _each_class(_auroc),
                "accuracy": lambda p, y, w: _mean((p.argmax(1) == y).double(), w),
                "f1": lambda p, y, w: _macro(lambda g, t: _fbeta(g, t, w, 1), p, y),
                "precision": lambda p, y, w: _macro(lambda g, t: _fbeta(g, t, w, 0), p, y),
                "recall": lambda p, y, w: _macro(lambda g, t: _recall(g, t, w, 1), p, y),
                "average_precision": _each_class(_average_precision),
            }
        case Task.REGRESSION:
            return {
                "mse": lambda p, y, w: _mean((p - y) ** 2, w),
                "rmse": lambda p, y, w: _mean((p - y) ** 2, w) ** 0.5,
                "mae": lambda p, y, w: _mean((p - y).abs(), w),
                "r2": _r2,
            }


def _mean(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum())


def _recall(guessed: Tensor, targets: Tensor, weights: Tensor, label: int) -> float:
    whole = float(weights[targets == label].sum())
    return float(weights[(targets == label) & (guessed == label)].sum()) / whole if whole else 0.0


def _fbeta(guessed: Tensor, targets: Tensor, weights: Tensor, beta: float) -> float:
    """Precision for a beta of 0, F1 for 1."""
    hits = float(weights[(guessed == 1) & (targets == 1)].sum())
    wrong = float(weights[(guessed == 1) & (targets == 0)].sum())
    missed = float(weights[(guessed == 0) & (targets == 1)].sum())
    below = (1 + beta**2) * hits + beta**2 * missed + wrong
    return (1 + beta**2) * hits / below if below else 0.0


def _macro(metric: Callable[[Tensor, Tensor], float], scores: Tensor, targets: Tensor) -> float:
    """Return the mean over the classes that are there or were guessed."""
    guessed = scores.argmax(1)
    there = [c for c in range(scores.shape[1]) if bool(((targets == c) | (guessed == c)).any())]
    return sum(metric((guessed == c).long(), (targets == c).long()) for c in there) / len(there)


def _each_class(metric: WeightedMetric) -> WeightedMetric:
    """Return the mean of one class against the rest, over the classes that define it."""

    def mean(scores: Tensor, targets: Tensor, weights: Tensor) -> float | None:
        found = [metric(scores[:, c], (targets == c).long(), weights) for c in range(scores.shape[1])]
        defined = [value for value in found if value is not None]
        return sum(defined) / len(defined) if defined else None

    return mean


def _curve(scores: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the weights of ones and zeros above each threshold, highest first; None if there is only one kind."""
    order = scores.argsort(descending=True, stable=True)
    scores, targets, weights = scores[order], targets[order], weights[order].double()
    ends = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])
    hits, wrong = (weights * targets).cumsum(0)[ends], (weights * (1 - targets)).cumsum(0)[ends]
    return (hits, wrong) if float(hits[-1]) > 0 and float(wrong[-1]) > 0 else None


def _auroc(scores: Tensor, targets: Tensor, weights: Tensor) -> float | None:
    curve = _curve(scores, targets, weights)
    if curve is None:
        return None
    hits, wrong = (torch.cat([torch.zeros(1, dtype=torch.float64), part]) for part in curve)
    return float(torch.trapezoid(hits / hits[-1], wrong / wrong[-1]))


def _average_precision(scores: Tensor, targets: Tensor, weights: Tensor) -> float | None:
    curve = _curve(scores, targets, weights)
    if curve is None:
        return None
    hits, wrong = curve
    steps = torch.diff(torch.cat([torch.zeros(1, dtype=torch.float64), hits / hits[-1]]))
    return float((steps * (hits / (hits + wrong)).nan_to_num()).sum())


def _r2(predicted: Tensor, targets: Tensor, weights: Tensor) -> float | None:
    middle = (targets * weights).sum() / weights.sum()
    whole = float((weights * (targets - middle) ** 2).sum())
    return 1 - float((weights * (targets - predicted) ** 2).sum()) / whole if whole else None

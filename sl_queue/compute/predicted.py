"""Outputs of the fuse model as the columns of a file: probability, class or value."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sl_queue.compute.other_metrics import Task
from sl_queue.compute.outputs import Outputs, numbers
from sl_queue.errors import ComputeError

Columns = Mapping[str, npt.NDArray[Any]]
Undo = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]  # (rows,) of two classes, or (rows, classes)


def columns_of(outputs: npt.NDArray[Any], task: str, meaning: str, undo: Undo | None = None) -> Columns:
    """Return the columns of `outputs`, shape (rows, *outputs): what a model of that task predicts for each row.

    binary: `probability` of the label 1, or `probability_0` and so on for several outputs. multiclass: `class`, and
    `probability_0` and so on. Anything else: `value`, or `value_0` and so on. `meaning` is one of Outputs.
    `undo` makes probabilities of labels of those of responses. Raises ComputeError for outputs that do not suit the
    task.
    """
    flat = torch.from_numpy(outputs).reshape(len(outputs), -1)
    match task:
        case Task.BINARY:
            chances = _probabilities(flat, meaning, flat.sigmoid)
            return _named("probability", _undone(chances, undo if flat.shape[1] == 1 else None))
        case Task.MULTICLASS:
            if flat.shape[1] < 2 or outputs.ndim != 2:
                raise ComputeError(f"a classification by outputs of shape (rows, {outputs.shape[1:]}): one per class")
            chances = _probabilities(flat, meaning, lambda: flat.softmax(1))
            return {"class": flat.argmax(1).numpy(), **_named("probability", _undone(chances, undo), several=True)}
        case _:
            return _named("value", numbers(flat, meaning))


def _probabilities(flat: torch.Tensor, meaning: str, from_logits: Any) -> torch.Tensor:
    match meaning:
        case Outputs.PROBABILITIES:
            return flat
        case Outputs.LOG_PROBABILITIES:
            return flat.exp()
        case _:
            found: torch.Tensor = from_logits()
            return found


def _undone(chances: torch.Tensor, undo: Undo | None) -> torch.Tensor:
    """Return probabilities of labels, shape (rows, 1) or (rows, classes) as given."""
    if undo is None:
        return chances
    given = chances[:, 0] if chances.shape[1] == 1 else chances
    return torch.from_numpy(undo(given.double().numpy())).to(chances.dtype).reshape(chances.shape)


def _named(name: str, values: torch.Tensor, *, several: bool = False) -> Columns:
    array = values.numpy()
    if array.shape[1] == 1 and not several:
        return {name: np.ascontiguousarray(array[:, 0])}
    return {f"{name}_{index}": np.ascontiguousarray(array[:, index]) for index in range(array.shape[1])}

"""Metrics beyond the usual ones: any of torchmetrics by its name with arguments, and the user's own in code."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from sl_queue.compute.names import plain_name
from sl_queue.errors import ComputeError, JobError
from sl_queue.ports import UserCode
from sl_queue.protocol.text import nearest

Metric = Callable[[Tensor, Tensor], float | None]  # (predictions, targets), both on the CPU

_PREFIXES = {"binary": "binary_", "multiclass": "multiclass_", "regression": ""}
_TRIED = 8  # rows


class Task(StrEnum):
    """Prediction task; it decides which metrics there are."""

    BINARY = "binary"  # one logit a row, or several independent ones, which are then pooled
    MULTICLASS = "multiclass"  # a logit for each class
    REGRESSION = "regression"


class OfRawOutputs:
    """A metric in code: called with the model's outputs and the labels as they are. Each call begins from nothing."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any], name: str) -> None:
        self._function, self._name = function, name

    def __call__(self, outputs: Tensor, labels: Tensor) -> float | None:
        function = copy.deepcopy(self._function) if isinstance(self._function, nn.Module) else self._function
        try:
            with torch.no_grad():
                found = function(outputs, labels)
        except (Exception, SystemExit) as error:
            raise ComputeError(f"{self._name} failed: {type(error).__name__}: {error}") from error
        return _number(found, self._name)


def made(metric: Any, where: str, code: UserCode) -> Metric:
    """Build a metric in code: a function, an object that is called, or a class built with the table's arguments."""
    options = {k: v for k, v in metric.items() if k not in ("name", "as")} if isinstance(metric, Mapping) else {}
    thing = metric["name"] if isinstance(metric, Mapping) else metric
    thing = code.load(thing) if isinstance(thing, str) else thing
    if inspect.isclass(thing):
        try:
            thing = thing(**options)
        except Exception as error:
            raise JobError(f"{where} cannot be built with {options}: {type(error).__name__}: {error}") from error
        options = {}
    if isinstance(thing, nn.Module) and any(p.requires_grad for p in thing.parameters()):
        raise JobError(f"{where} has parameters, which nothing trains; put it into the fuse model")
    if isinstance(thing, nn.Module) and type(thing).__module__.startswith("torchmetrics."):
        return OfRawOutputs(thing, where).__call__  # which takes what the metrics of the task take
    function = thing if not options else lambda outputs, labels: thing(outputs, labels, **options)
    return OfRawOutputs(function, where)


def torchmetric(metric: Any, task: Task, known: Iterable[str], where: str, classes: int) -> Metric:
    """Build a metric of torchmetrics by the name of its class or function, tried out. Raises JobError."""
    name = metric if isinstance(metric, str) else metric["name"]
    options = {} if isinstance(metric, str) else {k: v for k, v in metric.items() if k not in ("name", "as")}
    functions = _functions(task)
    key = plain_name(name)
    function = functions.get(key) or functions.get(f"{key}score") or functions.get(key.removesuffix("score"))
    if function is None:
        allowed = ", ".join(("loss", *known))
        advice = nearest(name, [*known, *functions])
        raise JobError(
            f"{where}: {name!r} is unknown for a {task} loss; allowed are {allowed}, those of torchmetrics, and "
            f"module:callable{f'; {advice.strip()}' if advice else ''}"
        )
    if task is Task.MULTICLASS:
        options = {"num_classes": classes, **options}

    def measured(predicted: Tensor, targets: Tensor) -> float | None:
        return _number(function(predicted, targets, **options), f"{where}: {name!r}")

    try:
        measured(*_trial(task, classes))
    except ComputeError as error:
        raise JobError(str(error)) from None
    except Exception as error:
        raise JobError(f"{where}: {name!r} with {options} fails: {type(error).__name__}: {error}") from error
    return measured


def _functions(task: Task) -> dict[str, Callable[..., Any]]:
    """Return the functions of torchmetrics for a task, by their names without prefix and underscores."""
    kind = "regression" if task is Task.REGRESSION else "classification"
    module, prefix = import_module(f"torchmetrics.functional.{kind}"), _PREFIXES[task]
    names = [name for name in vars(module) if name.startswith(prefix) and not name.startswith("_")]
    found = {plain_name(name.removeprefix(prefix)): getattr(module, name) for name in names}
    return {name: function for name, function in found.items() if inspect.isfunction(function)}


def _trial(task: Task, classes: int) -> tuple[Tensor, Tensor]:
    """Return predictions and targets of a few rows, as such metrics get them."""
    numbers = torch.arange(_TRIED, dtype=torch.float64)
    match task:
        case Task.BINARY:
            return (numbers + 1) / (_TRIED + 1), (numbers % 2).long()
        case Task.MULTICLASS:
            scores = torch.stack([((numbers + c) % classes) + 1.0 for c in range(classes)], dim=1)
            return scores / scores.sum(1, keepdim=True), numbers.long() % classes
        case Task.REGRESSION:
            return numbers + 1, numbers * 0.9 + 1.5


def _number(found: Any, name: str) -> float | None:
    """Return one number, None for one that these rows do not define."""
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if found is None or isinstance(found, bool | int | float):
        return None if found is None or found != found else float(found)
    if hasattr(found, "item") and getattr(found, "size", 0) == 1:
        return _number(found.item(), name)
    raise ComputeError(f"{name} returns {type(found).__name__}; a metric is one number")

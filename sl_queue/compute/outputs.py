"""Logits, probabilities or their logarithms: the meaning of the fuse model's output, on which metrics depend.

A named loss says it, and so do some of torch's. Otherwise it is read off the last node of the graph, and asked for
where that is not enough: numbers that never leave 0 to 1 may be probabilities, or logits of a small model.

Of a regression the output is the number itself, LOGITS, or what a loss makes the number of: its logarithm under a
Poisson loss, the logarithm of its odds under a cross-entropy of fractions.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn

from sl_queue.compute.losses import poisson
from sl_queue.compute.other_metrics import Task
from sl_queue.errors import JobError


class Outputs(StrEnum):
    """The meaning of the fuse model's output; the values of `outputs` in [fuse]."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    LOG_PROBABILITIES = "log_probabilities"
    LOGARITHMS = "logarithms"  # of a regression's numbers
    LOG_ODDS = "log_odds"  # of a regression's numbers, which are from 0 to 1


TAKES = {  # what a loss takes
    "bce_with_logits": Outputs.LOGITS,
    "bce": Outputs.PROBABILITIES,
    "cross_entropy": Outputs.LOGITS,
    nn.BCEWithLogitsLoss: Outputs.LOGITS,
    F.binary_cross_entropy_with_logits: Outputs.LOGITS,
    nn.CrossEntropyLoss: Outputs.LOGITS,
    F.cross_entropy: Outputs.LOGITS,
    nn.BCELoss: Outputs.PROBABILITIES,
    F.binary_cross_entropy: Outputs.PROBABILITIES,
    nn.SoftMarginLoss: Outputs.LOGITS,
    F.soft_margin_loss: Outputs.LOGITS,
    nn.NLLLoss: Outputs.LOG_PROBABILITIES,
    F.nll_loss: Outputs.LOG_PROBABILITIES,
}
_DEPENDING = {  # metrics that other outputs change; ranks and largest numbers stay what they are
    Task.BINARY: {"accuracy", "f1", "precision", "recall"},
    Task.MULTICLASS: {"auroc", "average_precision"},
    Task.REGRESSION: set(),
}
_SCALES = (1.0, 10.0, 100.0)  # of the activations on which the output's range is looked at
_ONE = 1e-3

_SAME_NUMBERS = (
    *("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Select", "Slice", "Index", "Transpose", "Permute"),
    *("T", "Clone", "ToCopy", "Alias", "Expand", "Movedim", "Unbind", "Split", "BackwardHookFunction"),
    *("Clamp", "ClampMin", "ClampMax", "Hardtanh"),  # as guards against log(0)
)
_JOINED = ("Cat", "Stack")
_ENDS = {
    "Sigmoid": Outputs.PROBABILITIES,
    "Hardsigmoid": Outputs.PROBABILITIES,
    "Softmax": Outputs.PROBABILITIES,
    "LogSoftmax": Outputs.LOG_PROBABILITIES,
    "LogSigmoid": Outputs.LOG_PROBABILITIES,
}


def ending(tensor: Tensor) -> Outputs | None:
    """Return the meaning of numbers that come out of a sigmoid or softmax, whatever their shape; None of others."""
    return None if tensor.grad_fn is None else _meaning(tensor.grad_fn)


def _meaning(node: Any) -> Outputs | None:
    name = node.name().partition("Backward")[0] if "HookFunction" not in node.name() else "BackwardHookFunction"
    before = [inner for inner, _ in node.next_functions if inner is not None]
    if name in _ENDS:
        return _ENDS[name]
    if name in _JOINED:
        found = {_meaning(inner) for inner in before}
        return found.pop() if len(found) == 1 else None
    if name in (*_SAME_NUMBERS, "Exp", "Log") and before:
        inner = _meaning(before[0])
        if name == "Exp":
            return Outputs.PROBABILITIES if inner is Outputs.LOG_PROBABILITIES else None
        if name == "Log":
            return Outputs.LOG_PROBABILITIES if inner is Outputs.PROBABILITIES else None
        return inner
    return None


def numbers(output: Tensor, meaning: str) -> Tensor:
    """Return the output of a regression on the scale of its labels."""
    match meaning:
        case Outputs.LOGARITHMS:
            return output.exp()
        case Outputs.LOG_ODDS:
            return output.sigmoid()
        case _:
            return output


def takes_logarithms(loss: Any) -> bool:
    """Return True for a Poisson loss of logarithms of rates, as it is unless `log_input` is false."""
    given = loss.keywords if isinstance(loss, partial) else {}
    while isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, nn.PoissonNLLLoss):
        return bool(loss.log_input)
    return loss in (poisson, F.poisson_nll_loss) and bool(given.get("log_input", True))


def outputs_of(
    declared: str | None,
    kind: Any,
    loss: Any,
    task: Task,
    metrics: Sequence[str],
    output: Tensor,
    scaled: Callable[[float], Tensor],
    where: str,
) -> Outputs:
    """Return the meaning of the output: the loss's, the declared one, or what the model ends in.

    `kind`: the name, class or function by which `loss` is known. `output` has its graph; `scaled(s)` is the output for
    activations s times as large, looked at only where nothing else tells. Raises JobError where it has to be declared,
    or is declared wrongly.
    """
    takes = TAKES.get(kind) if isinstance(kind, str) or callable(kind) else None
    key = f"{where} [fuse] outputs"
    if task is Task.REGRESSION:
        return _of_numbers(declared, takes, key, logarithms=takes_logarithms(loss), named=isinstance(kind, str))
    if declared is not None:
        return _of_classes(Outputs(declared), takes, output, f"{key} = {declared!r}")
    if takes is not None:
        return takes
    found = ending(output)
    asked = [name for name in metrics if name in _DEPENDING[task]]
    if found is not None or not asked:
        return found or Outputs.LOGITS
    return _by_range(_range(task, scaled), asked, key)


def _of_numbers(declared: str | None, takes: Outputs | None, key: str, *, logarithms: bool, named: bool) -> Outputs:
    """Return the meaning of a regression's output; `named`: its loss is one of ours. Raises as `outputs_of`."""
    if declared not in (None, Outputs.LOGARITHMS):
        raise JobError(f"{key} = {declared!r} has no use: this loss and these metrics are of numbers; leave it out")
    if declared is not None and named and not logarithms:
        raise JobError(f"{key} = {declared!r}, but the loss takes no logarithms of its labels; leave the key out")
    if logarithms or declared is not None:
        return Outputs.LOGARITHMS
    return Outputs.LOG_ODDS if takes is Outputs.LOGITS else Outputs.LOGITS


def _of_classes(declared: Outputs, takes: Outputs | None, output: Tensor, what: str) -> Outputs:
    """Return the meaning that a classification's output is said to have. Raises JobError if it cannot."""
    if declared is Outputs.LOGARITHMS:
        raise JobError(f'{what} is of numbers, and this is a classification; leave it out, or say task = "regression"')
    if takes not in (None, declared):
        raise JobError(f"{what}, but the loss takes {_said(takes)}; leave the key out")
    _require_range(declared, output, what)
    return declared


def _by_range(found: str, asked: Sequence[str], key: str) -> Outputs:
    """Return the meaning of an output that shows it by its range. Raises JobError if it may be either."""
    match found:
        case "distribution":
            return Outputs.PROBABILITIES
        case "unit":
            raise JobError(
                f"{key} is missing: {', '.join(asked)} of probabilities and of logits differ, and the fuse model's "
                f'output, which stays between 0 and 1, may be either; write outputs = "probabilities" or "logits"'
            )
        case _:
            return Outputs.LOGITS


def doubled(loss: Any, name: str, output: Tensor) -> str | None:
    """Return a warning if the loss applies what the model has applied before, or takes something else."""
    takes, found = TAKES.get(loss) if isinstance(loss, str) or callable(loss) else None, ending(output)
    if takes is None or found in (None, takes):
        if takes is Outputs.LOG_PROBABILITIES and found is None and bool((output > 0).any()):
            return f"{name} takes log-probabilities, and the fuse model's output is above 0: end it in a LogSoftmax"
        return None
    if found is Outputs.LOG_PROBABILITIES and loss in ("cross_entropy", nn.CrossEntropyLoss, F.cross_entropy):
        return None  # the softmax of log-probabilities changes nothing
    again = "applies another sigmoid or softmax to them" if takes is Outputs.LOGITS else f"takes {_said(takes)}"
    return (
        f"the fuse model ends in {_said(found)}, and {name} {again}: training suffers; take the model's last "
        "layer out, or take the loss that belongs to it"
    )


def _said(outputs: Outputs | None) -> str:
    match outputs:
        case Outputs.LOGITS:
            return "logits"
        case Outputs.PROBABILITIES:
            return "probabilities (a sigmoid or softmax)"
        case _:
            return "log-probabilities"


def _require_range(wanted: Outputs, output: Tensor, what: str) -> None:
    numbers = output.detach()[output.detach().isfinite()]
    if wanted is Outputs.PROBABILITIES and bool(((numbers < -_ONE) | (numbers > 1 + _ONE)).any()):
        raise JobError(f'{what}, but the fuse model puts out numbers beyond 0 and 1; write outputs = "logits"')
    if wanted is Outputs.LOG_PROBABILITIES and bool((numbers > _ONE).any()):
        raise JobError(f'{what}, but the fuse model puts out numbers above 0; write outputs = "logits"')


def _range(task: Task, scaled: Callable[[float], Tensor]) -> str:
    """Return "distribution" if rows add up to one, "unit" if outputs differ and stay within 0 and 1, else ""."""
    try:
        found = torch.cat([scaled(scale).detach().double() for scale in _SCALES])
    except Exception:  # a model that takes no such numbers says nothing about its range
        return ""
    found = found[found.flatten(1).isfinite().all(1)] if found.dim() > 1 else found[found.isfinite()]
    if not len(found) or not bool(((found >= 0) & (found <= 1)).all()) or bool((found == found.flatten()[0]).all()):
        return ""
    sums = found.sum(1) if task is Task.MULTICLASS else found.new_zeros(1)
    return "distribution" if bool(((sums - 1).abs() <= _ONE).all()) else "unit"

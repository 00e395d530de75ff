"""Labels of a regression that lie far from what the model puts out at first: it would take long to get there."""

from math import floor, isfinite, log10

import torch
from torch import Tensor

from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.other_metrics import Task
from sl_queue.compute.outputs import Outputs
from sl_queue.compute.stand_ins import drawn_inputs, fused

_FAR = 30.0  # an optimizer with a usual rate takes tens of thousands of steps there
_ROWS = 64
_NEAR = (Outputs.LOGARITHMS, Outputs.LOG_ODDS)  # of numbers, which may be large where the outputs are not


def far_labels(stage: TorchFuseStage) -> str | None:
    """Return a warning if the numbers that are trained on are far from the model's first outputs."""
    objective = stage.objective
    if objective.task is not Task.REGRESSION or objective.outputs in _NEAR or objective.shape not in ((), (1,)):
        return None
    rows, weighting = torch.from_numpy(stage.batches.training_positions), objective.weighting
    if weighting is not None and weighting.weights is not None:
        rows = rows[weighting.weights[rows] > 0]
    labels = objective.labels[rows].double().flatten()
    labels, first = labels[~labels.isnan()], _first_outputs(stage)
    if first is None or not len(labels):
        return None
    begins, spread = first.mean().item(), first.std().item()
    mean, deviation = labels.mean().item(), labels.std(correction=0).item()
    distance = (labels - begins).square().mean().sqrt().item()
    if not all(map(isfinite, (begins, spread, deviation, distance))):
        return None
    if deviation == 0.0 or distance <= _FAR * max(spread, 1.0):
        return None
    digits = 4 + max(0, floor(log10(max(abs(mean), deviation) / deviation)))
    return (
        f"the labels have mean {mean:.{digits}g} and standard deviation {deviation:.4g} where trained on, and the fuse "
        f"model begins with outputs around {begins:.2g}: training takes long to get there; have it put out "
        "mean + deviation * x"
    )


def _first_outputs(stage: TorchFuseStage) -> Tensor | None:
    """Return what the model makes of drawn activations; None if it does not take them."""
    model, layers = stage.model, stage.layers
    try:
        return model.try_out(fused(layers, drawn_inputs(layers, _ROWS, model.dtype, model.device))).double().cpu()
    except Exception:
        return None

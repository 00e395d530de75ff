"""Labels of a regression that lie far from what the model puts out at first: it would take long to get there."""

from collections.abc import Callable

from torch import Tensor

from sl_queue.compute.other_metrics import Task
from sl_queue.compute.outputs import Outputs

_FAR = 100.0  # times the spread of the first outputs; a model that scales them is a few away


def far_labels(task: Task, outputs: Outputs, labels: Tensor, scaled: Callable[[float], Tensor]) -> str | None:
    """Return a warning if numbers are far from the model's first outputs; None for several a row.

    `labels`: (rows,), NaN where one is not known. `scaled(s)` is the output for activations s times as large.
    """
    first = scaled(1.0).double().cpu()
    if task is not Task.REGRESSION or outputs is Outputs.LOGARITHMS or first[0].numel() > 1 or labels[:1].numel() != 1:
        return None
    known = labels.double().flatten()
    known = known[~known.isnan()]
    begins, spread = first.mean(), first.std()
    if not len(known) or (known - begins).square().mean().sqrt() <= _FAR * spread:
        return None
    mean, deviation = known.mean().item(), known.std(correction=0).item()
    return (
        f"the labels have mean {mean:.4g} and standard deviation {deviation:.4g}, and the fuse model begins with "
        f"outputs around {begins.item():.2g} that differ by {spread.item():.2g}: training takes long to get there; "
        "have it put out mean + deviation * x"
    )

"""Aggregation of activations into the fuse model's input."""

from functools import reduce
from typing import Literal, assert_never

import torch
from torch import Tensor

Aggregation = Literal["list", "concat", "sum", "mean"]


def aggregated(activations: list[Tensor], aggregation: Aggregation) -> list[Tensor] | Tensor:
    """Return the fuse model's input from the activations in job order, each (rows, *cut).

    `list` hands them over as they are; `concat` joins them along the first axis after the rows; `sum` and `mean` need
    equal cuts. Sums are taken in job order, so that they are the same bits everywhere.
    """
    match aggregation:
        case "list":
            return activations
        case "concat":
            return torch.cat(activations, dim=1)
        case "sum":
            return reduce(torch.add, activations)
        case "mean":
            return reduce(torch.add, activations) / len(activations)
        case _:
            assert_never(aggregation)

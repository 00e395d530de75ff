"""Aggregation of activations into the fuse model's input."""

from functools import reduce
from typing import Any, Literal, assert_never

import torch
from torch import Tensor

Aggregation = Literal["list", "concat", "sum", "mean"]


def aggregated(activations: list[Any], aggregation: Aggregation) -> list[Any] | Tensor:
    """Return the fuse model's input from the activations in job order, each (rows, *cut).

    `list` hands them over as they are, a dict of outputs too; `concat` joins them along the first axis after the rows;
    `sum` and `mean` need equal cuts. Sums are taken in job order, so that they are the same bits everywhere.
    """
    match aggregation:
        case "list":
            return activations
        case "concat":
            return torch.cat(activations, dim=1)
        case "sum":
            total: Tensor = reduce(torch.add, activations)
            return total
        case "mean":
            whole: Tensor = reduce(torch.add, activations)
            return whole / len(activations)
        case _:
            assert_never(aggregation)

"""A bank and an insurer with nothing wrong: what tests of one mistake start from."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sl_queue.protocol.messages import MicroBatch
from tests.support.split import Concatenated, Parties, Stages, parties

CPU = torch.device("cpu")
FIRST = MicroBatch(0, 0)
ROWS = 20


def setup(**changes: Any) -> Parties:
    """One feature party, `bank`, and a label holder with a base model, `insurer`; nothing is wrong with them."""
    draw = np.random.default_rng(5)
    features = {"bank": draw.normal(size=(ROWS, 3)), "insurer": draw.normal(size=(ROWS, 2))}
    settings: dict[str, Any] = {
        "bases": {"bank": nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "insurer": nn.Linear(2, 3)},
        "fuse": Concatenated(7, 1),
        "features": {party: columns.astype(np.float32) for party, columns in features.items()},
        "labels": draw.integers(0, 2, ROWS),
        "cuts": {"bank": [4], "insurer": [3]},
        "label_holder": "insurer",
        "batch_size": 8,
    }
    return parties(**settings | changes)


def stages(**changes: Any) -> Stages:
    return setup(**changes).stages()


def raised(kind: type[Exception], action: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert type(caught.value) is kind
    return str(caught.value)

"""Six applications that people bring from other frameworks: bases of two parties, a fuse model, rows.

Written from the public descriptions of the architectures: a deep network, DeepFM (Guo et al. 2017), the deep interest
network (Zhou et al. 2018), the behaviour sequence transformer (Chen et al. 2019), VGG and ResNet.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.architectures import Inverted, Residual

ROWS, VOCABULARY, HISTORY = 24, 11, 5


@dataclass(frozen=True, slots=True)
class Application:
    """Models and rows of a feature party "alice", and of "bob", who has the labels and a base model too or none."""

    bases: dict[str, nn.Module]
    fuse: nn.Module
    cuts: dict[str, Any]
    features: dict[str, Any]
    classes: int = 2
    loss: str = ""  # if not the usual one of so many classes


class Joined(nn.Module):
    """Lays its inputs side by side."""

    def __init__(self, inputs: int, outputs: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.layers(torch.cat(inputs, 1))  # type: ignore[no-any-return]


class FactorizationBase(nn.Module):
    """A party's columns in DeepFM: the deep part, the first order, the sum of the vectors and the sum of squares."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.embedding = nn.ModuleList([nn.Embedding(VOCABULARY, 4) for _ in range(columns)])
        self.first = nn.ModuleList([nn.Embedding(VOCABULARY, 1) for _ in range(columns)])
        self.deep = nn.Sequential(nn.Linear(4 * columns, 8), nn.ReLU())

    def forward(self, columns: list[Tensor]) -> list[Tensor]:
        vectors = torch.stack([layer(column) for layer, column in zip(self.embedding, columns, strict=True)], 1)
        first = torch.stack([layer(column) for layer, column in zip(self.first, columns, strict=True)], 1).sum(1)
        return [self.deep(vectors.flatten(1)), first, vectors.sum(1), vectors.square().sum(1)]


class FactorizationFuse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        deep, first, sums, squares = (inputs[place::4] for place in range(4))
        second = 0.5 * ((sums[0] + sums[1]).square() - squares[0] - squares[1]).sum(1, keepdim=True)
        return self.deep(torch.cat(deep, 1)) + first[0] + first[1] + second  # type: ignore[no-any-return]


class Interest(nn.Module):
    """Attention of a target to what the user has looked at, as the deep interest network has it."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        self.attention = nn.Sequential(nn.Linear(24, 8), nn.PReLU(), nn.Linear(8, 1))
        self.norm = nn.BatchNorm1d(12)

    def forward(self, columns: list[Tensor]) -> Tensor:
        history, target = columns
        seen, wanted = self.items(history), self.items(target).unsqueeze(1).expand(-1, HISTORY, -1)
        scores = self.attention(torch.cat([seen, wanted, seen - wanted, seen * wanted], 2))
        scores = scores.masked_fill((history == 0).unsqueeze(2), 0.0)
        return self.norm(torch.cat([(scores * seen).sum(1), wanted[:, 0]], 1))  # type: ignore[no-any-return]


class Behaviour(nn.Module):
    """A transformer over the history with the target at its end, as the behaviour sequence transformer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(VOCABULARY, 8), nn.Embedding(HISTORY + 1, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")

    def forward(self, columns: list[Tensor]) -> Tensor:
        sequence = torch.cat([columns[0], columns[1].unsqueeze(1)], 1)
        words = self.items(sequence) + self.places(torch.arange(HISTORY + 1, device=sequence.device))
        return self.encoder(words).flatten(1)  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """The rest of a network of images, behind the cut."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.layers(inputs[0])  # type: ignore[no-any-return]


def applications() -> dict[str, Application]:
    """Build all of them, always with the same weights and rows."""
    draw = np.random.default_rng(3)
    torch.manual_seed(11)
    numbers = {"alice": draw.normal(size=(ROWS, 6)).astype(np.float32), "bob": draw.normal(size=(ROWS, 4))}
    numbers["bob"] = numbers["bob"].astype(np.float32)
    codes = {p: [draw.integers(0, VOCABULARY, ROWS) for _ in range(n)] for p, n in (("alice", 3), ("bob", 2))}
    visits = {"alice": [draw.integers(0, VOCABULARY, (ROWS, HISTORY)), draw.integers(1, VOCABULARY, ROWS)]}
    images = {"alice": draw.normal(size=(ROWS, 3, 8, 8)).astype(np.float32)}
    dense = {p: nn.Sequential(nn.Linear(n, 8), nn.BatchNorm1d(8), nn.ReLU()) for p, n in (("alice", 6), ("bob", 4))}
    beside = {"bob": nn.Sequential(nn.Linear(4, 4), nn.ReLU())}
    vgg = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(True)]
    resnet = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True), Residual(4, 4)]
    return {
        "DNN": Application(dict(dense), Joined(16), {"alice": [8], "bob": [8]}, dict(numbers)),
        "DeepFM": Application(
            {"alice": FactorizationBase(3), "bob": FactorizationBase(2)},
            FactorizationFuse(),
            {party: [[8], [1], [4], [4]] for party in ("alice", "bob")},
            dict(codes),
        ),
        "DIN": Application(
            {"alice": Interest(), **beside}, Joined(16), {"alice": [12], "bob": [4]}, {**visits, "bob": numbers["bob"]}
        ),
        "BST": Application({"alice": Behaviour()}, Joined(48), {"alice": [48]}, dict(visits)),
        "VGG": Application(
            {"alice": nn.Sequential(*vgg)},
            Classifier(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(True), nn.Linear(16, 5)),
            {"alice": [8, 4, 4]},
            dict(images),
            classes=5,
        ),
        "ResNet": Application(
            {"alice": nn.Sequential(*resnet)},
            Classifier(Residual(4, 8, 2), Inverted(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
            {"alice": [4, 8, 8]},
            dict(images),
            classes=5,
        ),
    }

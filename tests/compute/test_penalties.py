"""A base model may return a loss of its own beside its activation: it is added where the model is."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue.errors import NonFiniteError, ShapeError
from sl_queue.protocol.schedule.row_order import row_order
from tests.support.resolved import train_joined
from tests.support.split import Concatenated, Parties, equal_weights, furthest, parties

ROWS, BATCH = 24, 12


class Encoder(nn.Module):
    """Reconstructs its input from what it sends, and keeps that small."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.encoder, self.decoder, self.scale = nn.Linear(3, 4), nn.Linear(4, 3), scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sent = torch.tanh(self.encoder(x))
        return sent, self.scale * ((self.decoder(sent) - x) ** 2).mean() + 0.1 * sent.abs().mean()


class Ignores(nn.Module):
    """A fuse model that looks at the last activation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.layer(inputs[-1])  # type: ignore[no-any-return]


def run_of(own: bool = False, fuse: Any = None, base: Any = None, **pipeline: Any) -> Parties:
    torch.manual_seed(2)
    draw = np.random.default_rng(4)
    names = ["a", "holder"] if own else ["a", "b"]
    features = {name: draw.normal(size=(ROWS, 3)).astype(np.float32) for name in names}
    return parties(
        {names[0]: base or Encoder(), names[1]: Encoder(0.5) if own else nn.Linear(3, 4)},
        fuse or Concatenated(8, 1),
        features,
        draw.integers(0, 2, ROWS),
        cuts={name: [4] for name in names},
        batch_size=BATCH,
        holdout=0.0,
        pipeline={"micro_batches": 4, "checkpoint_every": 1, **pipeline},
    )


def plain(run: Parties) -> dict[str, nn.Module]:
    modules = {name: copy.deepcopy(module).train() for name, module in run.given.items()}
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules.values()]
    labels = torch.from_numpy(run.tables[run.job.label_holder].labels).float()
    for epoch in range(run.job.epochs):
        order = row_order(ROWS, 7, epoch)
        for first in range(0, ROWS, BATCH):
            rows = order[first : first + BATCH]
            found = [modules[p](torch.from_numpy(run.tables[p].features[rows])) for p in run.job.fused]
            cuts = [each[0] if isinstance(each, tuple) else each for each in found]
            loss = nn.functional.binary_cross_entropy_with_logits(modules["fuse"](cuts)[:, 0], labels[rows])
            sum([each[1] for each in found if isinstance(each, tuple)], start=loss).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return modules


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("fuse", [None, Ignores])
def test_the_weights_are_those_of_one_loss_with_all_penalties(own: bool, fuse: Any) -> None:
    run = run_of(own, fuse and fuse())
    stages, wanted = run.stages().train(run.pipeline), plain(run)
    for name, module in stages.modules().items():
        assert furthest(module, wanted[name]) < 1e-6, name
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(ROWS))
    assert all(equal_weights(joined.bases[party], stages.modules()[party]) for party in run.job.fused)
    assert not torch.equal(stages.modules()["a"].decoder.weight, run.given["a"].decoder.weight)


@pytest.mark.parametrize("staleness", [0, 1])
def test_resumed_equals_undisturbed(staleness: int) -> None:
    run = run_of(staleness=staleness, depth=8)
    whole = run.stages().train(run.pipeline).modules()
    begun, fresh = run.stages().train(run.pipeline, stop_after=1), run.stages()
    for one, other in zip((*begun.bases.values(), begun.fuse), (*fresh.bases.values(), fresh.fuse), strict=True):
        other.load(one.state())
    resumed = fresh.train(run.pipeline, first_step=2).modules()
    assert all(equal_weights(resumed[name], module) for name, module in whole.items())


class Wrong(nn.Module):
    """Returns something beside its activation that is no penalty."""

    def __init__(self, beside: Any) -> None:
        super().__init__()
        self.layer, self.beside = nn.Linear(3, 4), beside

    def forward(self, x: Tensor) -> Any:
        sent = self.layer(x)
        return sent, self.beside if self.beside is not None else sent


@pytest.mark.parametrize(
    ("beside", "error", "words"),
    [
        (None, ShapeError, r"the penalty of .*Wrong is float32 \(2, 4\); it must be one number"),
        (0.5, ShapeError, "is float; it must be one number"),
        (torch.tensor(float("nan")), NonFiniteError, "the penalty of .*Wrong is nan"),
    ],
)
def test_what_is_no_penalty_is_refused(beside: Any, error: Any, words: str) -> None:
    with pytest.raises((ShapeError, NonFiniteError), match=words):
        run_of(base=Wrong(beside)).stages()

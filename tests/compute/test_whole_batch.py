"""Losses of whole batches: fuse model and loss see a step's rows at once, while the bases still work on parts."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue import run_local
from sl_queue.config.job import Job
from sl_queue.errors import JobError
from sl_queue.protocol.schedule.row_order import row_order
from tests.support.resolved import train_joined
from tests.support.split import Parties, Stages, equal_weights, furthest, parties

ROWS, BATCH = 24, 12


class Normalised(nn.Module):
    """A fuse model whose output of a row depends on all rows of the batch."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(inputs), nn.Linear(inputs, 1)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.layer(self.norm(torch.cat(inputs, 1)))  # type: ignore[no-any-return]


def ranking(output: Tensor, labels: Tensor) -> Tensor:
    """Every pair of rows counts: the batch is more than its parts."""
    scores, y = output.flatten(), labels.flatten()
    order = (y[:, None] - y[None, :]).sign()
    return nn.functional.softplus(-order * (scores[:, None] - scores[None, :])).mean()


def run_of(own: bool = False, whole: bool = True, loss: Any = ranking, **pipeline: Any) -> Parties:
    torch.manual_seed(2)
    draw = np.random.default_rng(4)
    names = ["a", "holder"] if own else ["a", "b"]
    features = {name: draw.normal(size=(ROWS, 3)).astype(np.float32) for name in names}
    labels = draw.normal(size=ROWS).astype(np.float32)
    bases = {name: nn.Sequential(nn.Linear(3, 4), nn.Tanh()) for name in names}
    run = parties(
        bases,
        Normalised(8),
        features,
        labels,
        cuts={name: [4] for name in names},
        loss=loss,
        batch_size=BATCH,
        pipeline={"micro_batches": 3, "checkpoint_every": 1, **pipeline},
    )
    fuse = {"aggregation": "list", "whole_batch": whole}
    return Parties(run.job.replace(fuse=fuse), run.files, run.tables, run.given)


def plain(run: Parties) -> dict[str, nn.Module]:
    """Return the joined layers trained on whole batches in plain PyTorch."""
    modules = {name: copy.deepcopy(module).train() for name, module in run.given.items()}
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules.values()]
    labels = torch.from_numpy(run.tables[run.job.label_holder].labels)
    for epoch in range(run.job.epochs):
        order = row_order(ROWS, 7, epoch)
        for first in range(0, ROWS, BATCH):
            rows = order[first : first + BATCH]
            cuts = [modules[p](torch.from_numpy(run.tables[p].features[rows])) for p in run.job.fused]
            ranking(modules["fuse"](cuts), labels[rows]).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return modules


@pytest.mark.parametrize("own", [False, True])
def test_micro_batches_give_the_weights_of_whole_batches(own: bool) -> None:
    run = run_of(own)
    stages, wanted = run.stages().train(run.pipeline), plain(run)
    for name, module in stages.modules().items():
        assert furthest(module, wanted[name]) < 1e-6, name
    parts = run_of(own, whole=False)
    assert furthest(parts.stages().train(parts.pipeline).modules()["fuse"], wanted["fuse"]) > 1e-3


@pytest.mark.parametrize("own", [False, True])
def test_split_equals_joined_bit_for_bit(own: bool) -> None:
    run = run_of(own)
    stages = run.stages().train(run.pipeline)
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(ROWS))
    assert equal_weights(joined.fuse, stages.modules()["fuse"])
    assert all(equal_weights(joined.bases[party], stages.modules()[party]) for party in run.job.fused)
    assert joined.losses == stages.losses


@pytest.mark.parametrize("pipeline", [{}, {"depth": 6, "staleness": 1}])
def test_resumed_at_every_step_equals_undisturbed(pipeline: dict[str, Any]) -> None:
    run = run_of(**pipeline)
    whole = run.stages().train(run.pipeline).modules()
    for step in range(3):
        begun = run.stages().train(run.pipeline, stop_after=step)
        fresh = run.stages()
        for one, other in zip((*begun.bases.values(), begun.fuse), (*fresh.bases.values(), fresh.fuse), strict=True):
            other.load(one.state())
        resumed = fresh.train(run.pipeline, first_step=step + 1).modules()
        assert all(equal_weights(resumed[name], module) for name, module in whole.items())


@pytest.mark.usefixtures("one_thread_and_fixed_draws")
@pytest.mark.parametrize("pipeline", [{}, {"depth": 5}, {"depth": 6, "staleness": 1}])
def test_a_run_of_threads_gives_the_same_weights(pipeline: dict[str, Any]) -> None:
    run = run_of(own=True, **pipeline)
    stages: Stages = run.stages().train(run.pipeline)
    result = run_local(run.job, [file.replace(threads=1) for file in run.files.values()])
    assert equal_weights(result.fuse, stages.modules()["fuse"])
    assert equal_weights(result.base("a"), stages.modules()["a"])
    assert [line["loss"] for line in result.history] == [
        pytest.approx(np.mean(stages.losses[first : first + 2])) for first in (0, 2)
    ]


def test_a_window_that_cannot_hold_a_step_is_refused() -> None:
    with pytest.raises(JobError, match=r"pipeline.depth = 2; with fuse.whole_batch .* which is 3"):
        run_of(depth=2)


def test_a_job_without_it_keeps_its_digest() -> None:
    run = run_of(whole=False)
    assert "whole_batch" not in run.job.canonical()["fuse"]
    assert run.job.replace(fuse={"aggregation": "list"}).digest == run.job.digest
    assert run_of().job.digest != run.job.digest
    assert isinstance(run.job, Job)

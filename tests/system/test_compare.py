"""`sl-queue compare`: a user's own job by all parties, by each alone, and joined in one process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue import Job, JobError, PartyFile, Rows
from sl_queue.local.comparing import compare, lines
from tests.support.credit import write_credit
from tests.support.forked import sl_queue
from tests.support.split import Concatenated

ROWS = 300


def job_of(fuse: nn.Module, cut: Any = (4,), base: Any = None, **settings: Any) -> tuple[Job, list[PartyFile]]:
    """Build a job whose labels only both parties together know, and neither alone."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    a, b = (draw.normal(size=(ROWS, 2)).astype(np.float32) for _ in range(2))
    labels = (a[:, 0] + b[:, 0] > 0).astype(np.int64)
    adam = {"name": "adam", "lr": 0.02}
    make = base or (lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh()))
    files = [
        PartyFile(party="a", data=Rows(np.arange(ROWS), a), base={"model": make(), "optimizer": adam}),
        PartyFile(
            party="b",
            data=Rows(np.arange(ROWS), b, labels),
            base={"model": make(), "optimizer": adam},
            fuse={"model": fuse, "optimizer": adam, "loss": "bce_with_logits", "metrics": ["auroc"]},
        ),
    ]
    roles = {"a": {"role": "feature", "cut": cut}, "b": {"role": "label", "cut": cut}}
    shape = {"name": "worth", "seed": 3, "epochs": 15, "batch_size": 50, "holdout": 0.3}
    return Job(**{**shape, **settings}, parties=roles), files


def test_together_they_know_more_than_each_alone_and_nothing_is_lost() -> None:
    job, files = job_of(Concatenated(8, 1))
    joint, a, b, joined = compare(job, files)
    assert [o.name for o in (joint, a, b)] == ["joint: all parties", "a alone", "b alone"]
    found = {o.name: o.measures["auroc"] for o in (joint, a, b)}
    assert all(value is not None for value in found.values())
    together, *alone = (float(value or 0) for value in found.values())
    assert together > max(alone)
    assert min(alone) > 0.5, "each knows something"
    assert joined.name == "joined in one process: weights differ by at most 0"
    assert joined.measures == joint.measures
    text = list(lines([joint, a, b, joined]))
    assert text[0].split() == ["loss", "auroc"]
    assert len(text) == 5


class Ratio(nn.Module):
    """A fuse model that divides by what a party sends."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.linear(inputs[1] / inputs[0].norm(dim=1, keepdim=True))  # type: ignore[no-any-return]


def test_a_way_that_cannot_be_trained_is_told_beside_the_others() -> None:
    outcomes = list(compare(*job_of(Ratio(), epochs=2)))
    (fault,) = [outcome for outcome in outcomes if outcome.fault]
    assert fault.name == "b alone"
    assert "NaN" in fault.fault
    assert any("no model: " in line for line in lines(outcomes))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.linear(x)
        return {"logit": found[:, :1], "rest": found[:, 1:]}


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, inputs: list[dict[str, Tensor]]) -> Tensor:
        deep = self.linear(torch.cat([each["rest"] for each in inputs], 1))
        return deep + inputs[0]["logit"] + inputs[1]["logit"]  # type: ignore[no-any-return]


def test_parties_with_several_outputs_are_silenced_too() -> None:
    outcomes = list(compare(*job_of(Both(), {"logit": [1], "rest": [4]}, Two, epochs=2, holdout=0.0)))
    assert not any(outcome.fault for outcome in outcomes)
    assert list(outcomes[0].measures) == ["training loss"]


def test_a_party_file_that_is_missing_is_named() -> None:
    job, files = job_of(Concatenated(8, 1))
    with pytest.raises(JobError, match="b"):
        list(compare(job, files[:1]))


def test_the_command_prints_a_line_for_each_way(tmp_path: Path) -> None:
    write_credit(tmp_path)
    words = ["compare", "job.toml", "bank.toml", "insurer.toml"]
    done = sl_queue(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [line.split("  ")[0] for line in done.stdout.splitlines()[1:]]
    assert names == [
        "joint: all parties",
        "bank alone",
        "insurer alone",
        "joined in one process: weights differ by at most 0",
    ]
    assert not (tmp_path / "state").exists()

"""A new run begins with the weights of an earlier one, after any change, and says what is not the same."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from sl_queue import CheckpointError, Job, JobError, PartyFile, Rows, run_local
from tests.support.split import Concatenated, equal_weights

ROWS = 24
DRAW = np.random.default_rng(0)
X, Y = DRAW.normal(size=(ROWS, 3)).astype(np.float32), DRAW.integers(0, 2, ROWS)
ADAM = {"name": "adam", "lr": 0.01}


def job_of(epochs: int = 2, **changes: Any) -> Job:
    parties = {"bank": {"role": "feature", "cut": [4]}, "court": {"role": "label"}}
    return Job(name="t", seed=7, epochs=epochs, batch_size=12, parties=parties, shuffle=False, **changes)


def files_of(start: Path | None = None, base: Any = None, optimizer: bool = False) -> list[PartyFile]:
    torch.manual_seed(0)
    given, fuse = base or nn.Linear(3, 4), Concatenated(4, 1)

    def of(party: str) -> dict[str, Any]:
        return {} if start is None else {"start": {"from": start / party, "optimizer": optimizer}}

    bank = PartyFile(
        party="bank", data=Rows(np.arange(ROWS), X), base={"model": given, "optimizer": ADAM}, **of("bank")
    )
    parts = {"model": fuse, "optimizer": ADAM, "loss": "bce_with_logits"}
    return [bank, PartyFile(party="court", data=Rows(np.arange(ROWS), None, Y), fuse=parts, **of("court"))]


def test_more_epochs_with_the_moments_are_those_of_one_longer_run(tmp_path: Path) -> None:
    whole = run_local(job_of(4), files_of())
    run_local(job_of(2), files_of(), out=tmp_path / "first")
    result = run_local(job_of(2), files_of(tmp_path / "first", optimizer=True), out=tmp_path / "second")
    assert equal_weights(result.fuse, whole.fuse)
    assert equal_weights(result.base("bank"), whole.base("bank"))
    without = run_local(job_of(2), files_of(tmp_path / "first"))
    assert not equal_weights(without.fuse, whole.fuse)


def test_a_resumed_run_begins_with_the_same_weights_or_says_that_they_are_others(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_local(job_of(2), files_of(), out=first)
    done = run_local(job_of(2), files_of(first), out=second)
    assert equal_weights(run_local(job_of(2), files_of(first), out=second).fuse, done.fuse)
    run_local(job_of(3), files_of(), out=tmp_path / "other")
    with pytest.raises(CheckpointError, match="start was"):
        run_local(job_of(2), files_of(tmp_path / "other"), out=second)
    with pytest.raises(CheckpointError, match="start was"):
        run_local(job_of(2), files_of(), out=second)


class Wider(nn.Module):
    """The layer of before, one of another shape, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight.T + self.bias) * self.scale


def test_what_is_not_the_same_stays_as_it_was_built_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_local(job_of(2), files_of(), out=tmp_path / "first")
    before = safetensors.torch.load_file(tmp_path / "first" / "bank" / "final" / "base.safetensors")
    frozen = copy.deepcopy(Wider()).requires_grad_(False)
    with caplog.at_level(logging.WARNING, "sl_queue"):
        result = run_local(job_of(1), files_of(tmp_path / "first", frozen))
    assert torch.equal(result.base("bank").weight, before["weight"])
    assert torch.equal(result.base("bank").bias, torch.zeros(1))
    said = [record.getMessage() for record in caplog.records]
    assert any(text.endswith("scale: new, and as they were built") for text in said)
    assert any(text.endswith("bias: of another shape, and as they were built") for text in said)


def test_what_there_is_nothing_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there are no final weights in it; it must be a state folder"):
        run_local(job_of(1), files_of(tmp_path / "nowhere"))
    run_local(job_of(2), files_of(), out=tmp_path / "first")
    with pytest.raises(JobError, match="shares no tensor with"):
        run_local(job_of(1), files_of(tmp_path / "first", nn.Sequential(nn.Linear(3, 4))))


def test_weights_that_were_altered_are_refused_and_those_of_another_party_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_local(job_of(2), files_of(), out=tmp_path / "first")
    bank, court = files_of(tmp_path / "first")
    swapped = bank.replace(start={"from": tmp_path / "first" / "court"})
    with pytest.raises(JobError):  # court has no base model
        run_local(job_of(1), [swapped, court])
    assert "holds the weights of party 'court'" in caplog.text
    path = tmp_path / "first" / "bank" / "final" / "base.safetensors"
    body = bytearray(path.read_bytes())
    body[-3] ^= 0x40
    path.unlink()
    path.write_bytes(bytes(body))
    with pytest.raises(
        CheckpointError, match=r"party 'bank': .*not those that its run\.json says \(base\.safetensors is"
    ):
        run_local(job_of(1), files_of(tmp_path / "first"))
    (path.parent / "run.json").unlink()
    run_local(job_of(1), files_of(tmp_path / "first"))


def test_the_history_of_a_new_run_begins_again(tmp_path: Path) -> None:
    run_local(job_of(2), files_of(), out=tmp_path / "first")
    result = run_local(job_of(2), files_of(tmp_path / "first"), out=tmp_path / "second")
    assert [line["epoch"] for line in result.history] == [0, 1]
    first = json.loads((tmp_path / "first" / "scheduler" / "history.jsonl").read_text().splitlines()[-1])
    assert result.history[0]["loss"] < first["loss"] + 0.1

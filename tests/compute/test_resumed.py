"""Resumed equals uninterrupted: a state holds everything that a step changes."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.compute.optimizers import optimizer_names
from sl_queue.errors import (
    CheckpointError,
)
from sl_queue.storage.checkpoints import Folder
from tests.support.bank import FIRST, raised, setup, stages
from tests.support.split import equal_weights, furthest

pytestmark = pytest.mark.usefixtures("one_thread_and_fixed_draws")

SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {"amsgrad": True},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "rmsprop": {"momentum": 0.9, "centered": True},
}
DENSE = sorted(optimizer_names().keys() - {"sparseadam"})


@pytest.mark.parametrize("optimizer", DENSE)
def test_a_run_resumed_from_files_has_the_bits_of_an_uninterrupted_one(optimizer: str, tmp_path: Path) -> None:
    bias = optimizer != "muon"  # which takes matrices only
    norm = [nn.BatchNorm1d(4), nn.Dropout(0.3)] if bias else [nn.Dropout(0.3)]
    fuse = nn.Linear(7, 1, bias=bias)
    run = setup(
        bases={"bank": nn.Sequential(nn.Linear(3, 4, bias=bias), *norm), "insurer": nn.Linear(2, 3, bias=bias)},
        fuse=fuse,
        aggregation="concat",
        optimizer={"name": optimizer} | SETTINGS.get(optimizer, {}),
        pipeline={"micro_batches": 2, "checkpoint_every": 2, "depth": 3, "staleness": 1},
        epochs=3,
        batch_size=4,
    )
    quiet = run.stages().train(run.pipeline)
    first = run.stages().train(run.pipeline, stop_after=7)
    states = {"bank": first.bases["bank"].state(), "insurer": first.fuse.state()}
    resumed = run.stages()
    resumed.bases["bank"].forward(FIRST)  # forgotten by loading
    anew: dict[str, TorchBaseStage | TorchFuseStage] = {"bank": resumed.bases["bank"], "insurer": resumed.fuse}
    for party, stage in anew.items():
        with Folder(tmp_path / party, job_digest="a", party=party, fingerprint={}) as folder:
            folder.save(7, states[party], run="run", generation=0, values={})
        with Folder(tmp_path / party, job_digest="a", party=party, fingerprint={}) as folder:
            stage.load(folder.load(7).state)
        assert stage.state() == states[party]
    resumed.train(run.pipeline, first_step=8)
    assert first.losses + resumed.losses == quiet.losses
    for name, module in resumed.modules().items():
        assert equal_weights(module, quiet.modules()[name]), name
        assert furthest(module, run.given[name]) > 0
    assert resumed.fuse.state() == quiet.fuse.state()
    assert resumed.bases["bank"].state() == quiet.bases["bank"].state()


def test_a_state_is_a_copy() -> None:
    run = setup(optimizer={"name": "adam"})
    found = run.stages().train(run.pipeline, stop_after=2)
    before = found.bases["bank"].state()
    copied = {name: bytes(payload.data) for name, payload in before.tensors.items()}
    found.train(run.pipeline, first_step=3)
    assert {name: bytes(payload.data) for name, payload in before.tensors.items()} == copied
    assert found.bases["bank"].state() != before


def test_a_checkpoint_of_another_model_is_refused() -> None:
    state = stages().bases["bank"].state()
    wider = stages(bases={"bank": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), "insurer": nn.Linear(2, 3)})
    message = raised(CheckpointError, lambda: wider.bases["bank"].load(state))
    expected = "party 'bank': the checkpoint is of another model than torch.nn.modules.container:Sequential: 1.bias, "
    assert message.startswith(expected)

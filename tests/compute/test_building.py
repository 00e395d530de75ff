"""From a party file to a model: what cannot be built is named, and what is built is what the file says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sl_queue.compute.base_stage import TorchBaseStage
from sl_queue.compute.building import device_of
from sl_queue.compute.fuse_stage import TorchFuseStage
from sl_queue.errors import (
    ComputeError,
    JobError,
)
from sl_queue.storage.checkpoints import Folder
from tests.support.bank import raised, setup, stages
from tests.support.resolved import computes, final_module, fingerprint
from tests.support.split import equal_weights

pytestmark = pytest.mark.usefixtures("one_thread_and_fixed_draws")


@pytest.mark.parametrize(
    ("optimizer", "complaint"),
    [
        ({"name": "adm"}, "'adm' is unknown; allowed are adadelta, "),
        ({"name": "lbfgs"}, "evaluates the loss more than once a step"),
        ({"name": "adam", "learning_rate": 1}, "refused by torch.optim.Adam: .*learning_rate"),
        ({"name": "sgd", "lr": -1.0}, "refused by torch.optim.SGD: Invalid learning rate"),
        ({}, r"\[base\] optimizer is missing, and the model has parameters"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_named(optimizer: dict[str, Any], complaint: str) -> None:
    with pytest.raises(JobError, match=complaint):
        stages(optimizer=optimizer)


def test_an_optimizer_that_fails_on_these_gradients_says_so() -> None:
    run = setup(optimizer={"name": "sparseadam"})
    message = raised(ComputeError, lambda: run.stages().train(run.pipeline))
    assert message.startswith(
        "party 'insurer': the optimizer of tests.support.split:Concatenated failed: RuntimeError: Sparse"
    )


def extra_state() -> nn.Module:
    class WithNotes(nn.Linear):
        def get_extra_state(self) -> str:
            return "notes"

    return WithNotes(3, 4)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: 5, "returns int; it must return a torch.nn.Module"),
        (lambda: nn.Linear("3", 4), "fails: TypeError"),  # type: ignore[arg-type]
        (extra_state, "its state_dict holds '_extra_state', a str; only tensors are saved"),
        ("no_such_module:Model", "no_such_module"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(model: Any, complaint: str) -> None:
    message = raised(JobError, lambda: stages(bases={"bank": model, "insurer": nn.Linear(2, 3)}))
    assert complaint in message


def test_a_lazy_layer_takes_its_shape_from_the_rows_and_cuts(tmp_path: Path) -> None:
    lazy = {"bank": lambda: nn.LazyLinear(4), "insurer": nn.LazyLinear(3)}
    run = setup(bases=lazy, fuse=lambda: nn.LazyLinear(1), aggregation="concat")
    found = run.stages()
    assert found.bases["bank"].module.weight.shape == (4, 3)
    assert found.fuse.model.module.weight.shape == (1, 7)
    assert found.bases["bank"].state() == run.stages().bases["bank"].state()
    found.train(run.pipeline)
    with Folder(tmp_path, job_digest="a", party="bank", fingerprint={}) as folder:
        folder.write_final(found.bases["bank"].weights(), run="run", step=4, incarnation="i")
    module = final_module(run.job, run.files["bank"], tmp_path / "final" / "base.safetensors")
    assert equal_weights(module, found.bases["bank"].module)
    assert module(torch.zeros(2, 3)).shape == (2, 4)


def test_a_device_that_is_not_there_is_named() -> None:
    run = setup()
    for device in ("cuda:99", "gpu", "meta"):
        file = run.files["bank"].model_copy(update={"device": device})
        message = raised(JobError, lambda file=file: device_of(computes(run.job, [file])[0]))  # type: ignore[misc]
        assert message.startswith(f"party 'bank': device = '{device}' cannot be used here with torch")


def test_a_fingerprint_is_json_and_holds_what_decides_the_bits() -> None:
    run = setup(optimizer={"name": "adam", "betas": (0.8, 0.9)})
    found = fingerprint(run.job, run.files["insurer"])
    assert json.loads(json.dumps(found)) == found
    with_values = {key: value for key, value in found.items() if not key.endswith(("code", "weights", "settings"))}
    assert {key: value for key, value in with_values.items() if value is not None} == {
        "rules": 2,
        "secret": "seed",
        "autocast": "off",
        "default_dtype": "torch.float32",
        "float32_matmul_precision": "highest",
        "torch": torch.__version__,
        "threads": 1,
        "device": "cpu",
        "base.model": "torch.nn.modules.linear:Linear",
        "base.optimizer.name": "adam",
        "base.optimizer.betas": [0.8, 0.9],
        "fuse.model": "tests.support.split:Concatenated",
        "fuse.optimizer.name": "adam",
        "fuse.optimizer.betas": [0.8, 0.9],
        "fuse.loss": "bce_with_logits",
    }


def test_final_weights_become_the_trained_module(tmp_path: Path) -> None:
    run = setup()
    found = run.stages().train(run.pipeline)
    trained: dict[str, TorchBaseStage | TorchFuseStage] = {"bank": found.bases["bank"], "insurer": found.fuse}
    for party, stage in trained.items():
        with Folder(tmp_path / party, job_digest="a", party=party, fingerprint={}) as folder:
            folder.write_final(stage.weights(), run="run", step=4, incarnation="i")
    names = {"bank": [("bank", "base")], "insurer": [("insurer", "base"), ("fuse", "fuse")]}
    for party, parts in names.items():
        for name, part in parts:
            path = tmp_path / party / "final" / f"{part}.safetensors"
            module = final_module(run.job, run.files[party], path)
            assert equal_weights(module, found.modules()[name])
            assert not module.training

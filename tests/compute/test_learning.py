"""Groups, schedules, clipping, averages and optimizers made in code: equal to plain PyTorch."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sl_queue import run_local
from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from tests.support.learning import (
    OPTIMIZERS,
    ROWS,
    STEPS,
    parts,
    plain,
    require_equal,
    run_of,
    through_a_checkpoint,
    torch_class,
    weights,
)
from tests.support.resolved import train_joined
from tests.support.split import Concatenated, Parties, equal_weights, table_of


def test_every_optimizer_with_warm_up_and_clipping_equals_a_plain_loop() -> None:
    for name, options in OPTIMIZERS.items():
        schedule = {"name": "cosine", "warmup": 2, "min_lr": 1e-4}
        run = run_of(optimizer={"name": name, **options}, schedule=schedule, clip_norm=0.05)
        trained = run.stages().train(run.pipeline)

        def before(module: nn.Module, optimizer: Any, step: int, base: float = options["lr"]) -> None:
            nn.utils.clip_grad_norm_(module.parameters(), 0.05)
            optimizer.param_groups[0]["lr"] = (
                base * (step + 1) / 2
                if step < 2
                else 1e-4 + (base - 1e-4) * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))) / 2
            )

        def make(module: nn.Module, name: str = name, options: Any = options) -> Any:
            return torch_class(name)(module.parameters(), **options)

        require_equal(trained, plain(run, make, before))


def test_groups_and_no_decay_give_each_parameter_its_own_numbers() -> None:
    groups = [{"match": "embedding.*", "lr": 1e-4}, {"match": ["head.*"], "lr": 1e-2, "weight_decay": 0.5}]
    adamw = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}
    run = run_of(optimizer={**adamw, "no_decay": ["*.bias", "norm*"]}, groups=groups, fuse={"optimizer": adamw})
    trained = run.stages().train(run.pipeline)

    def make(module: nn.Module) -> Any:
        if isinstance(module, Concatenated):
            return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1)
        numbers = {
            "embedding.weight": (1e-4, 0.1),
            "embedding.bias": (1e-4, 0.0),
            "norm.weight": (1e-3, 0.0),
            "norm.bias": (1e-3, 0.0),
            "head.weight": (1e-2, 0.5),
            "head.bias": (1e-2, 0.0),
        }
        named = [(p, *numbers[name]) for name, p in module.named_parameters()]
        return torch.optim.AdamW([{"params": [p], "lr": lr, "weight_decay": decay} for p, lr, decay in named])

    require_equal(trained, plain(run, make))


def test_values_of_gradients_are_clipped_as_torch_clips_them() -> None:
    run = run_of(clip_value=0.002)
    trained = run.stages().train(run.pipeline)
    clipped = plain(
        run,
        lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        lambda module, _, __: nn.utils.clip_grad_value_(module.parameters(), 0.002),
    )
    require_equal(trained, clipped)


def test_final_weights_and_evaluation_are_those_of_torchs_averaged_model() -> None:
    run = run_of(ema=0.7)
    averages: dict[str, AveragedModel] = {}

    def after(name: str, module: nn.Module, step: int) -> None:
        if name not in averages:
            averages[name] = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.7))
        averages[name].update_parameters(module)

    last = plain(run, lambda module: torch.optim.SGD(module.parameters(), lr=0.1), after=after)
    trained = run.stages().train(run.pipeline)
    require_equal(trained, last)
    found = weights(trained)
    for name, average in averages.items():
        part = "fuse" if name == "fuse" else "base"
        for key, tensor in average.module.state_dict().items():
            assert found[f"{name} {part} {key}"] == tensor.numpy().tobytes()
            assert found[f"{name} {part}-last {key}"] == last[name].state_dict()[key].numpy().tobytes()


def test_held_out_rows_are_evaluated_with_the_average() -> None:
    run = run_of(ema=0.7, holdout=0.25)
    trained = run.stages().train(run.pipeline)
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(ROWS))
    assert trained.evaluations[-1]["loss"] == joined.history[-1]["holdout"]["loss"]
    held = [run.job.batches(ROWS).holdout_part(i) for i in range(run.job.batches(ROWS).holdout_parts)]
    rows = np.concatenate(held)
    averaged = {}
    for name, module in run.given.items():
        stage = parts(trained)[name]
        with stage.model.averaged():
            averaged[name] = copy.deepcopy(stage.model.module).eval()
        assert not equal_weights(averaged[name], stage.model.module), module
    cuts = [averaged[p](torch.from_numpy(run.tables[p].features[rows])) for p in ("a", "b")]
    labels = torch.from_numpy(run.tables["holder"].labels[rows]).float()
    loss = nn.functional.binary_cross_entropy_with_logits(averaged["fuse"](cuts).squeeze(1), labels)
    assert trained.evaluations[-1]["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_an_optimizer_made_in_code_is_given_the_model() -> None:
    def make(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(module.parameters(), lr=0.01)

    run = run_of(optimizer=make)
    require_equal(run.stages().train(run.pipeline), plain(run, make))


def test_sparse_gradients_are_trained_by_sparse_adam() -> None:
    rows, codes = 8, np.arange(8).reshape(8, 1) % 5
    table = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten())
    files = {
        "a": PartyFile(
            party="a",
            data=Rows(np.arange(rows), codes),
            base={"model": table, "optimizer": {"name": "sparseadam", "lr": 0.1}},
        ),
        "holder": PartyFile(
            party="holder",
            data=Rows(np.arange(rows), None, np.arange(rows) % 2),
            fuse={"model": Concatenated(4, 1), "optimizer": {"name": "sgd"}, "loss": "bce_with_logits"},
        ),
    }
    job = Job(
        name="t",
        seed=1,
        epochs=2,
        batch_size=4,
        parties={"a": {"role": "feature", "cut": [4]}, "holder": {"role": "label"}},
        pipeline={"checkpoint_every": 1},
    )
    run = Parties(job, files, {"a": table_of(codes), "holder": table_of(None, np.arange(rows) % 2)}, {})
    whole = run.stages().train(run.pipeline)
    half = through_a_checkpoint(run.stages().train(run.pipeline, stop_after=1), run)
    assert weights(half.train(run.pipeline, first_step=2)) == weights(whole)
    assert not torch.equal(whole.bases["a"].module.state_dict()["0.weight"], table[0].weight)


def test_a_run_leaves_the_average_and_the_weights_of_the_last_step(tmp_path: Any) -> None:
    run = run_of(ema=0.7, schedule={"name": "cosine"})
    trained = run.stages().train(run.pipeline)
    result = run_local(run.job, list(run.files.values()), out=tmp_path)
    found = weights(trained)
    for name in run.given:
        party, part = ("holder", "fuse") if name == "fuse" else (name, "base")
        module = result.fuse if part == "fuse" else result.base(party)
        for stem, tensors in (
            (part, module.state_dict()),
            (part, safetensors.torch.load_file(tmp_path / party / "final" / f"{part}.safetensors")),
            (f"{part}-last", safetensors.torch.load_file(tmp_path / party / "final" / f"{part}-last.safetensors")),
        ):
            for key, tensor in tensors.items():
                assert found[f"{name} {stem} {key}"] == tensor.numpy().tobytes()

"""Mixed precision: bf16 and fp16 with a scale of the loss, equal to plain autocast, and after every resume."""

import copy
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue.compute.precision import LossScale
from sl_queue.config.job import Job
from sl_queue.cut.guard import Guard
from sl_queue.errors import CheckpointError, JobError, NonFiniteError
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import row_order
from tests.support.resolved import base_stage, fuse_stage, train_joined
from tests.support.split import Concatenated, Parties, Stages, equal_weights, furthest, parties

ROWS, BATCH = 24, 8
BF16, FP16 = "bf16", {"name": "fp16", "scale": 2.0**18, "growth_interval": 3}
PRECISIONS: dict[str, Any] = {"bf16": BF16, "fp16": FP16}
ADAM = {"name": "adam", "lr": 0.02}


def steep(output: Tensor, labels: Tensor) -> Tensor:
    """Return a loss whose gradients overflow in fp16 at a large scale, and fit at a smaller one."""
    return 40 * nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), labels.float())


def run_of(
    precision: Any, *, loss: Any = steep, own: bool = False, base: nn.Module | None = None, **job: Any
) -> Parties:
    torch.manual_seed(3)
    draw = np.random.default_rng(5)
    names = ["a", "holder"] if own else ["a", "b"]
    features = {name: draw.normal(size=(ROWS, 3 + i)).astype(np.float32) for i, name in enumerate(names)}
    bases = {name: nn.Sequential(nn.Linear(3 + i, 4), nn.Tanh(), nn.Linear(4, 4)) for i, name in enumerate(names)}
    if base is not None:
        bases["a"] = base
    return parties(
        bases,
        Concatenated(8, 1),
        features,
        draw.integers(0, 2, ROWS),
        cuts={name: [4] for name in names},
        optimizer=ADAM,
        loss=loss,
        precision=precision,
        epochs=4,
        batch_size=BATCH,
        **{"pipeline": {"micro_batches": 2, "checkpoint_every": 1}, **job},
    )


def plain(run: Parties, dtype: torch.dtype, scale: float, interval: int) -> tuple[dict[str, nn.Module], list[float]]:
    """Train the whole as torch's own examples of mixed precision do; returns the scale of each step too."""
    modules = {name: copy.deepcopy(module).train() for name, module in run.given.items()}
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.02) for module in modules.values()]
    scaler = torch.amp.GradScaler("cpu", scale, growth_interval=interval, enabled=dtype == torch.float16)
    labels = torch.from_numpy(run.tables["holder"].labels)
    scales = []
    for epoch in range(run.job.epochs):
        order = row_order(ROWS, 7, epoch)
        for first in range(0, ROWS, BATCH):
            for part in np.array_split(order[first : first + BATCH], 2):
                with torch.autocast("cpu", dtype):
                    cuts = [modules[p](torch.from_numpy(run.tables[p].features[part])) for p in ("a", "b")]
                    output = modules["fuse"](cuts)
                loss = steep(output.float(), labels[torch.from_numpy(part)])
                scaler.scale(loss * (len(part) / BATCH)).backward()
            grads = [p.grad for module in modules.values() for p in module.parameters()]
            whole = all(bool(grad.isfinite().all()) for grad in grads if grad is not None)
            for optimizer in optimizers:
                if dtype == torch.float16:
                    scaler.unscale_(optimizer)
                if whole:  # one scaler over several optimizers asks each alone; the parts of one model step together
                    scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            scales.append(scaler.get_scale())
    return modules, scales


@pytest.mark.parametrize("name", PRECISIONS)
def test_split_equals_plain_autocast_bit_for_bit(name: str) -> None:
    run = run_of(PRECISIONS[name])
    split = run.stages().train(run.pipeline)
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    expected, scales = plain(run, dtype, 2.0**18, 3)
    for part, module in split.modules().items():
        assert equal_weights(module, expected[part]), part
        assert furthest(module, run.given[part]) > 1e-3
    if name == "fp16":
        assert min(scales) < 2.0**18, "no step has overflowed"
        assert any(later > earlier for earlier, later in itertools.pairwise(scales)), "it has never grown"
        for model in (split.fuse.model, *(stage.model for stage in split.bases.values())):
            assert model.scaling is not None
            assert model.scaling.scale == scales[-1]


@pytest.mark.parametrize("own", [False, True], ids=["two feature parties", "label holder with a base model"])
@pytest.mark.parametrize("more", [{}, {"fuse": {"aggregation": "list", "whole_batch": True}}], ids=["parts", "whole"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_split_equals_joined(name: str, own: bool, more: dict[str, Any]) -> None:
    pipeline = {"micro_batches": 2, "depth": 2, "checkpoint_every": 1}
    run = run_of(PRECISIONS[name], own=own, pipeline=pipeline, holdout=0.25)
    if more:
        run.job = run.job.replace(fuse=more["fuse"])
    split = run.stages().train(run.pipeline)
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(ROWS))
    assert split.losses == joined.losses
    for part, module in split.modules().items():
        assert equal_weights(module, joined.fuse if part == "fuse" else joined.bases[part]), part
    assert [e["loss"] for e in split.evaluations] == [epoch["holdout"]["loss"] for epoch in joined.history]


def test_activations_and_gradients_cross_in_sixteen_bits() -> None:
    run = run_of(BF16)
    stages = run.stages()
    payloads = {p: stage.forward(MicroBatch(0, 0)) for p, stage in stages.bases.items()}
    assert {payload.dtype for payload in payloads.values()} == {"bfloat16"}
    gradients = stages.fuse.forward_backward(MicroBatch(0, 0), payloads)
    assert {payload.dtype for payload in gradients.values()} == {"bfloat16"}


def test_a_step_that_overflows_is_left_out_at_every_party() -> None:
    run = run_of({"name": "fp16", "scale": 2.0**30}, own=True)
    stages = run.stages()
    before = {name: copy.deepcopy(module) for name, module in stages.modules().items()}
    stages.train(run.pipeline, stop_after=0)
    assert all(equal_weights(module, before[name]) for name, module in stages.modules().items())
    models = [stages.fuse.model, *(stage.model for stage in stages.bases.values())]
    assert stages.fuse.own is not None
    for model in (*models, stages.fuse.own.model):
        assert model.scaling is not None
        assert (model.scaling.scale, model.scaling.clean) == (2.0**29, 0)
        assert model.optimizer is not None
        assert not model.optimizer.state, "Adam has counted a step"


class Loud(nn.Module):
    """A base model whose own backward pass overflows in fp16 where the gradient of its activation does not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two((self.one(x) * 3000).tanh() * 20)


def test_a_base_model_that_overflows_alone_repeats_its_backward_pass_at_a_smaller_scale() -> None:
    run = run_of({"name": "fp16", "scale": 2.0**12}, loss="bce_with_logits", base=Loud())
    split = run.stages().train(run.pipeline)
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(ROWS))
    for part, module in split.modules().items():
        assert equal_weights(module, joined.fuse if part == "fuse" else joined.bases[part]), part
        assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert furthest(split.bases["a"].module, run.given["a"]) > 1e-3
    assert {stage.model.loss_scale for stage in split.bases.values()} == {2.0**12}


# Resumed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("name", PRECISIONS)
def test_resumed_at_any_step_equals_undisturbed(name: str, staleness: int) -> None:
    pipeline = {"micro_batches": 2, "depth": 4, "staleness": staleness, "checkpoint_every": 1}
    run = run_of(PRECISIONS[name], pipeline=pipeline)
    undisturbed = run.stages().train(run.pipeline)
    for step in range(11):
        stopped, resumed = run.stages().train(run.pipeline, stop_after=step), run.stages()
        for name_of, stage in of(stopped).items():
            state = stage.state()
            of(resumed)[name_of].load(State(dict(state.tensors), json.loads(json.dumps(dict(state.values)))))
        resumed.train(run.pipeline, first_step=step + 1)
        for part, module in resumed.modules().items():
            assert equal_weights(module, undisturbed.modules()[part]), (step, part)


def of(stages: Stages) -> dict[str, Any]:
    return {**stages.bases, "fuse": stages.fuse}


def test_a_checkpoint_without_a_scale_is_refused_where_one_is_needed() -> None:
    state = run_of(BF16).stages().fuse.state()
    with pytest.raises(CheckpointError, match="holds no scale of the loss"):
        run_of(FP16).stages().fuse.load(state)


# The scale ----------------------------------------------------------------------------------------------------------


def test_the_scale_changes_as_that_of_torchs_scaler() -> None:
    draw = np.random.default_rng(1)
    parameter = nn.Parameter(torch.zeros(3))
    ours, theirs = LossScale(1024.0, 4), torch.amp.GradScaler("cpu", 1024.0, growth_interval=4)
    optimizer = torch.optim.SGD([parameter], 0.1)
    for _ in range(200):
        gradient = torch.ones(3) if draw.random() < 0.8 else torch.tensor([1.0, torch.inf, 0.0])
        theirs.scale(torch.zeros(1))
        parameter.grad = gradient.clone()
        theirs.step(optimizer)
        theirs.update()
        parameter.grad = gradient.clone()
        ours.see([parameter.grad])
        ours.finish([parameter], "here")
        assert ours.scale == theirs.get_scale()


def test_gradients_that_fit_no_scale_end_the_run() -> None:
    scale, parameter = LossScale(1.0, 10), nn.Parameter(torch.zeros(1))

    def overflow() -> None:
        scale.see([torch.tensor([torch.nan])])
        scale.finish([parameter], "here")

    for _ in range(14):
        overflow()
    with pytest.raises(NonFiniteError, match="not finite at any scale"):
        overflow()


# The job ------------------------------------------------------------------------------------------------------------


def test_the_precision_is_part_of_what_parties_agree_on_and_its_default_is_not() -> None:
    plain_job, same = run_of("float32").job, run_of({"name": "float32"}).job
    assert plain_job.digest == same.digest
    assert "precision" not in plain_job.canonical()
    digests = {run_of(p).job.digest for p in ("float32", BF16, "fp16", FP16)}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp8"}, "precision.name"),
        ({"precision": {"name": "fp16", "scale": 0.0}}, "precision.scale"),
        ({"precision": "fp16", "wire": {"dtype": "int8"}}, "needs gradients that travel as they are"),
        ({"precision": "fp16", "wire": {"compress": "bitmap"}}, "needs gradients that travel as they are"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], words: str) -> None:
    settings = {"name": "x", "seed": 0, "epochs": 1, "batch_size": 1}
    roles = {"a": {"role": "feature", "cut": [1]}, "b": {"role": "label"}}
    with pytest.raises(JobError, match=words):
        Job(**settings, parties=roles, **changes)


class Noise:
    def apply(self, tensor: Tensor, crossing: Any) -> Tensor:
        return tensor


def test_defences_bound_gradients_as_they_are_and_are_refused_with_a_scale() -> None:
    run, guard = run_of(FP16), Guard(defence=Noise())
    batches = run.job.batches(ROWS)
    with pytest.raises(JobError, match="scales gradients"):
        fuse_stage(run.job, run.files["holder"], run.tables["holder"], batches, guards={"a": guard})
    with pytest.raises(JobError, match="scales gradients"):
        base_stage(run.job, run.files["a"], run.tables["a"], batches, guard=guard)

"""Whole applications with a whole recipe (groups, schedule, clipping, average): equal to plain PyTorch, and resumed."""

import copy
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sl_queue.compute.seeds import key, seeded
from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.schedule.row_order import row_order
from tests.support.applications import ROWS, Application, applications
from tests.support.split import Parties, Stages
from tests.support.tables import read_table

BATCH, EPOCHS, STEPS = 8, 2, 6
SEED = 7
RATE, LEAST, CLIP, DECAY = 0.02, 1e-4, 0.5, 0.9
NAMES = ("DNN", "DeepFM", "DIN", "BST", "VGG", "ResNet")


def run_of(app: Application, staleness: int = 0) -> Parties:
    labels = np.random.default_rng(7).integers(0, app.classes, ROWS)
    files = {}
    for party in ("alice", "bob"):
        rows = Rows(np.arange(ROWS), app.features.get(party), labels if party == "bob" else None)
        parts: dict[str, Any] = {}
        if party in app.bases:
            parts["base"] = {"model": app.bases[party], **learning(app.bases[party])}
        if party == "bob":
            parts["fuse"] = {"model": app.fuse, "loss": loss_of(app), "outputs": outputs_of(app), **learning(app.fuse)}
        files[party] = PartyFile(party=party, data=rows, **parts)
    roles: dict[str, Any] = {"alice": {"role": "feature", "cut": app.cuts["alice"]}, "bob": {"role": "label"}}
    if "bob" in app.cuts:
        roles["bob"]["cut"] = app.cuts["bob"]
    pipeline = {"micro_batches": 2, "staleness": staleness, "checkpoint_every": 1}
    job = Job(name="app", seed=SEED, epochs=EPOCHS, batch_size=BATCH, parties=roles, pipeline=pipeline)
    tables = {party: read_table(job, file) for party, file in files.items()}
    return Parties(job, files, tables, {**app.bases, "fuse": app.fuse})


def learning(module: nn.Module) -> dict[str, Any]:
    """Return a whole recipe: groups, a schedule with warm-up, clipping, an average."""
    bare = any(name.endswith(".bias") for name, _ in module.named_parameters())
    return {
        "optimizer": {"name": "adamw", "lr": RATE, "weight_decay": 0.1, **({"no_decay": ["*.bias"]} if bare else {})},
        "schedule": {"name": "cosine", "warmup": 2, "min_lr": LEAST},
        "clip_norm": CLIP,
        "ema": DECAY,
    }


def loss_of(app: Application) -> str:
    return app.loss or ("bce_with_logits" if app.classes == 2 else "cross_entropy")


def outputs_of(app: Application) -> str:
    return "probabilities" if loss_of(app) == "torch.nn:BCELoss" else "logits"


def plain(app: Application, run: Parties) -> dict[str, AveragedModel]:
    """Train in a loop that knows nothing of sl_queue but the order of rows; returns the averages."""
    modules = {name: copy.deepcopy(module).train() for name, module in run.given.items()}
    optimizers, averages = {}, {}
    for name, module in modules.items():
        bare = [p for n, p in module.named_parameters() if n.endswith(".bias")]
        rest = [p for n, p in module.named_parameters() if not n.endswith(".bias")]
        groups = [{"params": rest}] + ([{"params": bare, "weight_decay": 0.0}] if bare else [])
        optimizers[name] = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.1)
        averages[name] = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    labels = torch.from_numpy(run.tables["bob"].labels)
    step = 0
    for epoch in range(EPOCHS):
        order = row_order(ROWS, SEED, epoch)
        for first in range(0, ROWS, BATCH):
            for index, part in enumerate(np.array_split(order[first : first + BATCH], 2)):
                inputs: list[Tensor] = []
                for party in app.bases:
                    with drawing(party, "base", step, index):
                        output = modules[party](taken(app.features[party], part))
                    outputs = output if isinstance(output, list) else [output]
                    for each in outputs if party == "alice" else ():
                        if each.requires_grad:  # as a message carries it; kernels may sum slices otherwise
                            each.register_hook(Tensor.contiguous)
                    inputs += outputs
                with drawing("bob", "fuse", step, index):
                    output, wanted = modules["fuse"](inputs), labels[torch.from_numpy(part)]
                loss = LOSSES[loss_of(app)](output, wanted)
                (loss * (len(part) / BATCH)).backward()
            for name, module in modules.items():
                for group in optimizers[name].param_groups:
                    group["lr"] = rate(step)
                nn.utils.clip_grad_norm_(module.parameters(), CLIP)
                optimizers[name].step()
                optimizers[name].zero_grad()
                averages[name].update_parameters(module)
            step += 1
    return averages


def drawing(party: str, part: str, step: int, index: int) -> AbstractContextManager[None]:
    """Set all generators as docs/joined.md says: what draws in a forward pass depends on this alone."""
    return seeded(key(SEED, party, f"{part} forward", MicroBatch(step, index)), torch.device("cpu"))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce_with_logits": lambda output, wanted: functional.binary_cross_entropy_with_logits(
        output.squeeze(1), wanted.float()
    ),
    "torch.nn:BCELoss": lambda output, wanted: functional.binary_cross_entropy(output.squeeze(1), wanted.float()),
    "cross_entropy": functional.cross_entropy,
}


def taken(features: Any, rows: Any) -> Any:
    if isinstance(features, list):
        return [torch.from_numpy(column[rows]) for column in features]
    return torch.from_numpy(features[rows])


def rate(step: int) -> float:
    if step < 2:
        return RATE * (step + 1) / 2
    return LEAST + (RATE - LEAST) * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))) / 2


def parts(stages: Stages) -> dict[str, Any]:
    return {**stages.bases, "fuse": stages.fuse}


def weights(stages: Stages) -> dict[str, bytes]:
    return {
        f"{name} {part} {tensor}": bytes(payload.data)
        for name, stage in parts(stages).items()
        for part, tensors in stage.weights().items()
        for tensor, payload in tensors.items()
    }


def averaged(stages: Stages) -> dict[str, dict[str, bytes]]:
    """Return the average of each model, by the name that it was given under."""
    found = {party: stage.model for party, stage in stages.bases.items()} | {"fuse": stages.fuse.model}
    if stages.fuse.own is not None:
        found["bob"] = stages.fuse.own.model
    return {name: {n: bytes(p.data) for n, p in model.weights()[model.part].items()} for name, model in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_of_plain_pytorch(name: str) -> None:
    require_plain_weights(applications()[name])


def require_plain_weights(app: Application) -> None:
    """Raise AssertionError unless an application has the averages of a plain loop, bit for bit."""
    run = run_of(app)
    split = averaged(run.stages().train(run.pipeline))
    expected = plain(app, run)
    for part, average in expected.items():
        parameters = {n for n, _ in average.module.named_parameters()}
        for tensor, value in average.module.state_dict().items():
            if tensor in parameters:
                assert split[part][tensor] == value.detach().numpy().tobytes(), (part, tensor)
        pairs = zip(average.module.parameters(), run.given[part].parameters(), strict=True)
        assert any(not torch.equal(now, before) for now, before in pairs)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_resumed_at_any_step_equals_undisturbed(name: str, staleness: int) -> None:
    require_resumed(applications()[name], staleness)


def require_resumed(app: Application, staleness: int) -> None:
    """Raise AssertionError unless a run that is stopped at any step goes on to the same bits."""
    run = run_of(app, staleness)
    undisturbed = weights(run.stages().train(run.pipeline))
    for step in range(STEPS - 1):
        stopped, resumed = run.stages().train(run.pipeline, stop_after=step), run.stages()
        for role, stage in parts(stopped).items():
            state = stage.state()
            parts(resumed)[role].load(State(dict(state.tensors), json.loads(json.dumps(dict(state.values)))))
        assert weights(resumed.train(run.pipeline, first_step=step + 1)) == undisturbed, step

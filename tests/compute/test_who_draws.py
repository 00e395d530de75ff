"""Every draw is keyed, also in backward passes and updates; nothing of ours draws from a global generator."""

import ast
import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sl_queue
from sl_queue.compute.seeds import seeded
from sl_queue.errors import BrokerUnreachable
from sl_queue.transport.retry import CONNECTING, Pauses, pause_s, persist
from tests.support.resolved import train_joined
from tests.support.split import Concatenated, Parties, Stages, equal_weights, parties

ROOT = Path(__file__).parents[2]
OWN_GENERATORS = {
    "Random",
    "SystemRandom",
    "default_rng",
    "Generator",
    "RandomState",
    "PCG64",
    "SeedSequence",
    "BitGenerator",
}
GLOBAL_OF_TORCH = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
    "multinomial", "poisson", "manual_seed", "seed", "set_rng_state", "fork_rng", "dropout",
}  # fmt: skip

IN_PLACE = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_"}


# Nothing of ours --------------------------------------------------------------------------------------------------


def dotted(node: ast.AST) -> str:
    match node:
        case ast.Attribute(value, attr):
            return f"{dotted(value)}.{attr}"
        case ast.Name(name):
            return name
        case _:
            return ""


def global_draws(source: str) -> Iterator[str]:
    """Yield what in a program draws from a global generator, or may: by its dotted name."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    own = {id(call.func) for call in calls if any(keyword.arg == "generator" for keyword in call.keywords)}
    for node in ast.walk(tree):
        if id(node) in own:
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {alias.name for alias in node.names}
            if node.module in ("random", "numpy.random"):
                yield from (f"{node.module}.{name}" for name in names - OWN_GENERATORS)
            yield from (f"{node.module}.{name}" for name in names if "wait_random" in name or "jitter" in name)
        name = dotted(node)
        head, _, last = name.rpartition(".")
        if head in ("random", "np.random", "numpy.random") and last not in OWN_GENERATORS:
            yield name
        if isinstance(node, ast.Attribute) and node.attr in IN_PLACE:
            yield node.attr
        if head.split(".")[0] in ("torch", "nn", "F") and (last in GLOBAL_OF_TORCH or ".init" in head):
            yield name


@pytest.mark.parametrize(
    "line",
    [
        "random.uniform(0, 1)",
        "np.random.rand(3)",
        "torch.randn(3)",
        "torch.manual_seed(0)",
        "torch.random.fork_rng()",
        "nn.init.zeros_(x)",
        "found[0].normal_()",
        "from random import choice",
        "from tenacity import wait_random",
    ],
)
def test_a_draw_from_a_global_generator_would_be_found(line: str) -> None:
    assert list(global_draws(line))
    assert not list(global_draws("random.Random(3).random(), np.random.default_rng(0).normal(), torch.zeros(3)"))
    assert not list(global_draws("torch.randn(3, generator=own)"))


def test_nothing_of_ours_draws_from_a_global_generator() -> None:
    files = [*ROOT.glob("sl_queue/**/*.py"), *ROOT.glob("workers/*.py")]
    found = {str(f.relative_to(ROOT)): sorted(set(global_draws(f.read_text()))) for f in files}
    assert len(found) > 80
    assert {name: draws for name, draws in found.items() if draws and name != "sl_queue/compute/seeds.py"} == {}


def test_pauses_before_another_attempt_leave_what_a_model_draws_alone() -> None:
    attempts: list[int] = []

    async def attempt() -> str:
        attempts.append(1)
        if len(attempts) < 4:
            raise BrokerUnreachable("not yet")
        return "there"

    with seeded(1, torch.device("cpu")):
        expected = random.random(), random.random()
    with seeded(1, torch.device("cpu")):
        first = random.random()
        pause = threading.Thread(target=lambda: attempts.append(int(pause_s(1, CONNECTING) > 0)))
        pause.start()
        pause.join()
        attempts.clear()
        quick = Pauses(first_s=0.001, longest_s=0.002)
        again = persist(attempt, on=BrokerUnreachable, limit_s=5.0, pauses=quick, say="test")
        assert asyncio.run(again) == "there"
        assert (first, random.random()) == expected


# Backward passes and updates ---------------------------------------------------------------------------------------


class NoisyGradients(nn.Module):
    """Adds noise of all three generators to the gradient of its output, from the third micro-batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("forwards", torch.zeros(()))

    def _noise(self, gradient: Tensor) -> Tensor:
        return gradient + 0.01 * torch.randn_like(gradient) + 0.01 * random.random() + 0.01 * float(np.random.rand())

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x)
        if self.training:
            self.forwards += 1
            if self.forwards > 2:
                output.register_hook(self._noise)
        return output


class Checkpointed(nn.Module):
    """Computes its middle again in the backward pass, with the dropout of the forward pass."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(3, 8), nn.Linear(8, 4), reentrant
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = checkpoint(self.middle, h, use_reentrant=self.reentrant) if self.training else self.middle(h)
        return self.last(h)  # type: ignore[no-any-return]


class NoisyFuse(Concatenated):
    def forward(self, inputs: list[Tensor]) -> Tensor:
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda g: g + 0.01 * torch.randn_like(g))
        return super().forward(inputs)


class Langevin(torch.optim.SGD):
    """Gradient descent that samples, from torch's generator."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(torch.randn_like(parameter.grad), alpha=0.1)
        return super().step(closure)


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))


DRAWING = {
    "hooks on the activation": lambda: {"a": NoisyGradients(), "b": Checkpointed(), "c": nn.Linear(3, 4)},
    "hooks on inputs of the fuse model": lambda: {"a": nn.Linear(3, 4), "b": Checkpointed(True), "c": nn.Linear(3, 4)},
    "hooks in the label holder's base": lambda: {"a": nn.Linear(3, 4), "c": NoisyGradients()},
    "beside a party with dropout": lambda: {"a": NoisyGradients(), "b": Checkpointed(), "c": dropout()},
}


def run(which: str, **more: Any) -> Parties:
    torch.manual_seed(3)
    bases = DRAWING[which]()
    fuse = NoisyFuse(4 * len(bases), 1) if "fuse" in which else Concatenated(4 * len(bases), 1)
    draw = np.random.default_rng(5)
    features = {party: draw.normal(size=(30, 3)).astype(np.float32) for party in bases}
    cuts = {party: [4] for party in bases}
    labels = draw.integers(0, 2, 30)
    settings = {"pipeline": {"micro_batches": 2, "checkpoint_every": 2}} | more
    return parties(bases, fuse, features, labels, cuts=cuts, label_holder="c", **settings)


def disturbed(seed: int) -> None:
    """Disturb the global generators as the rest of a process does."""
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, module in one.items():
        assert equal_weights(module, other[name]), name


def resumed(made: Parties, first: Stages) -> Stages:
    after = made.stages()
    for name, base in after.bases.items():
        base.load(first.bases[name].state())
    after.fuse.load(first.fuse.state())
    return after.train(made.pipeline, first_step=3)


@pytest.mark.parametrize("which", DRAWING)
def test_draws_of_backward_passes_are_those_of_joined_training_and_of_a_resumed_run(which: str) -> None:
    made = run(which)
    disturbed(1)
    quiet = made.stages().train(made.pipeline)
    disturbed(2)
    joined = train_joined(made.job, list(made.files.values()), made.tables, made.job.batches(made.n_rows))
    assert_equal(quiet.modules(), {**joined.bases, "fuse": joined.fuse})
    disturbed(3)
    assert_equal(resumed(made, made.stages().train(made.pipeline, stop_after=2)).modules(), quiet.modules())


def test_draws_of_stale_backward_passes_are_keyed() -> None:
    made = run("hooks on the activation", pipeline={"micro_batches": 2, "depth": 4, "staleness": 1})
    disturbed(1)
    first = made.stages().train(made.pipeline)
    disturbed(2)
    assert_equal(made.stages().train(made.pipeline).modules(), first.modules())


def test_draws_of_an_optimizer_are_keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "Langevin", Langevin, raising=False)
    made = run("hooks in the label holder's base", optimizer={"name": "langevin", "lr": 0.1})
    disturbed(1)
    quiet = made.stages().train(made.pipeline)
    disturbed(2)
    joined = train_joined(made.job, list(made.files.values()), made.tables, made.job.batches(made.n_rows))
    assert_equal(quiet.modules(), {**joined.bases, "fuse": joined.fuse})
    disturbed(3)
    assert_equal(resumed(made, made.stages().train(made.pipeline, stop_after=2)).modules(), quiet.modules())
    other = run("hooks in the label holder's base", optimizer={"name": "langevin", "lr": 0.1}, seed=8)
    assert not equal_weights(other.stages().train(other.pipeline).modules()["fuse"], quiet.modules()["fuse"])


def test_a_loss_that_draws_leaves_the_process_alone_when_it_is_tried_out() -> None:
    def noisy(output: Tensor, labels: Tensor) -> Tensor:
        flat = output.squeeze(1) + 0.1 * torch.randn(len(output))
        return nn.functional.binary_cross_entropy_with_logits(flat, labels.float())

    draw = np.random.default_rng(0)
    features = {"a": draw.normal(size=(30, 3)).astype(np.float32)}
    made = parties({"a": nn.Linear(3, 4)}, Concatenated(4, 1), features, np.arange(30) % 2, cuts={"a": [4]}, loss=noisy)
    disturbed(1)
    expected = random.random(), float(np.random.rand()), torch.rand(()).item()
    disturbed(1)
    made.stages()
    assert (random.random(), float(np.random.rand()), torch.rand(()).item()) == expected


def test_parties_in_threads_whose_backward_passes_draw_do_not_disturb_each_other() -> None:
    made = run("beside a party with dropout", epochs=8, pipeline={"micro_batches": 3})
    alone = made.stages().train(made.pipeline).modules()
    result = sl_queue.run_local(made.job, list(made.files.values()))
    assert_equal({name: result.base(name) for name in "abc"} | {"fuse": result.fuse}, alone)


def test_a_source_that_draws_gives_the_same_rows_in_every_run() -> None:
    def rows() -> sl_queue.Rows:
        features = torch.randn(30, 3).numpy() + np.random.rand(30, 3).astype(np.float32) + random.random()
        return sl_queue.Rows(np.arange(30), features, None)

    found = []
    for seed in (1, 2):
        made = run("hooks in the label holder's base")
        source = sl_queue.PartyFile(party="a", data={"source": rows}, base=made.files["a"].base)
        disturbed(seed)
        found.append(sl_queue.run_local(made.job, [source, made.files["c"]]).base("a"))
    assert equal_weights(*found)

"""Groups, schedules, clipping, averages and optimizers made in code: equal to plain PyTorch, and after every resume."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from sl_queue.errors import CheckpointError, JobError
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.fingerprints import differences
from sl_queue.protocol.rates import Schedule
from sl_queue.protocol.schedule.row_order import row_order
from tests.support.resolved import fingerprint, fuse_stage, train_joined
from tests.support.split import Concatenated, Parties, Stages, equal_weights, furthest, table_of

ROWS, BATCH, EPOCHS = 24, 8, 2
STEPS = 6
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adadelta": {"lr": 1.0},
    "adafactor": {"lr": 0.05},
    "adagrad": {"lr": 0.05},
    "adam": {"lr": 0.01, "amsgrad": True},
    "adamax": {"lr": 0.01},
    "adamw": {"lr": 0.01, "weight_decay": 0.1},
    "asgd": {"lr": 0.05, "t0": 2.0},
    "nadam": {"lr": 0.01},
    "radam": {"lr": 0.01},
    "rmsprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "rprop": {"lr": 0.01},
    "sgd": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
}
SCHEDULES: dict[str, Any] = {
    "constant": {"name": "constant", "warmup": 2},
    "cosine": {"name": "cosine", "warmup": 2, "min_lr": 1e-4},
    "linear": {"name": "linear"},
    "step": {"name": "step", "every": 2, "gamma": 0.5},
    "exponential": {"name": "exponential", "gamma": 0.8},
    "one_cycle": {"name": "one_cycle"},
    "code": lambda step, steps: 1.0 / (1.0 + step / steps),
}


class Net(nn.Module):
    """Layers with names to match."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(inputs, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.embedding(x))))  # type: ignore[no-any-return]


def run_of(staleness: int = 0, holdout: float = 0.0, models: Any = None, **learning: Any) -> Parties:
    """Two feature parties and a label holder; `learning` is what all their models say of how they learn."""
    torch.manual_seed(3)
    draw = np.random.default_rng(5)
    given: dict[str, Any] = models or {"a": Net(3), "b": Net(2), "fuse": Concatenated(8, 1)}
    features = {p: draw.normal(size=(ROWS, n)).astype(np.float32) for p, n in (("a", 3), ("b", 2))}
    labels = draw.integers(0, 2, ROWS)
    learning = {"optimizer": {"name": "sgd", "lr": 0.1}, **learning}
    of_fuse = learning.pop("fuse", {})
    own = {k: v for k, v in learning.items() if k != "groups"} | of_fuse
    files, tables = {}, {}
    for party in ("a", "b"):
        tables[party] = table_of(features[party])
        base = {"model": given[party], **learning}
        files[party] = PartyFile(party=party, data=Rows(np.arange(ROWS), features[party]), base=base)
    tables["holder"] = table_of(None, labels)
    fuse = {"model": given["fuse"], "loss": "bce_with_logits", **own}
    files["holder"] = PartyFile(party="holder", data=Rows(np.arange(ROWS), None, labels), fuse=fuse)
    job = Job(
        name="test",
        seed=7,
        epochs=EPOCHS,
        batch_size=BATCH,
        holdout=holdout,
        parties={p: {"role": "feature", "cut": [4]} for p in ("a", "b")} | {"holder": {"role": "label"}},
        pipeline={"staleness": staleness, "checkpoint_every": 1, "micro_batches": 2},
    )
    return Parties(job, files, tables, given)


def plain(run: Parties, make: Any, before: Any = None, after: Any = None) -> dict[str, nn.Module]:
    """Train in a loop that knows nothing of sl_queue but the order of rows; `make(module)` is its optimizer."""
    modules = {name: copy.deepcopy(module) for name, module in run.given.items()}
    optimizers = {name: make(module) for name, module in modules.items()}
    labels = torch.from_numpy(run.tables["holder"].labels).float()
    step = 0
    for epoch in range(EPOCHS):
        order = row_order(ROWS, 7, epoch)
        for first in range(0, ROWS, BATCH):
            for part in np.array_split(order[first : first + BATCH], 2):
                cuts = [modules[p](torch.from_numpy(run.tables[p].features[part])) for p in ("a", "b")]
                loss = nn.functional.binary_cross_entropy_with_logits(modules["fuse"](cuts).squeeze(1), labels[part])
                (loss * (len(part) / BATCH)).backward()
            for name, module in modules.items():
                if before is not None:
                    before(module, optimizers[name], step)
                optimizers[name].step()
                if after is not None:
                    after(name, module, step)
                optimizers[name].zero_grad()
            step += 1
    return modules


def parts(stages: Stages) -> dict[str, Any]:
    return {**stages.bases, "fuse": stages.fuse}


def through_a_checkpoint(stages: Stages, run: Parties) -> Stages:
    """Build new stages that begin where these stand, as files hold it: JSON values, tensors by name."""
    import json

    fresh = run.stages()
    for name, stage in parts(stages).items():
        state = stage.state()
        parts(fresh)[name].load(State(dict(state.tensors), json.loads(json.dumps(dict(state.values)))))
    return fresh


def weights(stages: Stages) -> dict[str, bytes]:
    return {
        f"{name} {part} {tensor}": bytes(payload.data)
        for name, stage in parts(stages).items()
        for part, tensors in stage.weights().items()
        for tensor, payload in tensors.items()
    }


def require_equal(stages: Stages, modules: dict[str, nn.Module]) -> None:
    for name, module in stages.modules().items():
        assert equal_weights(module, modules[name]), (name, furthest(module, modules[name]))


def torch_class(name: str) -> Any:
    return next(c for n, c in vars(torch.optim).items() if n.lower() == name)


# Equal to plain PyTorch -----------------------------------------------------------------------------------------


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


# Resumed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_at_any_step_equals_undisturbed(schedule: str, staleness: int) -> None:
    for number, (name, options) in enumerate(OPTIMIZERS.items()):
        learning = {"schedule": SCHEDULES[schedule], "ema": 0.9, "clip_norm": 0.5}
        run = run_of(staleness, optimizer={"name": name, **options}, **learning)
        whole = weights(run.stages().train(run.pipeline))
        step = number % (STEPS - 1)
        begun = run.stages().train(run.pipeline, stop_after=step)
        assert weights(through_a_checkpoint(begun, run).train(run.pipeline, first_step=step + 1)) == whole, name


def test_resumed_at_every_step_equals_undisturbed() -> None:
    run = run_of(optimizer={"name": "adamw", "lr": 0.01}, schedule={"name": "one_cycle"}, ema=0.9, clip_norm=0.1)
    whole = weights(run.stages().train(run.pipeline))
    for step in range(STEPS - 1):
        begun = run.stages().train(run.pipeline, stop_after=step)
        assert weights(through_a_checkpoint(begun, run).train(run.pipeline, first_step=step + 1)) == whole


class Adaptive(torch.optim.Optimizer):
    """An optimizer that keeps what it learns in its groups, in attributes, and in lists of tensors."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05, "drift": (0, 1.0)})
        self.calls = 0
        self.norms: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            count, drift = group["drift"]
            group["drift"] = (count + 1, drift * 0.9)
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                history = state.setdefault("history", [])
                history.append(p.grad.clone())
                del history[:-2]
                state["calls"] = self.calls
                self.norms = [*self.norms[-3:], float(p.grad.norm())]
                p.sub_(sum(history) * group["lr"] * group["drift"][1] * self.calls**0.5 / (1 + self.norms[0]))


def test_what_an_optimizer_keeps_in_groups_lists_and_attributes_is_in_the_checkpoint() -> None:
    run = run_of(optimizer=lambda module: Adaptive(module.parameters()))
    whole = weights(run.stages().train(run.pipeline))
    for step in range(STEPS - 1):
        begun = run.stages().train(run.pipeline, stop_after=step)
        resumed = through_a_checkpoint(begun, run)
        optimizer: Any = resumed.fuse.model.optimizer
        assert optimizer.calls == step + 1
        assert type(optimizer.param_groups[0]["drift"]) is tuple
        assert weights(resumed.train(run.pipeline, first_step=step + 1)) == whole


def test_going_back_to_an_earlier_checkpoint_forgets_what_came_later() -> None:
    run = run_of(optimizer=lambda module: Adaptive(module.parameters()), ema=0.9)
    stages = run.stages().train(run.pipeline, stop_after=1)
    saved = {name: stage.state() for name, stage in parts(stages).items()}
    whole = weights(stages.train(run.pipeline, first_step=2))
    for name, stage in parts(stages).items():
        stage.load(saved[name])
    assert weights(stages.train(run.pipeline, first_step=2)) == whole


def test_a_checkpoint_of_a_version_that_saved_no_groups_is_resumed() -> None:
    run = run_of(optimizer={"name": "adam", "lr": 0.01})
    state = run.stages().train(run.pipeline, stop_after=2).fuse.state()
    assert not [name for name in (*state.tensors, *state.values) if ".more" in name or "average" in name]
    names = {name.split("/")[1] for name in state.tensors}
    assert names == {"module", "optimizer"}


def test_a_checkpoint_without_the_average_is_refused_where_one_is_asked_for() -> None:
    state = run_of().stages().fuse.state()
    with pytest.raises(CheckpointError, match=r"no average of the weights \(fuse/average\)"):
        run_of(ema=0.9).stages().fuse.load(state)


def test_another_way_of_learning_is_another_fingerprint() -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"schedule": {"name": "linear"}},
        {"schedule": {"name": "linear", "warmup": 3}},
        {"schedule": lambda step, steps: 1.0},
        {"groups": [{"match": "head.*", "lr": 1.0}]},
        {"clip_norm": 1.0},
        {"clip_value": 1.0},
        {"ema": 0.9},
        {"optimizer": lambda module: torch.optim.SGD(module.parameters(), lr=0.1)},
    ]
    prints = []
    for way in ways:
        run = run_of(**way)
        prints.append(fingerprint(run.job, run.files["a"]))
    for one, other in itertools.permutations(prints, 2):
        assert differences(one, other)
    assert differences(prints[0], prints[0]) == []
    plainly = fingerprint(run_of().job, run_of().files["a"])
    assert not [key for key in plainly if key.startswith(("base.groups", "base.schedule", "base.clip", "base.ema"))]


# Refused --------------------------------------------------------------------------------------------------------


class Sam(torch.optim.SGD):
    """Twice a step."""

    def first_step(self) -> None: ...
    def second_step(self) -> None: ...


class Lookahead(torch.optim.Optimizer):
    """One that wraps another."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups[0]["params"], {})
        self.inner = inner


def strange(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([*module.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)


@pytest.mark.parametrize(
    ("learning", "words"),
    [
        ({"optimizer": {"name": "lbfgs"}}, ["'lbfgs' evaluates the loss more than once a step"]),
        ({"optimizer": lambda m: torch.optim.LBFGS(m.parameters())}, ["LBFGS evaluates the loss more than once"]),
        ({"optimizer": lambda m: Sam(m.parameters(), lr=0.1)}, ["Sam evaluates the loss more than once a step"]),
        ({"optimizer": lambda m: m}, ["returns Net; it must return a torch.optim.Optimizer"]),
        ({"optimizer": strange}, ["'strange' trains 1 tensors that are not the model's"]),
        ({"optimizer": lambda m: torch.optim.SGD(m.head.parameters(), lr=1.0)}, ["leaves out embedding.weight"]),
        ({"optimizer": lambda m: Lookahead(torch.optim.Adam(m.parameters()))}, ["holds another optimizer", "'inner'"]),
        ({"groups": [{"match": "heads.*", "lr": 0.1}]}, ["'heads.*' matches no parameter", "embedding.weight"]),
        ({"groups": [{"match": "head.*", "lrr": 0.1}]}, ["groups[0].lrr is not an option of SGD; did you mean 'lr'?"]),
        ({"groups": [{"match": "*", "lr": -1.0}]}, ["refused by torch.optim.SGD", "-1.0"]),
        ({"optimizer": {"name": "rprop", "no_decay": ["*.bias"]}}, ["no_decay has no use: Rprop has no weight_decay"]),
        ({"schedule": lambda step, steps: float("nan")}, ["schedule gives nan for step 0 of 6"]),
        ({"schedule": lambda step: 1.0}, ["schedule fails on (0, 6): TypeError"]),
    ],
)
def test_what_cannot_learn_is_refused_before_anything_is_trained(learning: dict[str, Any], words: list[str]) -> None:
    run = run_of(**learning)
    with pytest.raises(JobError) as caught:
        run.stages()
    assert "party 'a': [base]" in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("learning", "words"),
    [
        ({"schedule": {"name": "cosin"}}, "schedule = 'cosin' is unknown; it must be constant, cosine, linear"),
        ({"schedule": {"name": "cosine", "every": 3}}, "schedule.every is unknown; 'cosine' takes warmup, min_lr"),
        ({"schedule": {"name": "step"}}, "schedule.every is missing; it must be a whole number of at least 1"),
        ({"schedule": {"name": "exponential"}}, "schedule.gamma is missing"),
        ({"schedule": {"name": "linear", "warmup": 1.5}}, "schedule.warmup = 1.5; it must be a whole number"),
        ({"schedule": {"name": "linear", "warmup": True}}, "schedule.warmup = True; it must be"),
        ({"groups": [{"lr": 1.0}]}, "groups [0].match is missing"),
        ({"groups": [{"match": "x"}]}, "groups [0] sets nothing"),
        ({"groups": [{"match": [], "lr": 1.0}]}, "groups [0].match = []; it must be a pattern"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0; it must be a number above 0"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "has both clip_norm and clip_value"),
        ({"ema": 1.0}, "ema = 1.0; it must be a number between 0 and 1"),
        ({"groups": [{"match": "x", "lr": 1.0}], "optimizer": "bank:make"}, "has groups, but an optimizer in code"),
        ({"optimizer": {"name": "adam", "no_decay": [3]}}, "optimizer .no_decay = [3]; it must be a pattern"),
    ],
)
def test_a_party_file_says_what_is_wrong_with_how_a_model_learns(learning: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError) as caught:
        PartyFile(party="a", data=Rows([1], [[1.0]]), base={"model": "bank:Net", **learning})
    assert words.replace(" [", "[").replace(" .", ".") in str(caught.value).replace(" [", "[").replace(" .", ".")


# Schedules ------------------------------------------------------------------------------------------------------


def rates(settings: dict[str, Any], steps: int, base: float = 0.1) -> list[float]:
    return [Schedule.of(settings).rate(base, step, steps) for step in range(steps)]


def of_torch(steps: int, make: Any, base: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("steps", [10, 97])
def test_schedules_are_those_of_torch(steps: int) -> None:
    lr = torch.optim.lr_scheduler
    assert rates({"name": "cosine", "min_lr": 0.01}, steps) == pytest.approx(
        of_torch(steps, lambda o: lr.CosineAnnealingLR(o, steps, eta_min=0.01))
    )
    assert rates({"name": "step", "every": 3, "gamma": 0.5}, steps) == pytest.approx(
        of_torch(steps, lambda o: lr.StepLR(o, 3, gamma=0.5))
    )
    assert rates({"name": "exponential", "gamma": 0.9}, steps) == pytest.approx(
        of_torch(steps, lambda o: lr.ExponentialLR(o, 0.9))
    )
    assert rates({"name": "linear"}, steps) == pytest.approx(
        of_torch(steps, lambda o: lr.LambdaLR(o, lambda step: 1 - step / steps))
    )
    found = of_torch(steps - 1, lambda o: lr.OneCycleLR(o, 0.1, steps, cycle_momentum=False))
    assert [Schedule.of({"name": "one_cycle"}).rate(0.1, step, steps) for step in range(steps - 1)] == found


def test_a_warm_up_goes_up_in_a_line_and_the_rest_begins_after_it() -> None:
    found = rates({"name": "cosine", "warmup": 4}, 12, base=1.0)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[8] == pytest.approx(0.5)
    assert rates({"name": "constant", "warmup": 2}, 4, base=1.0) == [0.5, 1.0, 1.0, 1.0]
    assert rates({"name": "linear", "warmup": 9}, 3, base=9.0) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step", "exponential", "one_cycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 1_000_000])
def test_no_length_of_a_job_makes_a_rate_that_is_none(name: str, steps: int) -> None:
    needed = {"step": {"every": 2}, "exponential": {"gamma": 0.999}}.get(name, {})
    schedule = Schedule.of({"name": name, **needed})
    for step in {0, steps // 2, steps - 1}:
        assert 0 <= schedule.rate(0.1, step, steps) <= 0.1 + 1e-12


def test_the_stage_is_built_with_the_steps_of_the_whole_job() -> None:
    run = run_of(schedule={"name": "linear"})
    stage = fuse_stage(run.job, run.files["holder"], run.tables["holder"], run.job.batches(ROWS))
    assert stage.model.learning is not None
    assert stage.model.learning.steps == STEPS


def test_a_run_leaves_the_average_and_the_weights_of_the_last_step(tmp_path: Any) -> None:
    import safetensors.torch

    from sl_queue import run_local

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

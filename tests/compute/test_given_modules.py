"""A module given in code is the one that trains, and afterwards it is what it was."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import sl_queue
from tests.support.split import SGD, Concatenated, equal_weights, furthest, parties

ROWS = 24
DRAW = np.random.default_rng(3)
FEATURES = {party: DRAW.normal(size=(ROWS, 3)).astype(np.float32) for party in ("a", "b")}
LABELS = np.arange(ROWS) % 2


def run(bases: dict[str, Any], fuse: Any = None, out: Path | None = None, **changes: Any) -> sl_queue.Result:
    cuts = {party: [4] for party in bases}
    fuse = fuse or Concatenated(4 * len(bases), 1)
    made = parties(bases, fuse, FEATURES, LABELS, cuts=cuts, **{"batch_size": 8, "epochs": 2} | changes)
    files = [file.model_copy(update={"threads": 1}) for file in made.files.values()]
    return sl_queue.run_local(made.job, files, out=out)


def plain(base: nn.Module, fuse: nn.Module) -> nn.Module:
    """Return the base after the same training in one loop, as docs/joined.md does it."""
    optimizer = torch.optim.SGD([*base.parameters(), *fuse.parameters()], lr=SGD["lr"])
    for epoch in range(2):
        order = sl_queue.row_order(ROWS, 7, epoch)
        for first in range(0, ROWS, 8):
            rows = order[first : first + 8]
            output = fuse([base(torch.from_numpy(FEATURES["a"][rows]))])[:, 0]
            labels = torch.from_numpy(LABELS[rows]).float()
            nn.functional.binary_cross_entropy_with_logits(output, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return base


def clipped() -> nn.Module:
    module = nn.Linear(3, 4)
    for parameter in module.parameters():
        parameter.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    return module


class Extractor(nn.Module):
    """Takes its output from a hook that refers to it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.feature = nn.Linear(3, 4), torch.zeros(0)
        self.linear.register_forward_hook(lambda module, inputs, output: setattr(self, "feature", output))

    def forward(self, x: Tensor) -> Tensor:
        self.linear(x)
        return self.feature * 2


def pruned() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    prune.random_unstructured(module[0], "weight", 0.5)
    return module


def with_frozen_statistics() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    module[1].eval()
    return module


class Forces(nn.Module):
    """Differentiates what it computes by a tensor that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = torch.tanh(self.linear(x))
            (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy + forces.norm(dim=1, keepdim=True)


class Shifted(nn.Linear):
    """Adds a constant that is one number in memory."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("shift", torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "hooks on parameters": clipped,
    "a hook on a layer that refers to the module": Extractor,
    "pruned": pruned,
    "weight norm as a parametrization": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "spectral norm as a hook": lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
    "traced": lambda: torch.jit.trace(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.ones(2, 3)),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), backend="eager"),  # type: ignore[dict-item]
    "a submodule in evaluation mode": with_frozen_statistics,
    "a gradient within the forward": Forces,
    "an expanded buffer": Shifted,
    "all in evaluation mode": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).eval(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", MAKERS)
def test_a_given_module_trains_as_in_a_plain_loop_again_and_again_and_is_given_back(kind: str) -> None:
    def made() -> nn.Module:
        torch.manual_seed(5)
        return MAKERS[kind]()

    base, expected, fuse = made(), made(), Concatenated(4, 1)
    first = run({"a": base}, fuse)
    assert equal_weights(base, expected)
    assert [m.training for m in base.modules()] == [m.training for m in expected.modules()]
    second = run({"a": base}, fuse)
    plain(expected, copy.deepcopy(fuse))
    assert furthest(first.base("a"), expected) <= 1e-6
    assert equal_weights(first.base("a"), second.base("a"))
    x = torch.from_numpy(FEATURES["a"])
    assert torch.equal(first.base("a")(x), second.base("a")(x))
    assert torch.allclose(first.base("a")(x), expected.eval()(x), atol=1e-6)
    assert equal_weights(base, made()), "the results are modules of their own"


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.seen, self.mean = nn.Linear(3, 4), 0, [], torch.zeros(4)
        self.register_buffer("late", None)
        self.fails_after = 1000

    def forward(self, x: Tensor) -> Tensor:
        output = self.linear(x)
        self.calls += 1
        self.seen.append(self.calls)
        self.mean = self.mean + output.detach().mean(0)
        self.late = self.mean * 2
        self.linear.bias.requires_grad_(False)
        if self.calls > self.fails_after:
            raise ValueError("enough")
        return output


@pytest.mark.parametrize("fails_after", [1000, 4])
def test_attributes_buffers_gradients_and_what_is_frozen_are_given_back_also_after_a_failure(fails_after: int) -> None:
    base = Remembering()
    base.fails_after = fails_after
    base.linear(torch.ones(1, 3)).sum().backward()
    gradient, seen, mean = base.linear.weight.grad, base.seen, base.mean
    before = {name: value.clone() for name, value in base.state_dict().items()}
    if fails_after == 4:
        with pytest.raises(sl_queue.ComputeError, match="enough"):
            run({"a": base})
    else:
        assert furthest(run({"a": base}).base("a").linear, base.linear) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert (base.calls, base.late, base.linear.bias.requires_grad) == (0, None, True)
    assert base.seen is seen == []
    assert base.mean is mean and not mean.any()
    assert base.linear.weight.grad is gradient


def test_a_lazy_module_is_given_back_without_a_shape() -> None:
    base, fuse = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()), Concatenated(4, 1)
    first, second = run({"a": base}, fuse), run({"a": base}, fuse)
    assert type(base[0]) is nn.LazyLinear and base[0].has_uninitialized_params()
    assert type(first.base("a")[0]) is nn.Linear
    assert equal_weights(first.base("a"), second.base("a"))


def test_a_callable_that_returns_the_same_module_each_time_gives_it_back() -> None:
    base, fuse = nn.Linear(3, 4), Concatenated(4, 1)
    before = copy.deepcopy(base)
    first, second = run({"a": lambda: base}, fuse), run({"a": lambda: base}, fuse)
    assert equal_weights(base, before)
    assert equal_weights(first.base("a"), second.base("a"))
    assert furthest(first.base("a"), base) > 1e-3


def shared() -> dict[str, dict[str, Any]]:
    one, other = nn.Linear(3, 4), nn.Linear(3, 4)
    other.weight = one.weight
    return {
        "its module": {"a": one, "b": one},
        "the submodule '0'": {"a": one, "b": nn.Sequential(one)},
        "the parameter 'weight'": {"a": one, "b": other},
    }


@pytest.mark.parametrize("what", shared())
def test_two_parties_that_share_a_part_are_refused_by_name(what: str) -> None:
    with pytest.raises(sl_queue.JobError, match=r"party 'b': \[base\] shares .* of party 'a'; give") as caught:
        run(shared()[what])
    assert what in str(caught.value)


def test_a_module_that_another_run_is_training_is_refused() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                run({"a": self})
            return self.linear(x)

    with pytest.raises(sl_queue.JobError, match="another run of this process is training the module"):
        run({"a": Nested()})


def test_a_module_with_what_cannot_be_copied_trains_and_is_in_the_result() -> None:
    import threading

    class Locked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.lock = threading.Lock()

    base = Locked()
    assert furthest(run({"a": base}).base("a"), base) > 1e-3


def test_training_in_evaluation_mode_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sl_queue"):
        run({"a": nn.Linear(3, 4).eval()})
    assert "was built in evaluation mode, and is trained in it" in caplog.text

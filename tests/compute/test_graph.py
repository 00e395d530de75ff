"""Readings of a graph: where code that is not torch's may run, and where a ReLU's zeros need no gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from sl_queue.compute.modules.graph import hooks_made, runs_only_torch, steps_only_torch
from sl_queue.cut.relu import ends_in_relu
from tests.support.split import Concatenated, Parties, equal_weights, parties

ROWS = torch.linspace(-1, 1, 24).reshape(4, 6)
LINEAR = nn.Linear(6, 6)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Marked(nn.Parameter):
    """A subclass of a tensor, which may run Python for any operator."""


def hooked(module: nn.Module, register: Callable[[nn.Module], Any]) -> nn.Module:
    register(module)
    return module


def with_hook(x: Tensor, register: Callable[[Tensor], Any]) -> Tensor:
    register(x)
    return x.tanh()


def of_a_subclass() -> nn.Module:
    linear = nn.Linear(6, 6)
    linear.weight = Marked(linear.weight.detach())
    return linear


def unpacked() -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        hidden = LINEAR(ROWS).tanh()
    return torch.stack([hidden, hidden]).sum(0)


def nothing(*_: Any) -> None:
    pass


ACTS = hooked(nn.Linear(6, 6), lambda m: m.weight.register_hook(nothing))  # type: ignore[union-attr, arg-type, operator]
POST = hooked(nn.Linear(6, 6), lambda m: m.weight.register_post_accumulate_grad_hook(nothing))  # type: ignore[union-attr, arg-type, operator]
FULL = hooked(nn.Linear(6, 6), lambda m: m.register_full_backward_hook(nothing))
LAYERS = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2), nn.Dropout()]
CONVOLUTIONS = nn.Sequential(*LAYERS)
LSTM, ATTENTION = nn.LSTM(6, 5, 2, dropout=0.3), nn.TransformerEncoderLayer(6, 2, 8)

OF_TORCH: dict[str, Callable[[], Tensor]] = {
    "linear layers": lambda: nn.functional.layer_norm(LINEAR(ROWS).relu(), (6,)),
    "convolutions": lambda: CONVOLUTIONS(ROWS.reshape(1, 1, 4, 6)[..., :4].repeat(2, 1, 1, 1)),
    "recurrent": lambda: LSTM(ROWS[None])[0],
    "attention with dropout": lambda: ATTENTION(ROWS[None]),
    "a loss": lambda: functional.cross_entropy(torch.cat([LINEAR(ROWS), LINEAR(ROWS)]), torch.zeros(8).long()),
    "indices": lambda: torch.where(ROWS > 0, LINEAR(ROWS), 0.0)[torch.tensor([0, 2])],
}
OF_OTHERS: dict[str, Callable[[], Tensor]] = {
    "a hook on a tensor": lambda: with_hook(LINEAR(ROWS), lambda t: t.register_hook(nothing)),
    "a hook on a node": lambda: with_hook(LINEAR(ROWS), lambda t: t.grad_fn.register_hook(nothing)),
    "a hook before a node": lambda: with_hook(LINEAR(ROWS), lambda t: t.grad_fn.register_prehook(nothing)),
    "a hook on a parameter": lambda: ACTS(ROWS),
    "a hook after a parameter's gradient": lambda: POST(ROWS),
    "a backward hook of a module": lambda: FULL(ROWS).relu(),
    "a function in Python": lambda: Doubled.apply(LINEAR(ROWS)).relu(),  # type: ignore[no-untyped-call]
    "a checkpointed block": lambda: LINEAR(checkpoint(LINEAR, ROWS, use_reentrant=False)),
    "a checkpointed block, as of old": lambda: LINEAR(checkpoint(LINEAR, LINEAR(ROWS), use_reentrant=True)),
    "saved tensors unpacked by Python": unpacked,
    "a parameter of a class of its own": lambda: of_a_subclass()(ROWS),
}


@pytest.mark.skipif(not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"), reason="an older torch tells less")
@pytest.mark.parametrize("forward", OF_TORCH.values(), ids=OF_TORCH)
def test_graphs_of_torchs_own_operators_run_nothing_else(forward: Callable[[], Tensor]) -> None:
    before = hooks_made()
    assert runs_only_torch(forward(), before)


@pytest.mark.parametrize("forward", OF_OTHERS.values(), ids=OF_OTHERS)
def test_code_of_others_in_a_graph_is_found(forward: Callable[[], Tensor]) -> None:
    before = hooks_made()
    assert not runs_only_torch(forward(), before)


def test_optimizers_of_torch_run_nothing_else_unless_they_have_hooks() -> None:
    class Own(torch.optim.SGD):
        pass

    optimizers = [torch.optim.Adam(LINEAR.parameters()) for _ in range(3)]
    assert all(map(steps_only_torch, optimizers))
    optimizers[0].register_step_pre_hook(nothing)
    optimizers[1].register_step_post_hook(nothing)
    assert [steps_only_torch(o) for o in (*optimizers, Own(LINEAR.parameters()))] == [False, False, True, False]
    handle = register_optimizer_step_post_hook(nothing)
    assert not steps_only_torch(optimizers[2])
    handle.remove()


# A ReLU's zeros -------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Ends in a ReLU whose gradient something looks at: it scales what it gets by the norm of all of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how, self.kept = nn.Linear(3, 8), how, []
        self.relu = nn.ReLU()
        if how == "full backward hook":
            self.relu.register_full_backward_hook(lambda m, i, o: (i[0] * o[0].norm(),))

    @staticmethod
    def scaled(gradient: Tensor) -> Tensor:
        return gradient * gradient.norm()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.relu(self.linear(x))
        if not found.requires_grad:
            return found
        assert found.grad_fn is not None
        match self.how:
            case "hook":
                found.register_hook(self.scaled)
            case "hook before a view":
                found.register_hook(self.scaled)
                return found.view(len(x), 8)
            case "hook between two views":
                between = found.view(len(x), 2, 4)
                between.register_hook(self.scaled)
                return between.view(len(x), 8)
            case "hook on the node":
                found.grad_fn.register_hook(lambda i, o: tuple(g if g is None else g * o[0].norm() for g in i))
            case "hook before the node":
                found.grad_fn.register_prehook(lambda o: (self.scaled(o[0]),))
            case "hook before the node of a view":
                view = found.view(len(x), 8)
                assert view.grad_fn is not None
                view.grad_fn.register_prehook(lambda o: (self.scaled(o[0]),))
                return view
            case "retained gradient" | "retained gradient of a view's base":
                if self.kept:  # of the micro-batch before
                    factor = self.kept.pop().grad.norm()
                    found = found * factor
                    found = torch.relu(found)
                found.retain_grad()
                self.kept.append(found)
                return found.view(len(x), 8) if "view" in self.how else found
        return found


HOWS = [
    "hook",
    "hook before a view",
    "hook between two views",
    "hook on the node",
    "hook before the node",
    "hook before the node of a view",
    "full backward hook",
    "retained gradient",
    "retained gradient of a view's base",
]


def watched(how: str, **job: Any) -> Parties:
    torch.manual_seed(3)
    draw = np.random.default_rng(5)
    features = {name: draw.normal(size=(30, 3)).astype(np.float32) for name in ("a", "b")}
    bases = {"a": Watched(how), "b": nn.Sequential(nn.Linear(3, 8), nn.ReLU())}
    cuts = {"a": [8], "b": [8]}
    return parties(bases, Concatenated(16, 1), features, draw.integers(0, 2, 30), cuts=cuts, **job)


@pytest.mark.parametrize(
    ("how", "staleness"),  # what is retained in a step is not there yet when the next forward runs ahead of it
    [(how, staleness) for how in HOWS for staleness in (0, 1) if not (staleness and "retained" in how)],
)
def test_where_something_looks_at_a_relus_gradient_all_of_it_is_sent(how: str, staleness: int) -> None:
    pipeline = {"micro_batches": 2, "depth": 2 if staleness else 1, "staleness": staleness}
    plain, shorter = watched(how, pipeline=pipeline), watched(how, pipeline=pipeline, wire={"compress": "bitmap"})
    expected, found = plain.stages().train(plain.pipeline).modules(), shorter.stages().train(shorter.pipeline).modules()
    assert all(equal_weights(module, expected[name]) for name, module in found.items())


def test_a_relus_zeros_need_no_gradient_where_nothing_looks_at_it() -> None:
    x = LINEAR(ROWS)
    assert ends_in_relu(torch.relu(x))
    assert ends_in_relu(torch.relu(x).view(4, 2, 3))
    assert ends_in_relu(torch.relu(x).unsqueeze(1))
    assert ends_in_relu(torch.relu_(LINEAR(ROWS)))
    assert not ends_in_relu(x)
    assert not ends_in_relu(torch.relu(x) * 2)
    assert not ends_in_relu(torch.relu(ROWS))
    removed = torch.relu(x)
    removed.register_hook(nothing).remove()
    assert ends_in_relu(removed)

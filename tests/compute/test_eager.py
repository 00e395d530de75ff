"""Steps of torch's optimizers without its compiler: the same bits as theirs, and nothing of it is loaded."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sl_queue.compute.eager import backward, gradients_of, step
from sl_queue.compute.optimizers import optimizer_names
from tests.support.forked import environment

ROOT = Path(__file__).parents[2]
STEPS = 4
TRAINS = """
import sys
from pathlib import Path
from sl_queue.config.job import Job, PartyFile
from sl_queue.local.threads import run_local
from tests.support.credit import FILES, write_credit
job = write_credit(Path(sys.argv[1]))
run_local(Job.load(job), [PartyFile.load(job.parent / name) for name in FILES], out=job.parent / "out")
print(*({"torch._dynamo", "sympy"} & sys.modules.keys()))
"""


def trained(kind: type[Optimizer], do: Callable[[Optimizer], object], **options: object) -> list[Tensor]:
    """Return weights and state after a few steps on the same gradients."""
    draw = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(6, 5, generator=draw))
    optimizer = kind([weight], **options)  # type: ignore[arg-type]
    for _ in range(STEPS):
        weight.grad = torch.randn(6, 5, generator=draw)
        if kind is torch.optim.SparseAdam:
            weight.grad = weight.grad.to_sparse()
        do(optimizer)
    state = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return [weight.detach(), *state]


@pytest.mark.parametrize("name", sorted(optimizer_names()))
def test_a_step_of_each_optimizer_is_torchs_own_to_the_bit(name: str) -> None:
    kind = optimizer_names()[name]
    ours, theirs = trained(kind, step), trained(kind, lambda optimizer: optimizer.step())
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_hangs_on_an_optimizer_is_called() -> None:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    called: list[int] = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    step(optimizer)
    assert called == [1]
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([weight], lr=0.1), 1)
    step(scheduler.optimizer)
    assert scheduler.optimizer._opt_called  # type: ignore[attr-defined]


def test_a_run_does_without_the_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAINS, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), check=True, stdout=subprocess.PIPE)
    assert run.stdout == b"\n"


def test_a_backward_pass_gives_torchs_own_gradients_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(5)
    weight, unused = (nn.Parameter(torch.randn(6, 5, generator=draw)) for _ in range(2))
    rows, gradient = torch.randn(7, 6, generator=draw), torch.randn(7, 5, generator=draw)

    def root() -> Tensor:
        return torch.tanh(rows @ weight)

    torch.autograd.backward([root()], [gradient])
    wanted, weight.grad = weight.grad, None
    backward([root()], [gradient], keep=False)
    assert wanted is not None and weight.grad is not None and torch.equal(weight.grad, wanted)
    found = gradients_of([root()], [weight, unused], [gradient], keep=False)
    assert found[0] is not None and torch.equal(found[0], wanted) and found[1] is None


def test_a_gradient_of_another_shape_is_refused_as_torch_does() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        backward([weight * 2], [torch.ones(3)], keep=False)

"""Randomness is keyed: the job alone decides what is drawn, and nothing disturbs anybody else's draws."""

import random
import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue.compute.seeds import key, seeded
from sl_queue.protocol.messages import MicroBatch
from tests.support.bank import CPU, FIRST, stages
from tests.support.split import equal_weights

pytestmark = pytest.mark.usefixtures("one_thread_and_fixed_draws")


def test_every_part_of_a_key_changes_it() -> None:
    base = (7, "bank", "base forward", MicroBatch(3, 1))
    others = [(8, *base[1:]), (7, "ban", "kbase forward", base[3]), (7, "bank", "base evaluate", base[3])]
    others += [(*base[:3], MicroBatch(1, 3)), (*base[:3], MicroBatch(3, 2))]
    assert len({key(*words) for words in (base, *others)}) == 6
    assert 0 <= key(*base) < 2**64


def draws() -> tuple[float, float, float, float]:
    first, _ = np.random.randn(2)
    return torch.rand(()).item(), random.random(), float(np.random.rand()), float(first)


def divide_by_zero() -> None:
    with seeded(5, CPU):
        draws()
        raise ZeroDivisionError


def test_a_seeded_scope_repeats_its_draws_and_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    undisturbed = [draws() for _ in range(3)]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    found = [draws()]
    with seeded(5, CPU):
        first = draws()
    found.append(draws())
    with pytest.raises(ZeroDivisionError):
        divide_by_zero()
    found.append(draws())
    with seeded(6, CPU):
        np.random.seed(9)  # as models do
        assert draws()[:2] != first[:2]
    # Of a pair of normal draws NumPy keeps the second one, and a swap of generators drops it: ours are all first ones.
    assert found == undisturbed


def test_parties_that_are_threads_of_one_process_do_not_disturb_each_other() -> None:
    def draw(number: int) -> Tensor:
        with seeded(number, CPU):
            first = torch.rand(3)
            time.sleep(0.002)
            return torch.cat([first, torch.rand(3)])

    alone = [draw(n) for n in range(8)]
    together: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda n=n: together.update({n: draw(n)})) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[n], together[n]) for n in range(8))


class Drawn(nn.Module):
    """Draws its weights, and noise in every forward, from all three generators."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.bias = nn.Parameter(torch.tensor([random.random(), *np.random.rand(width - 1)], dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return self.linear(x) + self.bias + noise  # type: ignore[no-any-return]


def test_initial_weights_and_noise_follow_from_the_job_alone() -> None:
    bases = {"bank": Drawn, "insurer": nn.Linear(2, 3)}
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    one = stages(bases=bases).bases["bank"]
    draws()
    other = stages(bases=bases).bases["bank"]
    assert one.weights() == other.weights() != stages(bases=bases, seed=8).bases["bank"].weights()
    assert one.forward(FIRST) == other.forward(FIRST)
    noises = [stages(bases=bases, shuffle=False).bases["bank"].forward(MicroBatch(step, 0)) for step in (0, 3)]
    assert noises[0].rows == noises[1].rows, "the same rows in the next epoch"
    assert noises[0] != noises[1]


def test_parties_with_the_same_model_have_different_initial_weights() -> None:
    found = stages(bases={"bank": nn.Linear(3, 4), "insurer": lambda: nn.Linear(2, 3)})
    assert found.fuse.own is not None
    with seeded(key(7, "bank", "base init"), CPU):
        elsewhere = nn.Linear(2, 3)
    with seeded(key(7, "insurer", "base init"), CPU):
        here = nn.Linear(2, 3)
    assert equal_weights(found.fuse.own.module, here)
    assert not equal_weights(found.fuse.own.module, elsewhere)

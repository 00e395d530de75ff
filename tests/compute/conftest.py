"""Fixtures of tests over torch."""

from collections.abc import Iterator

import pytest
import torch

from sl_queue.compute.threads import limit_threads


@pytest.fixture
def one_thread_and_fixed_draws() -> Iterator[None]:
    """Sum in one order, and draw initial weights that do not depend on the test before."""
    before = torch.get_num_threads()
    limit_threads(1)
    torch.manual_seed(3)
    yield
    limit_threads(before)

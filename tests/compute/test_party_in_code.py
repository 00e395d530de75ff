"""A party file is built in code with modules and arrays."""

import numpy as np

from sl_queue.compute.names import NAMED_LOSSES
from sl_queue.config.job import PartyFile
from sl_queue.config.resolve import agree
from sl_queue.data.spec import Rows
from tests.support.job_files import job


def test_a_party_file_is_built_in_code_with_modules_and_arrays() -> None:
    from torch import nn

    module = nn.Linear(2, 32)
    rows = Rows([1, 2], np.zeros((2, 2), np.float32))
    built = PartyFile(party="bank", data=rows, base={"model": module, "optimizer": {"name": "adam", "lr": 1e-3}})
    assert built.base is not None
    assert built.base.model is module
    assert built.data is rows
    assert built.folder is None
    agree(job(), built)
    holder = PartyFile(
        party="insurer",
        data=Rows([1, 2], np.zeros((2, 2)), np.zeros(2)),
        base={"model": nn.Linear, "args": {"in_features": 2, "out_features": 16}, "optimizer": {"name": "sgd"}},
        fuse={"model": module, "optimizer": {"name": "sgd"}, "loss": nn.functional.mse_loss},
    )
    agree(job(), holder)
    from_callable = PartyFile(party="bank", data={"source": lambda: rows}, base={"model": module})
    agree(job(), from_callable)
    assert "Linear(" in repr(built)
    assert "0." not in repr(rows)


def test_losses_that_a_party_file_may_name_are_those_that_exist() -> None:
    from sl_queue.compute import losses

    assert set(NAMED_LOSSES) == set(losses.LOSSES)

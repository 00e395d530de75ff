"""A service whose tables, models or rows are not as they should be: right answers or clear refusals, and it goes on."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sl_queue
from sl_queue.data.spec import FileSpec
from sl_queue.data.to_predict import request_keys
from sl_queue.launch.service import id_key, versions_of
from sl_queue.protocol.messages import MicroBatch
from sl_queue.protocol.serving import Keys
from sl_queue.storage.versions import versions_in
from tests.compute.test_prediction import job
from tests.compute.test_serving import Service, chance, service, trained

__all__ = ["service", "trained"]  # fixtures


def write_rows(path: Path, ids: Any, features: Any) -> None:
    lines = [f"{one},{','.join(map(str, row))}" for one, row in zip(ids, features, strict=True)]
    path.write_text("\n".join(["id,a,b,c", *lines]) + "\n")


def keys_of(*ids: int) -> Keys:
    keys, _ = request_keys(ids, "integer", id_key(job()))
    assert keys is not None
    return keys


@pytest.fixture
def filed(trained: Any, tmp_path: Path) -> Iterator[tuple[Service, Path]]:
    """Serve the bank's rows from a file."""
    found, path = Service(trained[0]), tmp_path / "bank.csv"
    found.stop_bank()
    write_rows(path, found.ids, found.columns["bank"])
    table = replace(found.specs["bank"].table, data=FileSpec(path=path, ids=("id",)))
    found.specs["bank"] = replace(found.specs["bank"], table=table)
    yield found, path
    found.close()


def test_a_table_that_is_replaced_under_a_service_gives_nobody_another_customers_row(
    filed: tuple[Service, Path], trained: Any
) -> None:
    service, path = filed
    service.start_bank()
    front = np.arange(4000, 4007)  # ids before all others
    write_rows(path, [*front, *service.ids], [*np.ones((7, 3)), *service.columns["bank"]])
    for place in (0, 3):
        (found,) = service.ask([int(service.ids[place])]).json()["predictions"]
        assert found["probability"] == pytest.approx(chance(trained[1], service, place), abs=1e-6)


def test_a_version_that_is_built_later_names_the_rows_as_its_own_reading_has_them(
    filed: tuple[Service, Path], trained: Any, tmp_path: Path
) -> None:
    service, path = filed
    state = tmp_path / "bank"
    shutil.copytree(trained[0] / "bank", state)
    (first,) = versions_in(state)
    second = first.path.with_name("later")
    shutil.copytree(first.path, second)
    (second / "run.json").write_text(json.dumps({**first.about, "run": "later"}))
    versions = versions_of(job(), service.specs["bank"], state)
    before = versions.base_of(first.run)
    write_rows(path, [4000, *service.ids[:3]], [[1.0, 1.0, 1.0], *service.columns["bank"][:3]])
    after = versions.base_of("later")
    assert before is not None and after is not None
    known, gone = int(service.ids[2]), int(service.ids[9])
    for base in (before, after):
        found, outputs = base.in_place(MicroBatch(0, 0), keys_of(known))
        row = torch.tensor(service.columns["bank"][[2]]).float()
        assert found.all() and outputs is not None
        assert torch.allclose(outputs[0], trained[1].base("bank")(row), atol=1e-6)
    assert before.answer(MicroBatch(0, 0), keys_of(gone))[0].all()
    assert not after.answer(MicroBatch(0, 0), keys_of(gone))[0].any()  # the table of the later version lacks it

"""A worker that comes back with another table, model or code is refused at home, before anybody hears of it."""

import json
import logging
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import sl_queue
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.data.rows import Rows
from sl_queue.errors import CheckpointError
from sl_queue.launch.party import serve_party
from sl_queue.launch.workplace import Workplace
from tests.support.credit import FILES, bank_columns, edit, write_bank, write_credit
from tests.support.first_version import Enough, stop_after


def load(folder: Path) -> tuple[sl_queue.Job, list[sl_queue.PartyFile]]:
    return sl_queue.Job.load(folder / "job.toml"), [sl_queue.PartyFile.load(folder / name) for name in FILES]


def train(folder: Path, **options: Any) -> sl_queue.Result:
    job, files = load(folder)
    return sl_queue.run_local(job, files, out=folder / "out", **options)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Train the example for some of its epochs, in a folder of its own."""
    write_credit(tmp_path)
    edit(tmp_path / "job.toml", "micro_batches = 4", "micro_batches = 4\ncheckpoint_every = 1")
    with pytest.raises(Enough):
        train(tmp_path, on_status=stop_after(2))
    return tmp_path


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    write_credit(tmp_path)
    train(tmp_path)
    return tmp_path


def no_network(party: str, prefetch: int) -> NoReturn:
    raise AssertionError(f"{party} went to the broker")


def serve_bank(folder: Path) -> None:
    job, files = load(folder)
    serve_party(job, resolve(job, files[0], Importer()), Workplace(no_network, folder / "out" / "bank"))


def test_what_differs_is_said_with_both_remedies_and_the_broker_is_not_asked(begun: Path) -> None:
    columns = bank_columns(begun)
    write_bank(begun, {name: columns[name] for name in ("customer_id", "income", "age", "balance")})
    with pytest.raises(CheckpointError) as caught:
        serve_bank(begun)
    told = str(caught.value)
    assert told.startswith("party 'bank': ")
    assert "columns 'age', 'income' moved to another place" in told
    assert "Restore that, or start from scratch with another state folder" in told


def test_two_tables_that_changed_alike_are_refused_too(begun: Path) -> None:
    write_bank(begun, {name: np.asarray(values)[1:] for name, values in bank_columns(begun).items()})
    path = begun / "insurer.csv"
    header, _, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, *rest]) + "\n")
    with pytest.raises(CheckpointError, match="the table had 200 rows, now 199"):
        train(begun)


def test_a_table_that_is_back_is_gone_on_with(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    columns = bank_columns(begun)
    write_bank(begun, columns | {"age": columns["age"] * 2})
    with pytest.raises(CheckpointError, match="the values of column 'age' differ"):
        train(begun)
    write_bank(begun, columns)
    train(begun)
    whole = tmp_path_factory.mktemp("whole")
    write_credit(whole)
    edit(whole / "job.toml", "micro_batches = 4", "micro_batches = 4\ncheckpoint_every = 1")
    train(whole)
    for name in ("bank/final/base", "insurer/final/fuse"):
        ours, theirs = ((folder / "out" / f"{name}.safetensors").read_bytes() for folder in (begun, whole))
        assert ours == theirs


def test_a_finished_run_gives_its_weights_to_nobody_with_another_table(finished: Path) -> None:
    columns = bank_columns(finished)
    write_bank(finished, columns | {"age": columns["age"] * 2})
    with pytest.raises(CheckpointError, match="this run is finished, and it was trained with something else"):
        train(finished)
    write_bank(finished, columns)
    edit(finished / "bank.py", "self.relu", "self.rectified")
    with pytest.raises(CheckpointError, match="the source code of bank:BaseModel has changed"):
        train(finished)


def test_a_finished_run_stays_finished_when_its_table_is_gone(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    (finished / "bank.parquet").unlink()
    with caplog.at_level(logging.INFO, "sl_queue"):
        serve_bank(finished)
    assert "bank: not compared with what the finished run was trained on and with" in caplog.text
    assert "there is no such file" in caplog.text
    assert "bank: already finished after step" in caplog.text


def test_a_finished_run_stays_finished_on_another_machine(finished: Path) -> None:
    path = finished / "out" / "bank" / "final" / "run.json"
    said = json.loads(path.read_text())
    said["fingerprint"] |= {"threads": 64, "torch": "1.0"}
    path.write_text(json.dumps(said))
    serve_bank(finished)


def test_rows_given_in_code_are_compared_as_a_table_is(tmp_path: Path) -> None:
    write_credit(tmp_path)
    job, (bank, insurer) = load(tmp_path)
    random = np.random.default_rng(0)
    features = random.normal(size=(200, 3)).astype(np.float32)
    given = bank.model_copy(update={"data": Rows(np.arange(200), features)})
    with pytest.raises(Enough):
        sl_queue.run_local(job, [given, insurer], out=tmp_path / "out", on_status=stop_after(2))
    other = bank.model_copy(update={"data": Rows(np.arange(200), features * 100)})
    with pytest.raises(CheckpointError, match="the values of the features differ"):
        sl_queue.run_local(job, [other, insurer], out=tmp_path / "out")

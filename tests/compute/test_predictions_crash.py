"""A prediction in which a role crashes before or after one of its operations leaves the same rows, each once.

`python -m tests.compute.test_predictions_crash` crashes at every single operation; the suite at a sample of them.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

import sl_queue
from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.launch import asked as asked_module
from sl_queue.launch.asked import Asked
from sl_queue.launch.connect import MEMORY, connector
from sl_queue.launch.prediction import Predicted, predict_party, spec_to_predict
from sl_queue.launch.scheduler import serve_scheduler
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol.messages import SCHEDULER
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.pieces import PieceFolder
from tests.compute.test_prediction import N, files, job, new_rows, states
from tests.support.toy_run import CrashAt, FaultyLink, until_all_have_ended

ROLES = ("bank", "insurer", SCHEDULER)
STRIDE = {"bank": 13, "insurer": 13, SCHEDULER: 11}  # of the operations that the suite crashes at
JOB = job(batch_size=16, pipeline={"micro_batches": 2})


class DyingLink(FaultyLink):
    """Is gone with its worker: whoever closes it loses the connection."""

    def close(self) -> None:
        if self._crash.count > (self._crash.operation if self._crash.operation is not None else self._crash.count):
            self._link.abort()
        else:
            self._link.close()


@dataclass
class Prediction:
    """One prediction with a thread for each role, one of which crashes and is started again."""

    trained: Path
    folder: Path
    crashes: Mapping[str, CrashAt]
    rows: Mapping[str, sl_queue.Rows] = field(default_factory=lambda: new_rows()[0])
    found: Predicted | None = None

    def run(self) -> "Prediction":
        """Predict to the end."""
        importer, asked = Importer(), Asked()
        given = {file.party: file for file in files(self.rows)}
        self.specs = {
            name: spec_to_predict(resolve(JOB, file, importer), self.rows[name], asked) for name, file in given.items()
        }
        memory = connector(JOB, MEMORY)

        def serve(role: str) -> None:
            crash = self.crashes.get(role, CrashAt())

            def connect(party: str, prefetch: int) -> Any:
                return DyingLink(memory(party, prefetch), role, crash)

            self._serve(role, connect, asked)

        until_all_have_ended(ROLES, serve, starts=3)
        return self

    def _serve(self, role: str, connect: Any, asked: Asked) -> None:
        if role == SCHEDULER:
            place = Workplace(connect, self.folder / role)
            serve_scheduler(JOB, place, lambda _: None, late_s=0.0, prediction=asked.name)
            return
        place = Workplace(connect, states(self.trained)[role])
        predicted = predict_party(JOB, self.specs[role], asked, place, self.folder / role)
        self.found = predicted or self.found


def train(root: Path) -> Path:
    rng = np.random.default_rng(0)
    ids, bank, insurer = np.arange(N), rng.standard_normal((N, 3)), rng.standard_normal((N, 2))
    parties = files({"bank": sl_queue.Rows(ids, bank), "insurer": sl_queue.Rows(ids, insurer, ids % 2)})
    sl_queue.run_local(JOB, parties, out=root)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> dict[str, CrashAt]:
    """Make pieces and checkpoints on disk operations too, of the party whose they are; and commits frequent."""
    crashes: dict[str, CrashAt] = {}
    instrument(monkeypatch, crashes)
    return crashes


def instrument(monkeypatch: pytest.MonkeyPatch, crashes: dict[str, CrashAt]) -> None:
    monkeypatch.setattr(asked_module, "_STRETCH", 3)
    write, save = PieceFolder.write, Folder.save

    def piece(self: PieceFolder, *args: Any) -> None:
        crashes["insurer"]("before a piece")
        write(self, *args)
        crashes["insurer"]("after a piece")

    def checkpoint(self: Folder, *args: Any, **kwargs: Any) -> None:
        crashes[self._owner.party]("before a checkpoint")
        save(self, *args, **kwargs)
        crashes[self._owner.party]("after a checkpoint")

    monkeypatch.setattr(PieceFolder, "write", piece)
    monkeypatch.setattr(Folder, "save", checkpoint)


def crash_at(victim: str, crashes: dict[str, CrashAt], trained: Path, stride: int) -> int:
    """Crash at every `stride`-th operation of a role; return how many there were."""

    def predicted(crash: CrashAt) -> Predicted:
        crashes.clear()
        crashes.update({role: CrashAt() for role in ROLES} | {victim: crash})
        with TemporaryDirectory() as folder:
            found = Prediction(trained, Path(folder), crashes).run().found
        assert found is not None
        return found

    quiet = CrashAt()
    wanted, count = predicted(quiet), 0
    for operation in itertools.count(0, stride):
        if operation >= quiet.count:
            return count
        crash = CrashAt(operation)
        found, count = predicted(crash), count + 1
        where = f"{victim} at operation {operation} of {quiet.count}, {crash.seen[operation : operation + 1]}"
        assert np.array_equal(found.outputs, wanted.outputs), where
        assert np.array_equal(found.rows.positions, wanted.rows.positions), where
    raise AssertionError


@pytest.mark.parametrize("victim", ROLES)
def test_a_crash_of_any_role_leaves_the_same_rows_each_once(
    victim: str, trained: Path, operations: dict[str, CrashAt]
) -> None:
    assert crash_at(victim, operations, trained, STRIDE[victim]) >= 3


if __name__ == "__main__":
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        faults: dict[str, CrashAt] = {}
        train(Path(root))
        instrument(patch, faults)
        for each in ROLES:
            print(each, crash_at(each, faults, Path(root), 1), "operations", flush=True)

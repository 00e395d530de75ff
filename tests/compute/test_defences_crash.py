"""A run with every defence in which a party crashes at any of its operations: the same bits, and no draw but the same.

`python -m tests.compute.test_defences_crash` crashes at every single operation; the suite at a sample of them.
"""

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from sl_queue.config.resolve import resolve
from sl_queue.config.user_code import Importer
from sl_queue.launch.connect import MEMORY, connector
from sl_queue.launch.party import serve_party
from sl_queue.launch.scheduler import serve_scheduler
from sl_queue.launch.workplace import Workplace
from sl_queue.protocol.codec import decode
from sl_queue.protocol.messages import SCHEDULER, Activation, Gradient
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.privacy_ledger import Ledger
from sl_queue.storage.secret_file import write_secret
from tests.compute.test_privacy_run import EVERYTHING, files, job
from tests.support.crew import sums
from tests.support.toy_run import CrashAt, FaultyLink, until_all_have_ended

LABELS: dict[str, Any] = {"labels": {"epsilon": 3.0}, "gradients": "max-norm", "meter": True}
ROWS, PARTIES = 96, ("bank", "shop")
STRIDE = 11  # of the operations that the suite crashes at
JOB = job(epochs=2, batch_size=32, pipeline={"micro_batches": 2, "checkpoint_every": 2})

DEFENDED = ((LABELS, "shop.secret"), (EVERYTHING, "bank.secret"))
SECRETS = [name for _, name in DEFENDED]

Sent = dict[tuple[str, str, str, int, int], set[bytes]]  # the numbers of each tensor that ever left, by its way


class Watched(FaultyLink):
    """Keeps the tensors that leave, and is gone with its worker: whoever closes it loses the connection."""

    def __init__(self, link: Any, role: str, crash: CrashAt, sent: Sent) -> None:
        super().__init__(link, role, crash)
        self._sent = sent

    def publish(self, receiver: str, kind: Any, run: str, body: bytes, **named: Any) -> None:
        header, message = decode(body)
        if isinstance(message, Activation | Gradient):
            way = (header.sender, receiver, str(kind), header.micro_batch.step, header.micro_batch.index)
            self._sent.setdefault(way, set()).add(bytes(message.payload.data))
        super().publish(receiver, kind, run, body, **named)

    def close(self) -> None:
        if self._crash.operation is not None and self._crash.count > self._crash.operation:
            self._link.abort()
        else:
            self._link.close()


@dataclass
class Run:
    """One run with a thread for each role, of which `victim` crashes and is started again."""

    folder: Path
    victim: str
    crash: CrashAt
    sent: Sent = field(default_factory=dict)

    def finish(self) -> "Run":
        """Train to the end."""
        memory = connector(JOB, MEMORY)

        def serve(role: str) -> None:
            def connect(party: str, prefetch: int) -> Any:
                crash = self.crash if role == self.victim else CrashAt()
                return Watched(memory(party, prefetch), role, crash, self.sent)

            self._serve(role, Workplace(connect, self.folder / role))

        until_all_have_ended(("bank", "post", "shop", SCHEDULER), serve, starts=2)
        return self

    def _serve(self, role: str, place: Workplace) -> None:
        if role == SCHEDULER:
            serve_scheduler(JOB, place, lambda _: None, late_s=0.0)
            return
        shop, bank = ({**given, "secret": self.folder / name} for given, name in DEFENDED)
        (file,) = (each for each in files(shop, bank, ROWS) if each.party == role)
        serve_party(JOB, resolve(JOB, file, Importer()), place, private=role in PARTIES)

    @property
    def outcome(self) -> tuple[dict[str, str], Mapping[str, list[Any]], Sent]:
        """Return the weights, what each party entered as released, and all tensors that left."""
        return sums(self.folder), {party: entered(self.folder / party) for party in PARTIES}, self.sent


def entered(state: Path) -> list[Any]:
    """Return what a party has entered in its ledger, in order, without what names the run."""
    lines = map(json.loads, (state / "privacy.jsonl").read_text().splitlines())
    return [(line["mechanism"], line["generation"], line.get("epoch")) for line in lines]


def instrument(monkeypatch: pytest.MonkeyPatch, crashes: dict[str, CrashAt]) -> None:
    """Make checkpoints and entries of the ledger operations too, of the party whose they are."""
    save, enter = Folder.save, Ledger.enter

    def checkpoint(self: Folder, *args: Any, **kwargs: Any) -> None:
        crash = crashes.get(self._owner.party, CrashAt())
        crash("before a checkpoint")
        save(self, *args, **kwargs)
        crash("after a checkpoint")

    def entry(self: Ledger, release: Any) -> None:
        crash = crashes.get(release.party, CrashAt())
        crash("before an entry")
        enter(self, release)
        crash("after an entry")

    monkeypatch.setattr(Folder, "save", checkpoint)
    monkeypatch.setattr(Ledger, "enter", entry)


def crash_at(victim: str, crashes: dict[str, CrashAt], secrets: Path, stride: int) -> int:
    """Crash at every `stride`-th operation of a party; return how often."""

    def trained(crash: CrashAt) -> Any:
        crashes.clear()
        crashes[victim] = crash
        with TemporaryDirectory() as folder:
            for name in SECRETS:
                shutil.copy2(secrets / name, folder)
            return Run(Path(folder), victim, crash).finish().outcome

    quiet = CrashAt()
    wanted, count = trained(quiet), 0
    assert all(len(bodies) == 1 for bodies in wanted[2].values())
    assert len(wanted[1][victim]) >= 1, "nothing is entered"
    for operation in itertools.count(0, stride):
        if operation >= quiet.count:
            return count
        crash = CrashAt(operation)
        found, count = trained(crash), count + 1
        where = f"{victim} at operation {operation} of {quiet.count}, {crash.seen[operation : operation + 1]}"
        for kind, mine, right in zip(("weights", "ledger", "tensors"), found, wanted, strict=True):
            assert mine == right, f"{where}: other {kind}"
    raise AssertionError


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> dict[str, CrashAt]:
    crashes: dict[str, CrashAt] = {}
    instrument(monkeypatch, crashes)
    return crashes


@pytest.mark.parametrize("victim", PARTIES)
def test_a_crash_at_any_operation_repeats_every_draw_and_changes_no_bit(
    victim: str, tmp_path: Path, operations: dict[str, CrashAt]
) -> None:
    for name in SECRETS:
        write_secret(tmp_path / name)
    assert crash_at(victim, operations, tmp_path, STRIDE) >= 4


if __name__ == "__main__":
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        faults: dict[str, CrashAt] = {}
        instrument(patch, faults)
        for secret in SECRETS:
            write_secret(Path(root) / secret)
        for party in PARTIES:
            print(party, crash_at(party, faults, Path(root), 1), "operations", flush=True)

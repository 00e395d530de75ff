"""A state folder: whole or passed over, one worker at a time, and never another job's."""

import gc
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sl_queue.cut.crossing import from_payload, to_payload
from sl_queue.errors import CheckpointError, LocalProtocolError, PartyBusy
from sl_queue.protocol.checkpoint import Final, Saved, State
from sl_queue.protocol.messages import BEFORE_FIRST_STEP, Payload
from sl_queue.protocol.scheduler.state import RunState
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.final import holds_final
from sl_queue.storage.run_file import RunFile
from sl_queue.storage.tensor_file import TornFileError, sealed, unsealed

FINGERPRINT = {"base.model": "bank:Base", "threads": 1, "base.optimizer.betas": [0.9, 0.999]}


def folder(path: Path, **changes: Any) -> Folder:
    return Folder(path, **{"job_digest": "a" * 64, "party": "bank", "fingerprint": FINGERPRINT, **changes})


def state(step: int = 0) -> State:
    weight = Payload("float32", (2, 2), bytes([step % 256] * 16))
    return State({"weight": weight, "empty": Payload("bfloat16", (0, 3), b"")}, {"updates": step, "third": 1 / 3})


def save(to: Folder, *steps: int, generation: int = 0) -> None:
    for step in steps:
        to.save(step, state(step), run="run", generation=generation, values={"epochs": [{"loss": 0.1, "auroc": None}]})


def files(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "checkpoints").iterdir())


# What is saved is what is loaded ------------------------------------------------------------------------------------


def test_a_checkpoint_gives_back_exactly_what_was_saved(tmp_path: Path) -> None:
    with folder(tmp_path / "bank") as checkpoints:
        save(checkpoints, 49, generation=3)
    with folder(tmp_path / "bank") as checkpoints:
        values = {"epochs": [{"loss": 0.1, "auroc": None}]}
        assert checkpoints.newest() == Saved("run", 3, 49, state(49), values)
        assert checkpoints.load(49) == checkpoints.newest()


FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_every_dtype_and_shape_survives(tmp_path: Path, dtype: str) -> None:
    drawn = torch.randint(0, 2, (3, 1, 5), generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    tensors = {"many": to_payload(drawn), "scalar": to_payload(drawn[0, 0, 0]), "none": to_payload(drawn[:0])}
    with folder(tmp_path) as checkpoints:
        checkpoints.save(0, State(tensors, {}), run="run", generation=0, values={})
        saved = checkpoints.load(0)
    assert dict(saved.state.tensors) == tensors
    assert from_payload(saved.state.tensors["scalar"]).shape == ()


def test_a_folder_without_checkpoints_says_so(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        assert checkpoints.steps() == ()
        assert checkpoints.newest() is None
        assert checkpoints.finished() is None
        with pytest.raises(CheckpointError, match="no intact checkpoint of step 7; intact are: none"):
            checkpoints.load(7)
        with pytest.raises(LocalProtocolError):
            save(checkpoints, BEFORE_FIRST_STEP)


def test_storage_needs_no_torch() -> None:
    script = "import sys, sl_queue.storage.checkpoints; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


# Which ones are kept ------------------------------------------------------------------------------------------------


def test_the_last_three_are_kept_and_the_best_one(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        save(checkpoints, 4, 9)
        checkpoints.keep(9)
        save(checkpoints, 14, 19, 24, 29)
        assert checkpoints.steps() == (9, 19, 24, 29)
    with folder(tmp_path) as checkpoints:  # a worker that starts again still knows which one is the best
        save(checkpoints, 34)
        assert checkpoints.steps() == (9, 24, 29, 34)
        checkpoints.keep(None)
        save(checkpoints, 39)
        assert checkpoints.steps() == (29, 34, 39)


def test_checkpoints_of_an_abandoned_generation_are_forgotten(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        save(checkpoints, 4, 9, 14)
        checkpoints.keep(14)
        checkpoints.discard_after(9)
        assert checkpoints.steps() == (4, 9)
        save(checkpoints, 14, 19, 24, 29, generation=1)
        assert checkpoints.steps() == (19, 24, 29)
    with folder(tmp_path) as checkpoints:
        checkpoints.discard_after(BEFORE_FIRST_STEP)
        assert checkpoints.steps() == ()
        assert files(tmp_path) == ["kept.json"]


def test_a_step_that_is_saved_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        save(checkpoints, 4, generation=0)
        save(checkpoints, 4, generation=1)
        assert checkpoints.load(4).generation == 1


# Torn and altered files ---------------------------------------------------------------------------------------------


def test_a_torn_newest_checkpoint_is_passed_over_with_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with folder(tmp_path) as checkpoints:
        save(checkpoints, 4, 9)
    torn = tmp_path / "checkpoints" / "step-000000009.safetensors"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    with caplog.at_level(logging.WARNING, logger="sl_queue"), folder(tmp_path) as checkpoints:
        assert checkpoints.steps() == (4,)
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.step == 4
        assert "step-000000009.safetensors is torn or altered" in caplog.text
        save(checkpoints, 9)
        assert checkpoints.steps() == (4, 9)


def test_no_cut_and_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    body = sealed(state(3).tensors, {"step": 3, "values": {"loss": 0.25}})
    path.write_bytes(body)
    assert unsealed(path).tensors == state(3).tensors
    for n in range(len(body)):
        path.write_bytes(body[:n])
        with pytest.raises(TornFileError):
            unsealed(path)
        path.write_bytes(body[:n] + bytes([body[n] ^ (1 << n % 8)]) + body[n + 1 :])
        with pytest.raises(TornFileError):
            unsealed(path)
    path.write_bytes(body + b"\0")
    with pytest.raises(TornFileError):
        unsealed(path)


SAVE_FOR_EVER = """
import sys
from pathlib import Path
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.messages import Payload
from sl_queue.protocol.scheduler.state import RunState
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.run_file import RunFile
checkpoints = Folder(Path(sys.argv[1]), job_digest="a" * 64, party="bank", fingerprint={})
first = (checkpoints.steps() or (-1,))[-1] + 1
print(first, flush=True)
for step in range(first, 10**6):
    tensors = {"weight": Payload("float32", (250_000,), step.to_bytes(4, "little") * 250_000)}
    checkpoints.save(step, State(tensors, {}), run="run", generation=0, values={})
"""


def written(checkpoints: Path) -> int:
    """Return the newest step that is there now, or -1."""
    return max((int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*.safetensors")), default=-1)


def test_a_worker_killed_at_any_moment_leaves_whole_checkpoints_and_no_lock(tmp_path: Path) -> None:
    for i in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, env=environment()
        ) as worker:
            assert worker.stdout is not None
            first = int(worker.stdout.readline())
            while written(tmp_path / "checkpoints") < first + 2:  # not for that one: it may have come and gone
                time.sleep(0.001)
            time.sleep(0.0007 * i)
            worker.send_signal(signal.SIGKILL)
        with folder(tmp_path, fingerprint={}) as checkpoints:
            newest = checkpoints.newest()
            assert newest is not None
            assert newest.step >= first + 2
            assert newest.state.tensors["weight"].data == newest.step.to_bytes(4, "little") * 250_000
            assert len(checkpoints.steps()) >= 3
            assert not list((tmp_path / "checkpoints").glob(".*")), "leftovers of a write that was cut short"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


# Whose folder it is -------------------------------------------------------------------------------------------------


LOCK_IT = """
import sys
from pathlib import Path
from sl_queue.protocol.scheduler.state import RunState
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.run_file import RunFile
Folder(Path(sys.argv[1]), job_digest="a" * 64, party="bank", fingerprint={})
"""


def test_a_second_worker_is_told_that_the_party_is_served(tmp_path: Path) -> None:
    with folder(tmp_path), pytest.raises(PartyBusy, match=rf"\(process {os.getpid()}\) serves party 'bank'"):
        folder(tmp_path)
    with folder(tmp_path) as checkpoints:
        command = [sys.executable, "-c", LOCK_IT, str(tmp_path)]
        second = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
        assert "PartyBusy" in second.stderr
        checkpoints.close()
        checkpoints.close()
        assert subprocess.run(command, env=environment(), timeout=300, check=False).returncode == 0


def test_the_lock_goes_with_the_object(tmp_path: Path) -> None:
    first = folder(tmp_path)
    del first
    gc.collect()
    folder(tmp_path).close()


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_job_or_party_is_refused(tmp_path: Path, finished: bool) -> None:
    with folder(tmp_path) as checkpoints:
        if finished:
            checkpoints.write_final({"base": {}}, run="run", step=4, incarnation="i")
        else:
            save(checkpoints, 4)
    with pytest.raises(CheckpointError, match=r"another job \(digest aaaaaaaaaaaa, .* bbbbbbbbbbbb\).*--state"):
        folder(tmp_path, job_digest="b" * 64)
    with pytest.raises(CheckpointError, match=r"belongs to party 'bank', not 'insurer'.*--state"):
        folder(tmp_path, party="insurer")
    folder(tmp_path).close()


def test_what_differs_from_the_job_of_a_folder_is_named(tmp_path: Path) -> None:
    with folder(tmp_path, job={"seed": 7, "epochs": 5}) as checkpoints:
        save(checkpoints, 4)
    with pytest.raises(CheckpointError, match=r"another job \(epochs: 6 here, 5 there\)"):
        folder(tmp_path, job_digest="b" * 64, job={"seed": 7, "epochs": 6})
    first, other = {"seed": 7, "wire": {"dtype": "int8"}}, {"seed": 8, "wire": {"dtype": "float32"}}
    with closing(RunFile(tmp_path, first, "a")) as ledger:
        ledger.save(RunState())
        assert ledger.load() == RunState()
    differing = r'another job \(seed: 8 here, 7 there; wire.dtype: "float32" here, "int8" there\)'
    with closing(RunFile(tmp_path, other, "b")) as ledger, pytest.raises(CheckpointError, match=differing):
        ledger.load()


def test_a_folder_written_with_other_settings_is_refused_naming_each(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        save(checkpoints, 4)
    changed = {k: v for k, v in FINGERPRINT.items() if k != "base.model"} | {"threads": 2, "device": "cuda"}
    with pytest.raises(CheckpointError) as caught:
        folder(tmp_path, fingerprint=changed)
    for difference in (
        "base.model was 'bank:Base', now 'not there'",
        "device was 'not there', now 'cuda'",
        "threads was 1, now 2",
    ):
        assert difference in str(caught.value)
    assert "betas" not in str(caught.value)
    folder(tmp_path, fingerprint=FINGERPRINT | {"base.optimizer.betas": (0.9, 0.999)}).close()


def test_only_the_owner_may_look_into_a_new_state_folder(tmp_path: Path) -> None:
    with folder(tmp_path / "deep" / "bank"):
        for path in ("", "checkpoints", "final"):
            assert (tmp_path / "deep" / "bank" / path).stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "deep" / "bank" / "lock").stat().st_mode & 0o777 == 0o600


# When the system says no --------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """Have the kernel refuse to write more, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """Nobody but root may write there, and this process is not root."""
    path.chmod(0o500)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        path.chmod(0o700)


def test_a_full_disk_is_told_and_the_checkpoints_before_survive(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        save(checkpoints, 4, 9)
        big = State({"weight": Payload("int8", (5000,), bytes(5000))}, {})
        with files_of_at_most(1000), pytest.raises(CheckpointError, match=r"File too large.*intact.*make room"):
            checkpoints.save(14, big, run="run", generation=0, values={})
        assert checkpoints.steps() == (4, 9)
        assert files(tmp_path) == ["step-000000004.safetensors", "step-000000009.safetensors"]
        save(checkpoints, 14)
    with folder(tmp_path) as checkpoints:
        assert checkpoints.steps() == (4, 9, 14)


def test_a_folder_without_rights_is_told_and_the_checkpoints_before_survive(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        save(checkpoints, 4, 9)
        with without_rights(tmp_path / "checkpoints"), pytest.raises(CheckpointError, match="Permission denied"):
            save(checkpoints, 14)
        with without_rights(tmp_path / "final"), pytest.raises(CheckpointError, match="Permission denied"):
            checkpoints.write_final({"base": {}}, run="run", step=9, incarnation="i")
        assert checkpoints.finished() is None
    with folder(tmp_path) as checkpoints:
        assert checkpoints.steps() == (4, 9)


def test_a_state_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "bank").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot be used: (File exists|Not a directory)"):
        folder(tmp_path / "bank")


# Final weights ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.there, self.norm, self.back = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.back.weight = self.there.weight


def test_final_weights_load_straight_into_the_module_and_say_that_the_party_has_finished(tmp_path: Path) -> None:
    module = Tied().to(torch.bfloat16)
    module.norm(torch.ones(2, 3, dtype=torch.bfloat16))  # counts a batch
    weights = {"base": {name: to_payload(tensor) for name, tensor in module.state_dict().items()}}
    with folder(tmp_path) as checkpoints:
        checkpoints.write_final(weights, run="run", step=49, incarnation="first")
        checkpoints.mark_reported()
    written = tmp_path / "final" / "base.safetensors"
    other = Tied().to(torch.bfloat16)
    other.load_state_dict(load_file(written))
    pairs = zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    with folder(tmp_path) as checkpoints:
        digests = {"base.safetensors": sha256(written.read_bytes()).hexdigest()}
        assert checkpoints.finished() == Final("run", 49, "first", digests, reported=True)
        checkpoints.write_final(weights, run="run", step=49, incarnation="second")
        assert checkpoints.finished() == Final("run", 49, "second", digests, reported=False)


def test_finishing_is_told_last(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        sizes = {"base": 10, "fuse": 5000}
        big = {part: {"weight": Payload("int8", (size,), bytes(size))} for part, size in sizes.items()}
        with files_of_at_most(1000), pytest.raises(CheckpointError):
            checkpoints.write_final(big, run="run", step=49, incarnation="i")
        assert checkpoints.finished() is None
        with pytest.raises(LocalProtocolError):
            checkpoints.mark_reported()


def test_an_unreadable_note_of_finishing_is_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with folder(tmp_path) as checkpoints:
        checkpoints.write_final({"base": {}}, run="run", step=49, incarnation="i")
        assert json.loads((tmp_path / "final" / "run.json").read_text())["step"] == 49
        (tmp_path / "final" / "run.json").write_text("{")
        assert checkpoints.finished() is None
    assert "run.json cannot be used" in caplog.text


def test_final_weights_that_were_altered_are_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {"base": {"weight": Payload("int8", (2,), b"ab")}}
    with folder(tmp_path) as checkpoints:
        checkpoints.write_final(weights, run="run", step=49, incarnation="i")
        assert not holds_final(tmp_path, "a" * 64), "the scheduler does not know"
        checkpoints.mark_reported()
        assert holds_final(tmp_path, "a" * 64) and not holds_final(tmp_path, "b" * 64)
        file = tmp_path / "final" / "base.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"c")
        assert checkpoints.finished() is None and not holds_final(tmp_path, "a" * 64)
    assert "base.safetensors is torn or altered" in caplog.text

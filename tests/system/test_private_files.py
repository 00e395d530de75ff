"""Files of a worker are its owner's alone, what others may read is no secret, and a shortage is no broken file."""

import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sl_queue.config.broker_url import read_url
from sl_queue.errors import CheckpointError, JobError, ResourceShortage, TransportError
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.messages import Payload
from sl_queue.protocol.scheduler.state import RunState
from sl_queue.security.keys import PrivateKey, read_key, write_key
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.files import unusable, write_durably
from sl_queue.storage.run_file import RunFile
from tests.support.shortage import no_descriptors_left

TENSORS = {"w": Payload("float32", (1,), b"\0\0\0\0")}
URL = "amqps://bank:secret@broker/credit"


def folder(path: Path) -> Folder:
    return Folder(path, job_digest="d", party="bank", fingerprint={})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def ordinary_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def write_all(path: Path) -> None:
    """Everything that a party and a scheduler ever write."""
    with folder(path / "bank") as bank:
        bank.save(3, State(TENSORS, {}), run="r", generation=0, values={})
        bank.keep(3)
        bank.write_final({"base": TENSORS}, run="r", step=3, incarnation="i")
        bank.mark_reported()
    scheduler = RunFile(path / "scheduler", {}, "d")
    scheduler.save(RunState())
    scheduler.close()


def test_every_file_of_a_state_folder_is_its_owners_alone(tmp_path: Path) -> None:
    write_all(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 7
    assert {str(path.relative_to(tmp_path)): mode(path) for path in files if mode(path) != 0o600} == {}


def test_a_leftover_of_an_earlier_version_gives_its_mode_to_nothing(tmp_path: Path) -> None:
    (tmp_path / ".kept.json.tmp").write_bytes(b"half")
    (tmp_path / "kept.json").write_bytes(b"old")
    write_durably(tmp_path / "kept.json", b"new")
    assert (mode(tmp_path / "kept.json"), (tmp_path / "kept.json").read_bytes()) == (0o600, b"new")


@pytest.mark.parametrize("bits", [0o755, 0o750, 0o711])
def test_a_state_folder_that_others_may_read_is_left_as_it_is_and_named(
    tmp_path: Path, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("bank", "scheduler"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(bits)
    with caplog.at_level(logging.WARNING, "sl_queue"):
        write_all(tmp_path)
    assert [mode(tmp_path / name) for name in ("bank", "scheduler")] == [bits, bits]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert f"{tmp_path}/bank may be read by others" in warned[0]
    assert f"{tmp_path}/scheduler may be read by others" in warned[1]


def test_a_state_folder_of_ones_own_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sl_queue"):
        write_all(tmp_path)
    assert caplog.records == []


@pytest.mark.parametrize("bits", [0o644, 0o640, 0o604, 0o660])
def test_a_broker_url_that_others_may_read_is_refused_as_a_key_is(tmp_path: Path, bits: int) -> None:
    (tmp_path / "broker.url").write_text(URL)
    write_key(tmp_path / "seal.key", PrivateKey.generate(signs=False))
    for name in ("broker.url", "seal.key"):
        (tmp_path / name).chmod(bits)
    told = []
    for read in (lambda: read_url("file:broker.url", tmp_path), lambda: read_key(tmp_path / "seal.key")):
        with pytest.raises(JobError, match=rf"others may read this .* \(mode {bits:o}\); run: chmod 600") as error:
            read()
        told.append(str(error.value))
    assert "secret" not in "".join(told)


@pytest.mark.parametrize("bits", [0o600, 0o400])
def test_a_broker_url_of_ones_own_is_read(tmp_path: Path, bits: int) -> None:
    (tmp_path / "broker.url").write_text(f"{URL}\n")
    (tmp_path / "broker.url").chmod(bits)
    assert read_url("file:broker.url", tmp_path) == URL


def test_a_pipe_gives_its_url_once_and_is_not_waited_for_again() -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, URL.encode())
        os.close(writing)
        assert read_url(f"file:/dev/fd/{reading}") == URL
        with pytest.raises(JobError, match="not a file that can be read again"):
            read_url(f"file:/dev/fd/{reading}", again=True)
    finally:
        os.close(reading)


# Shortages --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_finds_no_descriptor_is_worth_a_restart_and_those_before_stay(tmp_path: Path) -> None:
    with folder(tmp_path / "bank") as bank:
        bank.save(3, State(TENSORS, {}), run="r", generation=0, values={})
        bank.write_final({"base": TENSORS}, run="r", step=3, incarnation="i")
        attempts = (
            lambda: bank.save(7, State(TENSORS, {}), run="r", generation=0, values={}),
            lambda: bank.keep(3),
            lambda: bank.load(3),
            bank.finished,
            lambda: bank.write_final({"base": TENSORS}, run="r", step=3, incarnation="i"),
        )
        for attempt in attempts:
            with (
                no_descriptors_left(),
                pytest.raises(ResourceShortage, match=r"Too many open files.* it resumes") as error,
            ):
                attempt()
            assert (error.value.exit_code, isinstance(error.value, TransportError)) == (75, True)
        assert bank.steps() == (3,)
        assert bank.load(3).step == 3
    with no_descriptors_left(), pytest.raises(ResourceShortage):
        folder(tmp_path / "bank")
    with folder(tmp_path / "bank") as bank:
        assert bank.steps() == (3,)


def test_a_scheduler_that_finds_no_descriptor_does_not_call_its_file_broken(tmp_path: Path) -> None:
    with no_descriptors_left(), pytest.raises(ResourceShortage):
        RunFile(tmp_path / "scheduler", {}, "d")
    ledger = RunFile(tmp_path / "scheduler", {}, "d")
    ledger.save(RunState(run="r"))
    for attempt in (ledger.load, lambda: ledger.save(RunState(run="q"))):
        with no_descriptors_left(), pytest.raises(ResourceShortage):
            attempt()
    assert ledger.load() == RunState(run="r")
    ledger.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM])
def test_every_shortage_is_worth_a_restart(code: int) -> None:
    assert unusable(Path("state"), OSError(code, os.strerror(code))).exit_code == 75


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_all_else_needs_a_person(code: int) -> None:
    error = unusable(Path("state"), OSError(code, os.strerror(code)))
    assert isinstance(error, CheckpointError) and "make room or fix the permissions" in str(error)

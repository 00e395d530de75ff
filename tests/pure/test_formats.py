"""A state folder or a message of another version is refused with both versions named; the first version's are read."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import pytest

from sl_queue.errors import CheckpointError
from sl_queue.protocol.checkpoint import State
from sl_queue.protocol.codec import VERSION, AnotherVersion, decode, encode
from sl_queue.protocol.messages import Activation, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.scheduler.state import RunState
from sl_queue.storage.checkpoints import Folder
from sl_queue.storage.formats import FORMAT, OLDEST
from sl_queue.storage.run_file import RunFile
from sl_queue.storage.tensor_file import sealed, unsealed

FIRST = Path(__file__).parents[1] / "support" / "data" / "first_version"
FIRST_JOB = "stopped"
OTHERS = (OLDEST - 1, FORMAT + 1)
NAMED = (
    rf"another version of sl_queue: it is of format {{}}, and this version reads format {FORMAT}; install the version"
)


def folder(path: Path, job_digest: str = "d") -> Folder:
    return Folder(path, job_digest=job_digest, party="bank", fingerprint=None)


def with_checkpoint(path: Path, **about: Any) -> Path:
    """Write a state folder with one checkpoint, of which something else is said."""
    with folder(path) as written:
        written.require({})
        written.save(3, State({"w": Payload("float32", (1,), b"\0\0\0\0")}, {}), run="r", generation=0, values={})
    file = path / "checkpoints" / "step-000000003.safetensors"
    found = unsealed(file)
    file.write_bytes(sealed(found.tensors, {**found.about, **about}))
    return path


@pytest.mark.parametrize("version", [*OTHERS, None, "1", True])
def test_a_checkpoint_of_another_format_is_refused_and_stays(tmp_path: Path, version: object) -> None:
    with_checkpoint(tmp_path, format=version)
    before = (tmp_path / "checkpoints" / "step-000000003.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=NAMED.format(repr(version))):
        folder(tmp_path)
    assert (tmp_path / "checkpoints" / "step-000000003.safetensors").read_bytes() == before


@pytest.mark.parametrize("version", OTHERS)
def test_final_weights_of_another_format_are_refused_whatever_else_they_say(tmp_path: Path, version: int) -> None:
    with folder(tmp_path) as written:
        written.write_final({}, run="r", step=3, incarnation="i")
    path = tmp_path / "final" / "run.json"
    path.write_text(json.dumps({"format": version, "weights": "elsewhere"}))
    with pytest.raises(CheckpointError, match=NAMED.format(version)):
        folder(tmp_path)


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    with_checkpoint(tmp_path, format=1)
    with folder(tmp_path) as found:
        assert found.steps() == (3,)


def test_checkpoints_that_the_first_version_left_are_read() -> None:
    for file in FIRST.glob("*/bank/checkpoints/step-*"):
        assert unsealed(file).about["format"] == 1


def ledger(path: Path, **changes: Any) -> RunFile:
    """Write a scheduler's folder of which something else is said; None takes it out."""
    with closing(RunFile(path, {"name": "job"}, "d")) as written:
        written.save(RunState(run="r"))
    says = {**json.loads((path / "run.json").read_text()), **changes}
    (path / "run.json").write_text(json.dumps({key: value for key, value in says.items() if value is not None}))
    return RunFile(path, {"name": "job"}, "d")


@pytest.mark.parametrize("version", OTHERS)
def test_a_run_file_of_another_format_is_refused(tmp_path: Path, version: int) -> None:
    with (
        closing(ledger(tmp_path, format=version, state={"of": "another kind"})) as found,
        pytest.raises(CheckpointError, match=NAMED.format(version)),
    ):
        found.load()


@pytest.mark.parametrize("version", [None, 1])
def test_a_run_file_of_the_first_version_which_did_not_say_so_is_read(tmp_path: Path, version: int | None) -> None:
    with closing(ledger(tmp_path, format=version)) as found:
        state = found.load()
    assert state is not None
    assert state.run == "r"


def test_the_run_file_that_the_first_version_left_is_read(tmp_path: Path) -> None:
    stored = json.loads((FIRST / FIRST_JOB / "scheduler" / "run.json").read_text())
    assert "format" not in stored
    (tmp_path / "run.json").write_text(json.dumps(stored))
    with closing(RunFile(tmp_path, stored["says"], stored["job"])) as found:
        assert found.load() is not None


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_a_message_of_another_version_is_refused_and_one_of_the_first_is_read(version: int) -> None:
    header = Header("r", 0, Kind.ACTIVATION, "bank", "shop", MicroBatch(0, 0))
    body = encode(header, Activation(MicroBatch(0, 0), Payload("float32", (1,), b"\0\0\0\0", b"12345678")))
    fields = msgpack.unpackb(body)
    assert fields[0] == 1
    assert decode(body)[0] == header
    with pytest.raises(AnotherVersion, match=f"protocol version {version}; this program speaks {VERSION}"):
        decode(msgpack.packb([version, *fields[1:]]))

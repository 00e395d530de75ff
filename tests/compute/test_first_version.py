"""A run that the first version of sl_queue began is ended as that version would have ended it."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sl_queue
from sl_queue.errors import CheckpointError
from sl_queue.protocol.control import Join
from sl_queue.protocol.fingerprints import rules_of
from sl_queue.protocol.scheduler.agreement import disagreement
from sl_queue.protocol.scheduler.state import Member, Plan, RunState
from sl_queue.storage.tensor_file import sealed, unsealed
from tests.support import first_version

WEIGHTS = ("bank/final/base.safetensors", "shop/final/fuse.safetensors")


def stored(name: str, folder: Path) -> Path:
    """Copy what the first version left, as if this torch had written it and its models were where they are now."""
    shutil.copytree(first_version.FOLDER / name, folder)
    for path in folder.glob("*/checkpoints/*.safetensors"):
        found = unsealed(path)
        moved = json.dumps(found.about["fingerprint"]).replace('"tests.', '"tests.support.')
        fingerprint = json.loads(moved) | {"torch": str(torch.__version__)}
        path.write_bytes(sealed(found.tensors, found.about | {"fingerprint": fingerprint}))
    return folder


def assert_ended_as_before(folder: Path) -> None:
    """Compare the final weights with those that the first version left; processors differ in their last bits."""
    for name in WEIGHTS:
        before, now = load_file(first_version.FOLDER / "finished" / name), load_file(folder / name)
        assert before.keys() == now.keys()
        for key in before:
            assert torch.allclose(before[key], now[key], rtol=0, atol=1e-5)  # other rows or masks: 1e-2


def fingerprints(folder: Path) -> list[dict[str, object]]:
    return [dict(unsealed(path).about["fingerprint"]) for path in sorted(folder.glob("bank/checkpoints/step*"))]


def test_a_run_that_was_stopped_keeps_its_draws_and_held_out_rows_to_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stored("stopped", tmp_path / "run")
    assert not any("rules" in found for found in fingerprints(folder))
    with caplog.at_level(logging.INFO, "sl_queue"):
        sl_queue.run_local(first_version.job(), first_version.files(), out=folder)
    assert_ended_as_before(folder)
    assert "bank: the run was begun under rules 1" in caplog.text
    newest = fingerprints(folder)[-1]
    assert rules_of(newest) == 1
    assert newest["data.rows"]  # the next version finds all that this one compares


def test_a_new_run_under_the_first_rules_is_that_of_the_first_version(tmp_path: Path) -> None:
    sl_queue.run_local(first_version.job(rules=1), first_version.files(), out=tmp_path)
    assert_ended_as_before(tmp_path)


def test_a_new_run_holds_out_other_rows(tmp_path: Path) -> None:
    sl_queue.run_local(first_version.job(), first_version.files(), out=tmp_path)
    with pytest.raises(AssertionError):
        assert_ended_as_before(tmp_path)


def test_what_the_first_version_finished_is_finished(tmp_path: Path) -> None:
    folder = stored("finished", tmp_path / "run")
    sl_queue.run_local(first_version.job(), first_version.files(), out=folder)
    assert_ended_as_before(folder)
    assert "fingerprint" not in json.loads((folder / "bank/final/run.json").read_text())


def test_settings_that_the_first_version_compared_are_compared(tmp_path: Path) -> None:
    folder = stored("stopped", tmp_path / "run")
    base = {"model": "tests.support.first_version:Noisy", "args": {"inputs": 3}, "optimizer": first_version.SGD}
    with_decay = first_version.files(base={**base, "optimizer": {**first_version.SGD, "weight_decay": 0.1}})
    with pytest.raises(CheckpointError, match=r"base\.optimizer\.weight_decay was 'not there', now 0\.1"):
        sl_queue.run_local(first_version.job(), with_decay, out=folder)


def test_a_run_is_not_resumed_under_rules_that_it_does_not_have(tmp_path: Path) -> None:
    folder = stored("stopped", tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"begun under rules 1, and the job asks for rules 2: remove `rules` from"
    ):
        sl_queue.run_local(first_version.job(rules=2), first_version.files(), out=folder)


def test_a_run_under_the_first_rules_gives_no_private_draws_to_who_asks_for_them(tmp_path: Path) -> None:
    folder = stored("stopped", tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"rules = 1 key all draws by the job's seed, and \[privacy\] secret"):
        sl_queue.run_local(first_version.job(), first_version.files(privacy={"secret": "secret"}), out=folder)


def joined(**changes: object) -> Join:
    return Join(**({"incarnation": "i", "job": {}, "n_rows": 5, "rows_digest": "d", "id_type": "text", "run": None,
                      "generation": 0, "held": ()} | changes))  # type: ignore[arg-type]  # fmt: skip


def test_parties_that_go_by_different_rules_are_told_who_and_what_to_do() -> None:
    plan = Plan({}, "shop", ("bank",), epochs=1, patience_s=1.0)
    old = Member("o", here=True, n_rows=5, rows_digest="d", id_type="text", rules=joined().rules)  # says nothing: 1
    told = disagreement(plan, RunState(members={"bank": old}), "shop", joined(rules=2))
    assert told is not None
    assert "'bank' goes by rules 1" in told
    assert "'shop' by rules 2" in told
    assert "write rules = 1 at the top of the job file of 'shop'" in told
    assert disagreement(plan, RunState(members={"bank": old}), "shop", joined(rules=1)) is None

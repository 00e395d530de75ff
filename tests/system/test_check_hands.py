"""Findings of `sl-queue check` about hands."""

import re
from pathlib import Path

import pytest

from sl_queue import run_local
from sl_queue.checking.check import check
from sl_queue.checking.findings import Level
from sl_queue.config.job import Job, PartyFile
from sl_queue.errors import JobError
from tests.support.credit import FILES, edit, write_credit


def found(folder: Path) -> dict[str, Level]:
    job = Job.load(folder / "job.toml")
    return {each.text: each.level for each in check(job, [PartyFile.load(folder / name) for name in FILES])}


def with_hands(folder: Path) -> None:
    for name in FILES:
        (folder / name).write_text(f"{(folder / name).read_text()}\n[hands]\n")


def test_hands_that_may_be_are_counted_priced_and_tried(tmp_path: Path) -> None:
    write_credit(tmp_path)
    with_hands(tmp_path)
    said = found(tmp_path)
    assert said["bank: a step of two hands in reversed order has the bits of a plain one"] is Level.OK
    assert said["bank: hands compute its micro-batches; up to 4 help, and 2 nearly in full"] is Level.OK
    assert any(text.startswith("insurer: each step 0.0") for text in said)
    assert [text for text, level in said.items() if level is Level.WARNING and "whose operator can read" in text]


def test_a_model_that_hands_cannot_compute_is_an_error_before_the_run(tmp_path: Path) -> None:
    write_credit(tmp_path)
    with_hands(tmp_path)
    edit(
        tmp_path / "bank.py",
        "        return self.relu",
        "        self.seen = getattr(self, 'seen', 0) + 1\n        return self.relu",
    )
    errors = [text for text, level in found(tmp_path).items() if level is Level.ERROR]
    assert len(errors) == 1 and "cannot be computed apart: each forward pass changes 'seen'" in errors[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("holdout = { share = 0.2, stratify = true }", "[hands] needs held-out rows that a hand finds by itself"),
        ('[alignment]\nmethod = "psi"', "[hands] needs rows that a hand finds by itself"),
    ],
)
def test_rows_that_a_hand_cannot_find_are_an_error_before_the_run_and_in_it(
    tmp_path: Path, change: str, expected: str
) -> None:
    write_credit(tmp_path)
    with_hands(tmp_path)
    text = (tmp_path / "job.toml").read_text()
    text = re.sub(r"(?m)^holdout = .*$", change, text) if change.startswith("holdout") else f"{text}\n{change}\n"
    (tmp_path / "job.toml").write_text(text)
    errors = [text for text, level in found(tmp_path).items() if level is Level.ERROR]
    assert [text for text in errors if "party 'bank'" in text and expected in text and "take [hands] out" in text]
    job, files = Job.load(tmp_path / "job.toml"), [PartyFile.load(tmp_path / name) for name in FILES]
    with pytest.raises(JobError, match=re.escape(expected)):
        run_local(job, files, out=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("aligned.json")), "it is refused before rows are aligned"


def test_nothing_is_said_where_nobody_asks_for_hands(tmp_path: Path) -> None:
    write_credit(tmp_path)
    assert not [text for text in found(tmp_path) if "hand" in text]


@pytest.mark.parametrize("broker", ["http://x", "amqp://", 7])
def test_a_wrong_broker_of_hands_is_named(tmp_path: Path, broker: object) -> None:
    write_credit(tmp_path)
    value = broker if isinstance(broker, int) else f'"{broker}"'
    (tmp_path / "bank.toml").write_text(f"{(tmp_path / 'bank.toml').read_text()}\n[hands]\nbroker = {value}\n")
    with pytest.raises(JobError, match=r"hands\.broker"):
        PartyFile.load(tmp_path / "bank.toml")

"""A party loses in mid-run what says which rows the label holder holds out: the run ends with the same weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sl_queue.config.job import Job, PartyFile
from sl_queue.local.threads import run_local
from sl_queue.storage.holdout_file import NAME, read_held_out
from tests.support.credit import FILES, edit
from tests.support.crew import ROLES, Crew, sums, write_job

pytestmark = pytest.mark.timeout(240)

Lose = Callable[[Path], None]
FOLDER: Lose = shutil.rmtree


def file(state: Path) -> None:
    (state / NAME).unlink()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a job whose label holder chooses the same rows wherever it runs."""
    job = write_job(tmp_path, epochs=60)
    edit(job, "holdout = 0.2", "holdout = { share = 0.2, stratify = true }")
    for name in FILES:
        path = tmp_path / name
        path.write_text(f'{path.read_text()}\n[privacy]\nsecret = "seed"\n')
    return tmp_path


@pytest.mark.parametrize(
    ("loser", "lose", "down"),
    [
        ("bank", FOLDER, ("bank",)),
        ("bank", FOLDER, ROLES),
        ("bank", file, ("bank",)),
        ("insurer", file, ("insurer",)),
        ("insurer", file, ROLES),
    ],
    ids=["folder", "folder, all down", "file", "label holder's file", "label holder's file, all down"],
)
def test_a_loss_in_the_middle_of_a_run_changes_no_weight(
    folder: Path, broker_url: str, loser: str, lose: Lose, down: tuple[str, ...]
) -> None:
    job, files = Job.load(folder / "job.toml"), [PartyFile.load(folder / name) for name in FILES]
    run_local(job, files, out=folder / "quiet")
    with Crew(folder, broker_url) as crew:
        crew.start()
        crew.await_step("insurer", 40)
        for role in down:
            crew.kill(role)
        before = read_held_out(crew.states / loser)
        lose(crew.states / loser)
        crew.start(*down)
        crew.finish()
        after = read_held_out(crew.states / loser)
        assert before is not None and after is not None and after.chosen.digest == before.chosen.digest
        assert sums(crew.states) == sums(folder / "quiet")

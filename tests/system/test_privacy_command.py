"""`sl-queue privacy`: what each defence costs and keeps on a job's own tables, and the TOML to paste."""

import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.config.privacy import PrivacyFile
from sl_queue.errors import JobError
from sl_queue.planning import privacy as trials
from tests.support.credit import edit, write_credit

FILES = ("bank.toml", "insurer.toml")


def trial(folder: Path, rows: int = 400) -> trials.Trial:
    job = Job.load(write_credit(folder, rows))
    return trials.trial_of(job, [PartyFile.load(folder / name) for name in FILES])


def test_undefended_labels_are_read_and_responses_are_not_at_hardly_any_cost(tmp_path: Path) -> None:
    tried = trial(tmp_path)
    chosen = [option for option in trials.OPTIONS if option.name in ("none", "labels, epsilon 1")]
    undefended, responses = found = list(trials.outcomes(tried, chosen))
    assert undefended.labels is not None
    assert undefended.labels > 0.99
    assert undefended.columns is not None
    assert undefended.columns > 0.9
    assert responses.patient is not None
    assert responses.patient < 0.731 + 0.1
    assert responses.cap == pytest.approx(0.731, abs=1e-3)
    assert responses.utility is not None
    assert responses.utility > 0.85  # on true labels
    lines = [trials.line(outcome, tried) for outcome in found]
    assert all(line.split()[-1] == str(2 * 32 * 4) for line in lines)
    assert "bank: its raw columns and forty known labels have an AUC of 0." in "\n".join(trials.explanation(tried))
    picture = ElementTree.fromstring(trials.picture(found, tried))
    assert len(picture.findall("{http://www.w3.org/2000/svg}circle")) == 2


def test_what_is_printed_can_be_pasted(tmp_path: Path) -> None:
    for option in trials.OPTIONS:
        toml = "\n".join(line for line in option.toml("insurer", ["bank"]) if not line.startswith("[privacy]"))
        PrivacyFile(**tomllib.loads(toml))
    edit(
        write_credit(tmp_path).parent / "insurer.toml",
        "[data]",
        "\n".join(trials.OPTIONS[1].toml("insurer", ["bank"])) + "\n\n[data]",
    )
    assert PartyFile.load(tmp_path / "insurer.toml").privacy.labels is not None


def test_it_needs_the_files_of_all_parties(tmp_path: Path) -> None:
    job = Job.load(write_credit(tmp_path))
    with pytest.raises(JobError, match="no file for bank"):
        trials.trial_of(job, [PartyFile.load(tmp_path / "insurer.toml")])

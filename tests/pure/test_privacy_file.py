"""The keys of [privacy]: what they may be, and who has a use for them."""

from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.config.privacy import PrivacyFile, settings_of
from sl_queue.config.resolve import agree
from sl_queue.errors import JobError
from sl_queue.privacy.settings import Settings
from tests.support.credit import edit, write_credit


def test_every_key_is_read_from_toml(tmp_path: Path) -> None:
    write_credit(tmp_path)
    told = 'labels = { epsilon = 2 }\ngradients = "max-norm"\nmeter = true\nbudget = 8\nsecret = "s"\n'
    edit(tmp_path / "insurer.toml", "[data]", f"[privacy]\n{told}\n[data]")
    privacy = PartyFile.load(tmp_path / "insurer.toml").privacy
    assert privacy.secret == tmp_path / "s"
    assert settings_of(privacy) == Settings(labels=2.0, max_norm=True, meter=True, budget=8.0)
    edit(tmp_path / "bank.toml", "[data]", "[privacy]\nactivations = { clip = 1, sigma = 4 }\nnopeek = 0.5\n\n[data]")
    bank = PartyFile.load(tmp_path / "bank.toml")
    assert settings_of(bank.privacy) == Settings(clip=1.0, sigma=4.0, nopeek=0.5)
    for name in ("bank", "insurer"):
        agree(Job.load(tmp_path / "job.toml"), PartyFile.load(tmp_path / f"{name}.toml"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"gradients": "maxnorm"}, r"gradients = 'maxnorm'; it must be \"max-norm\" or a table \{ noise = 1.0 \}"),
        ({"gradients": {"noise": -1}}, r"gradients = \{ noise = -1 \}; noise must be a number above 0"),
        ({"gradients": {"noise": True}}, "noise must be a number above 0"),
        ({"labels": {"epsilon": 0}}, r"labels\.epsilon = 0; it must be a number above 0"),
        ({"labels": {"eps": 1}}, r"labels\.eps is unknown; did you mean 'epsilon'\?"),
        ({"activations": {"sigma": 1.0}}, r"activations\.clip is missing"),
        ({"nopeek": -1.0}, r"nopeek = -1\.0; it must be a number of at least 0"),
        ({"budget": 0}, r"budget = 0; it must be a number above 0"),
        ({"delta": 1.0}, r"delta = 1\.0; it must be a number between 0 and 1"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(JobError, match=expected):
        PrivacyFile(**values)


@pytest.mark.parametrize(
    ("party", "values", "expected"),
    [
        ("bank", {"labels": {"epsilon": 1.0}}, "party 'bank': privacy.labels has no use; only 'insurer' has labels"),
        ("bank", {"gradients": "max-norm"}, "party 'bank': privacy.gradients has no use"),
        ("insurer", {"activations": {"clip": 1.0}}, "party 'insurer': privacy.activations has no use"),
        ("insurer", {"nopeek": 1.0}, "party 'insurer': privacy.nopeek has no use"),
        (
            "insurer",
            {"gradients": "max-norm", "budget": 1.0},
            "privacy.budget = 1 counts epsilon, and nothing here has",
        ),
        ("bank", {"activations": {"clip": 1.0}, "budget": 1.0}, "set activations = { clip = ..., sigma = ... }"),
    ],
)
def test_a_defence_of_what_a_party_does_not_send_is_refused(
    tmp_path: Path, party: str, values: dict[str, Any], expected: str
) -> None:
    job = Job.load(write_credit(tmp_path))
    file = PartyFile.load(tmp_path / f"{party}.toml").model_copy(update={"privacy": PrivacyFile(**values)})
    with pytest.raises(JobError) as error:
        agree(job, file)
    assert expected in str(error.value)


def test_only_what_changes_bits_is_part_of_the_fingerprint() -> None:
    assert Settings(meter=True, budget=3.0, delta=1e-5).fingerprint == {}
    found = Settings(labels=1.0, max_norm=True, clip=2.0, nopeek=0.5).fingerprint
    assert set(found) == {"privacy.labels", "privacy.gradients", "privacy.activations", "privacy.nopeek"}
    assert Settings(gradients=1.0).fingerprint != Settings(gradients=2.0).fingerprint

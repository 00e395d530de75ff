"""The ledger of what was released: on disk before it is sent, never taken back, and read whole or not at all."""

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from sl_queue.errors import CheckpointError
from sl_queue.privacy.releases import epochs_within, worth_of_activations, worth_of_labels
from sl_queue.protocol.releases import Release
from sl_queue.storage.privacy_ledger import Ledger

EPOCH = Release("activations", "bank", "0123456789ab", "run1", 0, 0, "digest", clip=1.0, sigma=4.0)
RESPONSE = Release("labels", "shop", "0123456789ab", "run1", 0, None, "digest", epsilon=2.0, classes=(0.0, 1.0))


def epochs(number: int, **changes: object) -> list[Release]:
    return [replace(EPOCH, epoch=epoch, **changes) for epoch in range(number)]  # type: ignore[arg-type]


@pytest.mark.parametrize("release", [EPOCH, RESPONSE])
def test_a_release_comes_back_from_its_line(release: Release) -> None:
    assert Release.of_line(json.loads(json.dumps(release.line()))) == release


def test_releases_are_kept_once_in_both_copies_and_nobody_else_reads_them(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    ledger = Ledger(tmp_path / "state", tmp_path / "secret")
    assert ledger.releases() == []
    for release in (*epochs(2), EPOCH, RESPONSE, RESPONSE):
        ledger.enter(release)
    for path in (tmp_path / "state" / "privacy.jsonl", tmp_path / "secret.privacy.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["mechanism"] for line in lines] == ["activations", "activations", "labels"]
        assert "at" in lines[0]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Ledger(tmp_path / "state", tmp_path / "secret").releases() == [*epochs(2), RESPONSE]


def test_a_copy_beside_the_secret_outlives_the_state_folder(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        Ledger(tmp_path / name, tmp_path / "secret").enter(replace(EPOCH, run=name))
    found = Ledger(tmp_path / "second", tmp_path / "secret").releases()
    assert {release.run for release in found} == {"first", "second"}
    assert [release.run for release in Ledger(tmp_path / "second").releases()] == ["second"]


def test_a_line_that_a_crash_tore_was_followed_by_no_message_and_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    Ledger(tmp_path).enter(EPOCH)
    whole = path.read_text()
    path.write_text(f'{whole}{{"mechanism": "activ')
    ledger = Ledger(tmp_path)
    assert ledger.releases() == [EPOCH]
    ledger.enter(replace(EPOCH, epoch=1))
    assert Ledger(tmp_path).releases() == epochs(2)


@pytest.mark.parametrize("line", ["", "[]", '{"mechanism": "activations"}', "nonsense"])
def test_an_altered_ledger_stops_the_run_and_says_which_line(tmp_path: Path, line: str) -> None:
    Ledger(tmp_path).enter(EPOCH)
    path = tmp_path / "privacy.jsonl"
    path.write_text(f"{path.read_text()}{line}\n{path.read_text()}")
    with pytest.raises(CheckpointError, match=r"privacy\.jsonl, line 2 cannot be read .* restore the file"):
        Ledger(tmp_path).releases()


# What they are worth --------------------------------------------------------------------------------------------


def test_ten_epochs_are_worth_what_the_design_says_and_a_generation_more_is_more() -> None:
    assert worth_of_activations(epochs(10), 1e-6).epsilon == pytest.approx(8.31, abs=0.01)
    assert worth_of_activations([*epochs(10), *epochs(10)], 1e-6).releases == 10  # the same ones
    again = worth_of_activations([*epochs(10), *epochs(3, generation=1)], 1e-6)
    assert again.releases == 13
    assert again.epsilon is not None
    assert again.epsilon > 9


def test_a_release_without_noise_has_no_epsilon_and_no_cap() -> None:
    worth = worth_of_activations([*epochs(2), *epochs(1, sigma=0.0)], 1e-6)
    assert (worth.epsilon, worth.cap) == (None, 1.0)
    assert epochs_within(epochs(1, sigma=0.0), 4.0, 100.0, 1e-6, 5) == 0


def test_a_budget_holds_as_many_epochs_as_the_formula_says() -> None:
    assert epochs_within([], 4.0, 8.0, 1e-6, 100) == 9
    assert epochs_within(epochs(4), 4.0, 8.0, 1e-6, 100) == 5
    assert epochs_within([], 4.0, 8.0, 1e-6, 3) == 3
    assert epochs_within(epochs(20), 4.0, 8.0, 1e-6, 3) == 0


def test_the_same_response_costs_nothing_more_and_every_other_one_adds_up() -> None:
    assert worth_of_labels([]).epsilon == 0
    assert worth_of_labels([RESPONSE, replace(RESPONSE, run="run2")]).epsilon == 2.0
    for other in (replace(RESPONSE, secret="other"), replace(RESPONSE, classes=(0.0, 1.0, 2.0))):
        assert worth_of_labels([RESPONSE, other]).epsilon == 4.0
    assert worth_of_labels([RESPONSE, replace(RESPONSE, epsilon=0.5)]).epsilon == 2.5

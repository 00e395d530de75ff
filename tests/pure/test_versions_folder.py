"""Versions of a state folder: whole or not there, named, promoted, and read from an earlier release's `final/`."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from sl_queue.errors import CheckpointError
from sl_queue.storage.model_card import Card, Column
from sl_queue.storage.versions import choose_version, current, keep_version, promote, versions_in


def finish(state: Path, run: str, weights: bytes, step: int = 7) -> None:
    """Leave `final/` as a finished run does."""
    final = state / "final"
    final.mkdir(parents=True, exist_ok=True)
    (final / "base.safetensors").unlink(missing_ok=True)  # a run writes a file of its own and renames it
    (final / "base.safetensors").write_bytes(weights)
    digests = {"base.safetensors": sha256(weights).hexdigest()}
    about = {"format": 1, "job": "j1", "party": "bank", "run": run, "step": step, "digests": digests}
    (final / "run.json").write_text(json.dumps({**about, "incarnation": "i", "told": True}))


def keep(state: Path, run: str, weights: bytes, at: str) -> Path:
    finish(state, run, weights)
    return keep_version(state, {"finished_at": at, "holdout": {"auroc": 0.9}}, "# card\n")


def test_versions_of_two_runs_stand_beside_each_other_and_the_newest_is_used(tmp_path: Path) -> None:
    keep(tmp_path, "bbb", b"first", "2026-01-01T00:00:00Z")
    keep(tmp_path, "aaa", b"second", "2026-01-02T00:00:00Z")
    assert [version.run for version in versions_in(tmp_path)] == ["bbb", "aaa"]
    assert choose_version(tmp_path).weights("base").read_bytes() == b"second"
    assert choose_version(tmp_path, "bb").weights("base").read_bytes() == b"first"
    assert choose_version(tmp_path).metrics == {"auroc": 0.9}
    assert (tmp_path / "versions" / "aaa" / "card.md").read_text() == "# card\n"


def test_a_promoted_version_is_used_until_another_is(tmp_path: Path) -> None:
    keep(tmp_path, "bbb", b"first", "2026-01-01T00:00:00Z")
    keep(tmp_path, "aaa", b"second", "2026-01-02T00:00:00Z")
    assert promote(tmp_path, "bbb")[0] is None
    assert choose_version(tmp_path).run == "bbb"
    before, version = promote(tmp_path, "aaa")
    assert (before, version.run, current(tmp_path)) == ("bbb", "aaa", "aaa")


def test_keeping_again_changes_nothing_and_what_was_half_made_goes(tmp_path: Path) -> None:
    (tmp_path / "versions" / ".aaa.tmp").mkdir(parents=True)
    (tmp_path / "versions" / ".aaa.tmp" / "base.safetensors").write_bytes(b"torn")
    folder = keep(tmp_path, "aaa", b"first", "2026-01-01T00:00:00Z")
    keep_version(tmp_path, {"finished_at": "2027-01-01T00:00:00Z"}, "another card")
    assert (folder / "card.md").read_text() == "# card\n"
    assert [path.name for path in (tmp_path / "versions").iterdir()] == ["aaa"]


def test_a_folder_of_an_earlier_release_has_one_version(tmp_path: Path) -> None:
    finish(tmp_path, "old", b"weights")
    (version,) = versions_in(tmp_path)
    assert (version.run, version.finished_at, version.step) == ("old", None, 7)
    assert version.weights("base") == tmp_path / "final" / "base.safetensors"


def test_weights_that_were_altered_are_refused_by_name(tmp_path: Path) -> None:
    folder = keep(tmp_path, "aaa", b"first", "2026-01-01T00:00:00Z")
    (folder / "base.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="altered since run aaa"):
        choose_version(tmp_path).weights("base")
    with pytest.raises(CheckpointError, match="has no fuse model"):
        choose_version(tmp_path).weights("fuse")


@pytest.mark.parametrize(("run", "said"), [("zzz", "no version of run 'zzz'"), ("a", "2 versions of run 'a'")])
def test_a_run_that_is_not_there_or_not_one_is_named_with_those_that_are(tmp_path: Path, run: str, said: str) -> None:
    keep(tmp_path, "a1", b"first", "2026-01-01T00:00:00Z")
    keep(tmp_path, "a2", b"second", "2026-01-02T00:00:00Z")
    with pytest.raises(CheckpointError, match=f"{said}; there are: a1, a2"):
        choose_version(tmp_path, run)


def test_nothing_trained_and_a_format_of_another_release_are_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no trained model"):
        choose_version(tmp_path)
    folder = keep(tmp_path, "aaa", b"first", "2026-01-01T00:00:00Z")
    found = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(found | {"format": 9}))
    with pytest.raises(CheckpointError, match="has format 9, and this release of sl_queue reads format 1"):
        versions_in(tmp_path)


def test_the_card_names_own_columns_and_results_and_of_others_the_cut_only() -> None:
    card = Card(
        job="credit",
        job_digest="d1",
        run="a034",
        party="bank",
        role="label holder",
        parts={"fuse": "models:Fuse"},
        cuts={"telco": (32,)},
        rows=100,
        held_out=20,
        epochs=3,
        step=11,
        finished_at="2026-01-01T00:00:00Z",
        columns=[Column("income | net", "float32", 3)],
        metrics={"auroc": 0.91, "r2": None},
        versions={"sl_queue": "0.1"},
    ).markdown()
    assert "| income \\| net | float32 | 3 |" in card
    assert "| auroc | 0.91 |" in card
    assert "| r2 | undefined on these rows |" in card
    assert "`telco` (32,)" in card
    assert "No defence was on" in card


def keep_with_recipe(state: Path) -> Path:
    finish(state, "aaa", b"first")
    (state / "final" / "features.json").write_text('{"features": 1}')
    return keep_version(state, {"finished_at": "2026-01-01T00:00:00Z"}, "# card\n", [state / "final" / "features.json"])


def test_a_recipe_that_was_altered_or_is_gone_is_refused_by_name(tmp_path: Path) -> None:
    recipe = keep_with_recipe(tmp_path) / "features.json"
    assert choose_version(tmp_path).recipe == '{"features": 1}'
    recipe.unlink()
    recipe.write_text('{"features": 2}')
    with pytest.raises(CheckpointError, match=r"features\.json was altered since run aaa wrote it; restore it"):
        _ = choose_version(tmp_path).recipe
    with pytest.raises(CheckpointError, match=r"features\.json was altered"):
        promote(tmp_path, "aaa")
    recipe.unlink()
    with pytest.raises(CheckpointError, match=r"features\.json cannot be read"):
        _ = choose_version(tmp_path).recipe


def test_a_version_of_an_earlier_release_has_a_recipe_without_a_digest(tmp_path: Path) -> None:
    folder = keep_with_recipe(tmp_path)
    found = json.loads((folder / "run.json").read_text())
    del found["beside"]
    (folder / "run.json").write_text(json.dumps(found))
    assert choose_version(tmp_path).recipe == '{"features": 1}'
    assert promote(tmp_path, "aaa")[1].run == "aaa"


def test_what_is_in_use_can_be_promoted_again_where_it_cannot_be_read(tmp_path: Path) -> None:
    keep(tmp_path, "aaa", b"first", "2026-01-01T00:00:00Z")
    (tmp_path / "versions" / "current.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"current\.json cannot be read .* promote a version"):
        choose_version(tmp_path)
    before, version = promote(tmp_path, "aaa")
    assert (before, version.run, choose_version(tmp_path).run) == (None, "aaa", "aaa")


def test_a_version_that_is_half_made_is_none(tmp_path: Path) -> None:
    folder = keep(tmp_path, "aaa", b"first", "2026-01-01T00:00:00Z")
    half = json.loads((folder / "run.json").read_text()) | {"run": "bbb", "finished_at": "2027-01-01T00:00:00Z"}
    (tmp_path / "versions" / ".bbb.tmp").mkdir()
    (tmp_path / "versions" / ".bbb.tmp" / "run.json").write_text(json.dumps(half))
    assert [version.run for version in versions_in(tmp_path)] == ["aaa"]

"""Cuts of a module, ranked: every layer that can be one, with what it costs; the others with the reason."""

import re
from pathlib import Path

import pytest
import torch

from sl_queue import JobError
from sl_queue.planning.cuts import Cut, lines, module_named, parties_named, ranked, rows_named
from tests.support import architectures as arch
from tests.support.architectures import normal
from tests.support.forked import sl_queue


def test_the_layers_of_a_network_are_ranked_by_what_crosses() -> None:
    torch.manual_seed(0)
    cuts, refused = ranked(arch.ResNet(), {"clinic": ["x"]}, normal(4, 3, 8, 8))
    by_layer = {cut.candidate.layer: cut.candidate for cut in cuts}
    assert [cut.candidate.bytes_per_row for cut in cuts] == sorted(cut.candidate.bytes_per_row for cut in cuts)
    assert by_layer["layer1.1.bn2"].bytes_per_row == 2 * 4 * 8 * 8 * 4  # beside the shortcut, which crosses too
    assert by_layer["fc"].bytes_per_row == 5 * 4
    # conv1 by hand: 8 x 8 places, 4 filters of 3 x 3 x 3, a product and a sum each
    assert by_layer["conv1"].base_flops == 8 * 8 * 4 * 27 * 2
    whole = by_layer["fc"].base_flops
    assert all(each.base_flops + each.rest_flops == whole for each in by_layer.values())
    assert "relu" in {each.layer for each in refused} | set(by_layer)


def test_a_layer_that_mixes_parties_is_listed_with_the_reason() -> None:
    cuts, refused = ranked(arch.Towers(), {"bank": range(3), "insurer": [3, 4]}, normal(6, 5))
    assert {cut.candidate.party for cut in cuts} == {"bank", "insurer"}
    assert {each.layer for each in refused} == {"head.0", "head.1"}
    assert all("mixes columns of bank and insurer" in each.why for each in refused)


def test_the_share_that_is_recovered_falls_with_depth_and_needs_rows() -> None:
    torch.manual_seed(0)
    (few, _), (many, _) = (ranked(arch.Towers(), {"all": ["x"]}, normal(rows, 5)) for rows in (6, 300))
    assert all(cut.recovered is None for cut in few)
    found = {cut.candidate.layer: cut.recovered for cut in many}
    assert found["left.0"] is not None
    assert found["head.1"] is not None
    assert found["left.0"] > 0.5 > found["head.1"]


def test_what_a_person_reads_names_each_layer_once() -> None:
    cuts, refused = ranked(arch.Cross(), {"bank": [0], "insurer": [1]}, [normal(6, 3), normal(6, 2)])
    text = "\n".join(lines(cuts, refused))
    assert re.search(r"^a +bank .* 16 +-$", text, flags=re.M)
    assert "not at 'out' mixes columns of bank and insurer" in text
    assert isinstance(cuts[0], Cut)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["bank=0:3,5", "insurer=4"], {"bank": [range(3), 5], "insurer": [4]}),
        (["a=age,income"], {"a": ["age", "income"]}),
    ],
)
def test_parties_are_read_as_they_are_written(texts: list[str], expected: object) -> None:
    assert parties_named(texts) == expected


@pytest.mark.parametrize("texts", [["bank"], ["=x"], ["bank="], ["a=0", "a=1"]])
def test_parties_that_cannot_be_read_are_refused(texts: list[str]) -> None:
    with pytest.raises(JobError, match="--party"):
        parties_named(texts)


def test_the_command_prints_the_ranking(tmp_path: Path) -> None:
    (tmp_path / "towers.py").write_text(
        "import torch\nfrom tests.support.architectures import Towers\n\ndef rows():\n    return torch.ones(50, 5)\n"
    )
    words = ["cuts", "towers:Towers", "--rows", "towers:rows", "--party", "bank=0:3", "--party", "insurer=right"]
    done = sl_queue(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split()[:2] == ["layer", "party"]
    assert "left.2" in done.stdout
    failed = sl_queue("cuts", "towers:Towers", "--rows", "4,4", cwd=tmp_path)
    assert failed.returncode != 0
    assert "the module fails on these rows" in failed.stderr


def test_rows_and_modules_are_found_by_name_or_drawn(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\nnet = nn.Linear(2, 1)\ndef make():\n    return nn.Linear(3, 1)\n"
        "def rows():\n    return torch.zeros(4, 2)\n"
    )
    assert rows_named("4,3", tmp_path).shape == (4, 3)
    assert torch.equal(rows_named("4,3", tmp_path), rows_named("4,3", tmp_path))
    assert rows_named("mine:rows", tmp_path).shape == (4, 2)
    assert module_named("mine:net", tmp_path).in_features == 2
    assert module_named("mine:make", tmp_path).in_features == 3

"""FATE's pairs of tables, with made-up rows: they train from files with those names and columns."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support import fate

ROWS = 90
COLUMNS = {  # of each file besides ids and labels, as FATE has them
    "breast": (10, 20), "default_credit": (13, 10), "vehicle_scale": (9, 9), "motor": (4, 3, 4), "student": (6, 7),
    "dvisits": (3, 9), "ionosphere_scale": (15, 19),
}  # fmt: skip


def write(pair: fate.Pair, folder: Path) -> None:
    """Write a pair's files: rows in another order at each party, some of them at one party alone."""
    draw = np.random.default_rng(3)
    labels = {"auroc": 2, "accuracy": 4, "loss": 9}
    for place, (party, name) in enumerate(pair.files.items()):
        ids = draw.permutation(np.arange(place * 5, ROWS + place * 5))
        table = pd.DataFrame(draw.normal(size=(ROWS, COLUMNS[pair.name][place])).round(4)).add_prefix("x")
        if pair.empty and party == fate.GUEST:
            table["x2"] = np.nan
            table.loc[::7, "x1"] = np.nan
        if party == fate.GUEST:
            most = labels.get(pair.metric)
            label = draw.normal(size=ROWS).round(4) if most is None else draw.integers(0, most, ROWS)
            table.insert(0, pair.label, label)
        table.insert(0, pair.id, ids)
        table.to_csv(folder / name, index=False)


@pytest.mark.parametrize("pair", fate.PAIRS, ids=lambda pair: pair.name)
def test_a_pair_trains_from_its_files_to_the_weights_of_plain_pytorch(
    pair: fate.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fate, "EPOCHS", 2)
    write(pair, tmp_path)
    found = fate.compare(pair, tmp_path)
    assert found.rows == ROWS - 5 * (len(pair.files) - 1)
    assert found.equal, found
    assert found.ours == pytest.approx(found.plain, abs=1e-5)


def test_pairs_without_files_are_told_and_left_out(tmp_path: Path) -> None:
    found = list(fate.report(tmp_path))
    assert len(found) == len(fate.PAIRS) == 7
    assert all(right for _, right in found)
    assert found[3][0].startswith("motor: left out, there is no motor_hetero_guest.csv, motor_hetero_host_1.csv")

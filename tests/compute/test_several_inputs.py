"""Models of several arrays: a dict or a list of them, each with its own dtype; forward gets them as it names them."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue import SplitModel, run_local
from sl_queue.config.job import Job, PartyFile
from sl_queue.data.given import features_of
from sl_queue.data.spec import Rows
from sl_queue.protocol.schedule.row_order import row_order
from tests.support.resolved import fingerprint, train_joined
from tests.support.split import Parties, equal_weights, furthest
from tests.support.tables import read_table

ROWS, BATCH = 24, 12
DRAW = np.random.default_rng(0)
DENSE, CODES = DRAW.normal(size=(ROWS, 3)).astype(np.float32), DRAW.integers(0, 7, (ROWS, 5))
MASK = DRAW.random((ROWS, 5)) < 0.7
LABELS = DRAW.integers(0, 2, ROWS)


class Attends(nn.Module):
    """A base with embeddings and an attention mask; its forward names its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(7, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.dense = nn.Linear(3, 4)

    def forward(self, codes: Tensor, mask: Tensor, dense: Tensor) -> Tensor:
        words = self.embedding(codes)
        away = mask < 0.5
        away[:, 0] = False
        found, _ = self.attention(words, words, words, key_padding_mask=away, need_weights=False)
        return found.mean(1) + self.dense(dense)  # type: ignore[no-any-return]


class OfDict(Attends):
    """The same with one dict."""

    def forward(self, x: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(x["codes"], x["mask"], x["dense"])


class OfList(Attends):
    """The same with a list."""

    def forward(self, x: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(*x)


GIVEN: dict[str, tuple[Any, Any]] = {
    "names": (Attends, {"codes": CODES, "mask": MASK, "dense": DENSE}),
    "dict": (OfDict, {"codes": torch.from_numpy(CODES), "mask": MASK.tolist(), "dense": DENSE}),
    "list": (OfList, [CODES, MASK, DENSE]),
}


def run_of(form: str, staleness: int = 0) -> Parties:
    torch.manual_seed(1)
    kind, features = GIVEN[form]
    given = {"bank": kind(), "fuse": nn.Linear(4, 1)}
    sgd = {"name": "sgd", "lr": 0.5}
    files = {
        "bank": PartyFile(
            party="bank", data=Rows(np.arange(ROWS), features), base={"model": given["bank"], "optimizer": sgd}
        ),
        "holder": PartyFile(
            party="holder",
            data=Rows(np.arange(ROWS), None, LABELS),
            fuse={"model": given["fuse"], "optimizer": sgd, "loss": "bce_with_logits"},
        ),
    }
    job = Job(
        name="t",
        seed=7,
        epochs=2,
        batch_size=BATCH,
        parties={"bank": {"role": "feature", "cut": [4]}, "holder": {"role": "label"}},
        fuse={"aggregation": "sum"},
        pipeline={"micro_batches": 2, "staleness": staleness, "depth": 4},
    )
    return Parties(job, files, {party: read_table(job, file) for party, file in files.items()}, given)


def plain(run: Parties) -> dict[str, nn.Module]:
    bank, fuse = copy.deepcopy(run.given["bank"]), copy.deepcopy(run.given["fuse"])
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.5) for module in (bank, fuse)]
    for epoch in range(2):
        order = row_order(ROWS, 7, epoch)
        for first in range(0, ROWS, BATCH):
            for rows in np.array_split(order[first : first + BATCH], 2):
                arrays = (
                    torch.from_numpy(CODES[rows]),
                    torch.from_numpy(MASK[rows]).float(),
                    torch.from_numpy(DENSE[rows]),
                )
                output = fuse(Attends.forward(bank, *arrays))[:, 0]
                loss = nn.functional.binary_cross_entropy_with_logits(output, torch.from_numpy(LABELS[rows]).float())
                (loss / 2).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return {"bank": bank, "fuse": fuse}


@pytest.mark.parametrize("form", GIVEN)
def test_the_weights_are_those_of_a_plain_loop(form: str) -> None:
    run = run_of(form)
    stages, wanted = run.stages().train(run.pipeline), plain(run)
    for name, module in stages.modules().items():
        assert furthest(module, wanted[name]) == 0.0, name
    joined = train_joined(run.job, list(run.files.values()), run.tables, run.job.batches(ROWS))
    assert equal_weights(joined.bases["bank"], stages.modules()["bank"])
    result = run_local(run.job, list(run.files.values()))
    assert equal_weights(result.base("bank"), stages.modules()["bank"])


@pytest.mark.parametrize("form", GIVEN)
def test_forwards_that_run_ahead_get_all_arrays(form: str) -> None:
    run = run_of(form, staleness=1)
    whole = run.stages().train(run.pipeline).modules()
    assert furthest(whole["bank"], run.given["bank"]) > 0
    assert equal_weights(run_local(run.job, list(run.files.values())).base("bank"), whole["bank"])


def test_each_array_keeps_its_dtype_and_is_part_of_the_fingerprint() -> None:
    run = run_of("names")
    features = run.tables["bank"].features
    assert features is not None
    assert {name: features[name].dtype.name for name in features.dtype.names or ()} == {
        "codes": "int64",
        "mask": "float32",
        "dense": "float32",
    }
    one = fingerprint(run.job, run.files["bank"], run.tables["bank"])["data.features"]
    other = run.tables["bank"].features.copy()  # type: ignore[union-attr]
    other["codes"][3, 2] += 1
    from dataclasses import replace

    assert fingerprint(run.job, run.files["bank"], replace(run.tables["bank"], features=other))["data.features"] != one


def test_columns_of_a_table_may_enter_one_by_one() -> None:
    class Sums(nn.Module):
        def __init__(self, keys: Any) -> None:
            super().__init__()
            self.embedding, self.keys = nn.Embedding(7, 4), keys

        def forward(self, x: Any) -> Tensor:
            return sum(self.embedding(x[key]) for key in self.keys)  # type: ignore[return-value]

    for inputs, keys in (("list", range(5)), ("dict", [f"c{i}" for i in range(5)])):
        import pandas as pd

        table = pd.DataFrame(CODES, columns=[f"c{i}" for i in range(5)])
        run = run_of("names")
        base = {"model": Sums(keys), "optimizer": {"name": "sgd", "lr": 0.1}, "inputs": inputs}
        files = {**run.files, "bank": PartyFile(party="bank", data=Rows(np.arange(ROWS), table), base=base)}
        tables = {party: read_table(run.job, file) for party, file in files.items()}
        stages = Parties(run.job, files, tables, {}).stages()
        assert stages.train(run.pipeline).losses


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"a": CODES, "b": DENSE[:3]}, "the arrays have different numbers of rows: {'a': 24, 'b': 3}"),
        ({"a": CODES, "b": np.full(ROWS, np.nan)}, "b: features: NaN or infinity in 24 of 24 rows"),
        ({"a": np.array(["x"] * ROWS)}, "a: features are of dtype <U1; they must be numbers"),
        ({}, "no features"),
    ],
)
def test_what_is_wrong_with_one_of_several_arrays_is_said_with_its_name(features: Any, words: str) -> None:
    assert [fault for fault in features_of(features, ROWS).faults if words in fault]


def test_a_list_of_rows_stays_a_list_of_rows() -> None:
    found = features_of(list(DENSE), ROWS)
    assert found.array is not None
    assert found.array.shape == (ROWS, 3)


@pytest.mark.parametrize("form", ["names", "list"])
def test_a_notebook_gives_several_arrays_too(form: str, tmp_path: Any) -> None:
    kind, features = GIVEN[form]
    torch.manual_seed(1)
    model = SplitModel(
        {"bank": kind()},
        nn.Linear(4, 1),
        aggregation="sum",
        label_holder="court",
        loss="bce_with_logits",
        progress=False,
        epochs=2,
    )
    x = {"bank": features if form == "names" else dict(zip(["[0]", "[1]", "[2]"], features, strict=True))}
    model.fit(x, LABELS)
    assert model.predict(x).shape == (ROWS,)
    if form == "list":
        return  # whose class is found in a test's file
    folder = model.write(tmp_path)
    files = [PartyFile.load(folder / party / f"{party}.toml") for party in ("bank", "court")]
    assert {*read_table(model.job_, files[0]).features.dtype.names} == {"codes", "mask", "dense"}  # type: ignore[union-attr]

"""A run is resumed on the table, models and code that it was begun with, or refused, saying what differs."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sl_queue.config.job import Job, PartyFile
from sl_queue.data.spec import Rows
from sl_queue.protocol.fingerprints import differences
from tests.support.credit import bank_columns, edit, write_bank, write_credit
from tests.support.resolved import fingerprint, read_table
from tests.support.split import parties, table_of

HERE = "tests.compute.test_fingerprint"

MODELS = '''"""Models of the bank."""

import torch
from layers import Block


class BaseModel(Block):
    pass
'''
LAYERS = '''from torch import nn
from parts import size


class Block(nn.Module):
    """One layer."""

    def __init__(self, input_dim, hidden_dim):
        super().__init__()
        self.layer = nn.Linear(input_dim, size(hidden_dim))

    def forward(self, x):
        return self.layer(x)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write the example's parties; the bank's model is spread over three modules."""
    write_credit(tmp_path)
    (tmp_path / "bank.py").write_text(MODELS)
    (tmp_path / "layers.py").write_text(LAYERS)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("from .sizes import size\n")
    (tmp_path / "parts" / "sizes.py").write_text("def size(n):\n    return n\n")
    (tmp_path / "other.py").write_text("x = 1\n")
    return tmp_path


def found(folder: Path, party: str = "bank") -> dict[str, Any]:
    job, file = Job.load(folder / "job.toml"), PartyFile.load(folder / f"{party}.toml")
    return fingerprint(job, file, read_table(job, file))


def change_of(folder: Path, change: Callable[[], object], party: str = "bank") -> list[str]:
    before = found(folder, party)
    change()
    return differences(before, found(folder, party))


# Tables ---------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, columns: dict[str, Any]) -> None:
    write_bank(folder, columns)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: {n: c[n] for n in ("customer_id", "income", "age", "balance")}, "columns 'age', 'income' moved to"),
        (lambda c: c | {"income": c["income"] * 2}, "the values of column 'income' differ"),
        (lambda c: c | {"debt": c["income"]}, "column 'debt' added"),
        (lambda c: {n: v for n, v in c.items() if n != "age"}, "column 'age' gone"),
        (lambda c: {n: v[1:] for n, v in c.items()}, "the table had 200 rows, now 199"),
        (lambda c: c | {"customer_id": c["customer_id"] + 1}, "the ids of the 200 rows differ"),
        (
            lambda c: {n: v.astype("f4") if n != "customer_id" else v for n, v in c.items()},
            "'age', 'income', 'balance'",
        ),
    ],
)
def test_another_table_is_told_by_columns_and_counts(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], told: str
) -> None:
    columns = bank_columns(folder)
    (sentence,) = change_of(folder, lambda: rewritten(folder, change(columns)))
    assert told in sentence


def test_the_same_rows_in_another_order_and_another_file_are_the_same_table(folder: Path) -> None:
    columns = bank_columns(folder)
    shuffled = np.random.default_rng(1).permutation(len(columns["customer_id"]))

    def move() -> None:
        rewritten(folder, {name: values[shuffled] for name, values in columns.items()})
        (folder / "bank.parquet").rename(folder / "moved.parquet")
        edit(folder / "bank.toml", '"bank.parquet"', '"moved.parquet"')

    assert change_of(folder, move) == []


def test_other_labels_and_another_label_column_are_told(folder: Path) -> None:
    path = folder / "insurer.csv"
    lines = path.read_text().splitlines()

    def flip() -> None:
        path.write_text("\n".join([lines[0], lines[1][:-1] + str(1 - int(lines[1][-1])), *lines[2:]]) + "\n")

    assert change_of(folder, flip, "insurer") == ["the values of the labels differ"]
    path.write_text("\n".join([f"{lines[0]},churned", *(f"{line},{i % 2}" for i, line in enumerate(lines[1:]))]) + "\n")
    edit(folder / "insurer.toml", 'id = "customer_id"', 'id = "customer_id"\nfeatures = ["claims", "mileage"]')
    change = lambda: edit(folder / "insurer.toml", '"defaulted"', '"churned"')  # noqa: E731 - it is one
    assert change_of(folder, change, "insurer") == ["the label column was 'defaulted', now 'churned'"]


def test_what_a_source_returns_and_what_is_given_in_code_is_compared_by_its_values() -> None:
    run = parties(
        {"bank": nn.Linear(2, 3)}, nn.Linear(3, 1), {"bank": np.eye(12, 2, dtype=np.float32)}, np.ones(12),
        cuts={"bank": [3]}, aggregation="concat",
    )  # fmt: skip
    images = np.zeros((12, 2, 4, 4), np.uint8)
    job, file = run.job, run.files["bank"]
    before = fingerprint(job, file, table_of(images))
    other = images.copy()
    other[3, 1, 2, 2] = 1
    assert differences(before, fingerprint(job, file, table_of(other))) == ["the values of the features differ"]
    wider = fingerprint(job, file, table_of(images.astype(np.int64)))
    assert differences(before, wider) == ["the features were uint8 (12, 2, 4, 4), now int64 (12, 2, 4, 4)"]
    assert differences(before, fingerprint(job, file, table_of(np.asfortranarray(images)))) == []


def test_no_sentence_about_a_table_shows_a_value_or_an_id() -> None:
    features = np.full((3, 1), 123456.0)
    run = parties({"bank": nn.Linear(1, 1)}, nn.Linear(1, 1), {"bank": features}, np.ones(3), cuts={"bank": [1]})
    table = replace(table_of(features), columns=("income",), digest="d" * 64)
    before = fingerprint(run.job, run.files["bank"], table)
    after = fingerprint(run.job, run.files["bank"], replace(table, features=features + 1))
    assert differences(before, after) == ["the values of column 'income' differ"]


# Code -----------------------------------------------------------------------------------------------------------


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("bank.py", "    pass", "    scale = 2"),
        ("layers.py", "return self.layer(x)", "return self.layer(x) * 2"),
        ("parts/sizes.py", "return n", "return n + 0"),
        ("parts/__init__.py", "import size", "import size\nx = 1"),
    ],
)
def test_a_change_of_the_users_modules_is_told_wherever_it_is(folder: Path, path: str, old: str, new: str) -> None:
    assert change_of(folder, lambda: edit(folder / path, old, new)) == ["the source code of bank:BaseModel has changed"]


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("bank.py", "import torch", "import  torch  # for later"),
        ("bank.py", "Models of the bank.", "All models of the bank."),
        ("layers.py", "One layer.", "A layer\n\n    of the model."),
        (
            "layers.py",
            "(self, input_dim, hidden_dim)",
            "(\n        self,\n        input_dim,\n        hidden_dim,\n    )",
        ),
        ("other.py", "x = 1", "x = 2"),  # nothing imports it
        ("insurer.py", "import torch", "import torch\nx = 1"),  # another party's
    ],
)
def test_comments_layout_docstrings_and_other_modules_may_change(folder: Path, path: str, old: str, new: str) -> None:
    assert change_of(folder, lambda: edit(folder / path, old, new)) == []


def test_a_loss_of_the_users_own_is_compared_by_its_code(folder: Path) -> None:
    (folder / "losses.py").write_text("def loss(output, labels):\n    return (output - labels).pow(2).mean()\n")
    edit(folder / "insurer.toml", '"bce_with_logits"', '"losses:loss"')
    told = change_of(folder, lambda: edit(folder / "losses.py", "pow(2)", "abs()"), "insurer")
    assert told == ["the source code of losses:loss has changed"]


# Given in code --------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A model with a plain attribute."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(3, 2), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor


def of(base: Any, **fuse: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    made = base() if isinstance(base, type) else base
    file = PartyFile(
        party="b",
        data=Rows(np.arange(4), np.zeros((4, 3), np.float32), np.zeros(4)),
        base={"model": made},
        fuse={"model": nn.Identity, "loss": "mse", **fuse},
    )
    job = Job(name="j", seed=1, epochs=1, batch_size=2, parties={"a": {"role": "feature", "cut": [1]},
              "b": {"role": "label", "cut": [2]}})  # fmt: skip
    return fingerprint(job, file)


def with_buffer(value: float) -> nn.Module:
    torch.manual_seed(0)
    module = Scaled()
    module.register_buffer("mean", torch.tensor([value]), persistent=False)
    return module


def seeded(module: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return module()


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            seeded(Scaled),
            seeded(Scaled, 1),
            f"the initial weights of {HERE}:Scaled, given in code",
        ),
        (
            with_buffer(0.0),
            with_buffer(1.0),
            f"the initial weights of {HERE}:Scaled, given in code",
        ),
        (
            seeded(Scaled),
            seeded(lambda: Scaled(2.0)),
            f"the attributes of {HERE}:Scaled, given in code",
        ),
        (
            nn.Sequential(seeded(Scaled), nn.Dropout(0.1)),
            nn.Sequential(seeded(Scaled), nn.Dropout(0.2)),
            "the attributes of torch.nn.modules.container:Sequential, given in code",
        ),
    ],
)
def test_another_module_given_in_code_is_told(before: nn.Module, after: nn.Module, told: str) -> None:
    (sentence,) = differences(of(before), of(after))
    assert told in sentence
    assert differences(of(before), of(before)) == []


def scaled_loss(factor: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda output, labels: ((output - labels) * factor).pow(2).mean()


def penalty(output: torch.Tensor, labels: torch.Tensor, power: int) -> torch.Tensor:
    return (output - labels).abs().pow(power).mean()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (scaled_loss(1.0), scaled_loss(2.0)),
        (functools.partial(penalty, power=1), functools.partial(penalty, power=2)),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0])), nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))),
        (nn.SmoothL1Loss(beta=1.0), nn.SmoothL1Loss(beta=0.5)),
    ],
)
def test_another_loss_given_in_code_is_told(before: Any, after: Any) -> None:
    assert differences(of(Scaled, loss=before), of(Scaled, loss=after))
    assert differences(of(Scaled, loss=before), of(Scaled, loss=before)) == []


def test_arguments_of_a_model_are_told_by_their_names_whatever_these_are() -> None:
    before = of(Scaled) | {"base.args.weights": "IMAGENET1K_V1"}
    assert differences(before, before | {"base.args.weights": "DEFAULT"}) == [
        "base.args.weights was 'IMAGENET1K_V1', now 'DEFAULT'"
    ]


def test_autocast_and_other_settings_of_torch_are_told() -> None:
    before = of(Scaled)
    with torch.autocast("cpu", torch.bfloat16):
        assert differences(before, of(Scaled)) == ["autocast was 'off', now 'torch.bfloat16'"]


def test_of_a_finished_run_only_what_it_was_trained_on_and_with_is_compared() -> None:
    before = of(Scaled)
    elsewhere = before | {"torch": "9.9", "threads": 64, "device": "cuda", "secret": "other"}
    assert differences(before, elsewhere, finished=True) == []
    assert len(differences(before, elsewhere)) == 4
    assert differences(before, before | {"data.columns": ["x"]} | {"base.code": "other"}, finished=True)

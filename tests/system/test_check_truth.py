"""`sl-queue check` does what the run does, and says what the run would leave unsaid."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sl_queue
from sl_queue.checking.findings import Level
from sl_queue.compute.equality import MAX_ROWS, bounded
from sl_queue.protocol.schedule.row_order import Batches
from tests.support.credit import bank_columns, edit, write_bank, write_credit, write_insurer
from tests.support.resolved import first_step_difference, read_table, split_weights
from tests.support.split import Concatenated, Parties, furthest, parties
from tests.system.test_check import check, texts, told

ROWS = 48


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_credit(tmp_path)


# The first steps are those of the run -------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Divides by a running mean that it changes behind autograd's back, from call `after` on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(3, 4), after
        self.mean: Tensor
        self.calls: Tensor
        self.register_buffer("mean", torch.ones(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x)
        if self.training:
            self.calls += 1
            if self.calls > self.after:
                self.mean.data.mul_(0.9).add_(0.1 * output.detach().abs().mean(0))
        return output / self.mean


def run_of(base: nn.Module, **changes: Any) -> Parties:
    draw = np.random.default_rng(0)
    settings: dict[str, Any] = {"bases": {"bank": base}, "features": {"bank": draw.normal(size=(ROWS, 3))}}
    settings |= {"cuts": {"bank": [4]}, "labels": draw.integers(0, 2, ROWS), "fuse": Concatenated(4, 1)}
    settings["features"]["bank"] = settings["features"]["bank"].astype(np.float32)
    return parties(**settings | {"batch_size": 12, "epochs": 1} | changes)


def difference(run: Parties, **changes: Any) -> float:
    return first_step_difference(run.job, list(run.files.values()), run.tables, run.job.batches(ROWS), **changes)


def depth(number: int) -> dict[str, Any]:
    return {"pipeline": {"micro_batches": 4, "depth": number}}


def test_a_model_that_only_lock_step_trains_exactly_is_found_at_its_depth() -> None:
    assert difference(run_of(Scaled(after=0), **depth(1))) <= 1e-6
    assert difference(run_of(Scaled(after=0), **depth(2))) > 1e-4


def test_what_shows_in_a_later_step_is_found() -> None:
    late = run_of(Scaled(after=4), **depth(4))  # after one step of four micro-batches
    assert difference(late, steps=1) == 0.0
    assert difference(late) > 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline": {"micro_batches": 1, "depth": 2, "staleness": 1}},
        {"wire": {"dtype": "float16"}},
        {"wire": {"dtype": "int8", "compress": "bitmap"}},
    ],
    ids=str,
)
def test_staleness_and_narrower_numbers_make_their_difference(changes: Any) -> None:
    assert difference(run_of(nn.Linear(3, 4), **changes)) > 1e-6


@pytest.mark.parametrize("compress", ["none", "bitmap", "zstd"])
def test_what_loses_nothing_on_its_way_makes_none(compress: str) -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.2))
    adam = {"name": "adam", "lr": 0.01}
    run = run_of(base, wire={"compress": compress}, optimizer=adam, holdout=0.3, metrics=["auroc"], **depth(3))
    assert run.job.batches(ROWS).steps_per_epoch == 3, "an evaluation is in it"
    assert difference(run) == 0.0


@pytest.mark.parametrize("staleness", [0, 2])
def test_the_steps_are_those_of_the_run(staleness: int) -> None:
    """A whole run of three steps ends where the check's ends."""
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    order = {"micro_batches": 2, "depth": 4, "staleness": staleness}
    run = run_of(
        base, pipeline=order, holdout=0.25, drop_last=True, optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9}
    )
    assert run.job.batches(ROWS).steps == 3
    found = split_weights(run.job, list(run.files.values()), run.tables, run.job.batches(ROWS))
    trained = run.stages().train(run.pipeline).modules()
    assert all(torch.equal(found["base of bank"][n], t) for n, t in trained["bank"].state_dict().items())
    assert all(torch.equal(found["fuse"][n], t) for n, t in trained["fuse"].state_dict().items())
    assert furthest(trained["bank"], base) > 1e-4


def test_a_huge_step_is_cut_to_so_many_rows_that_it_takes_seconds() -> None:
    huge = Batches(n_rows=10_000_000, seed=1, epochs=1, batch_size=10_000_000, micro_batches=4)
    assert bounded(huge).batch_size == MAX_ROWS
    small = Batches(n_rows=100, seed=1, epochs=1, batch_size=100, micro_batches=4)
    assert bounded(small) is small


# What check says of them --------------------------------------------------------------------------------------------


def test_check_blames_the_depth_where_lock_step_is_exact(job: Path) -> None:
    bank = job.parent / "bank.py"
    changed = """y = self.linear(x)
        self.m.data.mul_(0.9).add_(0.1 * y.detach().abs().mean(0))
        return self.relu(y / self.m)"""
    edit(bank, "return self.relu(self.linear(x))", changed)
    edit(
        bank,
        "self.relu = nn.ReLU()",
        'self.relu = nn.ReLU()\n        self.register_buffer("m", torch.ones(hidden_dim))',
    )
    for name in ("bank.toml", "insurer.toml"):
        edit(job.parent / name, '"adam"', '"sgd"')
    code, findings = check(job)
    assert code == 5
    assert "with depth = 1 they are equal, with depth = 4 they are not" in "\n".join(texts(findings, Level.ERROR))
    edit(job, "micro_batches = 4", "micro_batches = 4\ndepth = 1")
    assert check(job)[0] == 0


def test_check_says_how_far_away_staleness_and_rounding_lead(job: Path) -> None:
    edit(job, "[pipeline]", '[wire]\ndtype = "float16"\n\n[pipeline]\nstaleness = 1')
    code, findings = check(job)
    assert code == 0
    assert "3 steps split and joined: all weights are equal bit for bit" in texts(findings, Level.OK)
    (note,) = [text for text in texts(findings, Level.NOTE) if "as the job says" in text]
    assert "(staleness = 1, [wire] dtype = 'float16'): the weights are up to" in note


COSINE = """

class FuseModel(nn.Module):
    def __init__(self, input_dim, output_dim):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, inputs):
        a, b = (x / x.norm(dim=1, keepdim=True) for x in (inputs[0][:, :16], inputs[1]))
        return self.w * (a * b).sum(1, keepdim=True)
"""


def test_a_cosine_by_hand_is_sound_as_activations_are_never_zeros(job: Path) -> None:
    with (job.parent / "insurer.py").open("a") as file:
        file.write(COSINE)
    for given in (("bank.toml", "insurer.toml"), ("insurer.toml",)):
        code, findings = check(job, *given)
        assert (code, texts(findings, Level.ERROR)) == (0, [])


def test_a_loss_that_made_up_activations_spoil_is_no_error(job: Path) -> None:
    """The label holder alone has no activations of the bank; those that are made up suit no logarithm of 1 - x."""
    edit(
        job.parent / "insurer.py",
        "return self.linear(torch",
        "inputs = [(1 - inputs[0]).log(), *inputs[1:]]\n        return self.linear(torch",
    )
    code, findings = check(job, "insurer.toml")
    assert code == 0
    (warning,) = texts(findings, Level.WARNING)
    assert "NaN" in warning and "with random numbers as activations of bank" in warning


# Metrics that measure nothing ---------------------------------------------------------------------------------------


def rare(job: Path) -> None:
    """One customer of 200 is in default, and no held-out one."""
    loaded = sl_queue.Job.load(job)
    table = read_table(loaded, sl_queue.PartyFile.load(job.parent / "insurer.toml"))  # whose ids are its positions
    batches = loaded.batches(table.n_rows, table.hashes)
    held_out = np.concatenate([batches.holdout_part(index) for index in range(batches.holdout_parts)])
    labels = (np.arange(200) == np.setdiff1d(np.arange(200), held_out)[0]).astype(np.int64)
    draw = np.random.default_rng(0).standard_normal((2, 200))
    columns = {"customer_id": np.arange(200), "claims": draw[0], "mileage": draw[1], "defaulted": labels}
    write_insurer(job.parent, columns)


def test_metrics_without_held_out_rows_are_warned_of(job: Path) -> None:
    edit(job, "holdout = 0.2", "holdout = 0.0")
    code, findings = check(job)
    (warning,) = texts(findings, Level.WARNING)
    assert code == 0
    assert "insurer: metrics = ['auroc', 'accuracy'] measure nothing, because no row is held out" in warning


def test_a_metric_that_the_held_out_rows_do_not_define_is_named_with_the_reason(job: Path) -> None:
    rare(job)
    code, findings = check(job)
    (warning,) = texts(findings, Level.WARNING)
    assert code == 0
    assert warning.startswith("insurer: no held-out row has label 1, so auroc is undefined; take a larger holdout")


def test_early_stopping_on_a_metric_that_is_not_defined_is_an_error(job: Path) -> None:
    rare(job)
    with job.open("a") as file:
        file.write('\n[early_stopping]\nmetric = "auroc"\npatience = 3\n')
    code, findings = check(job)
    (error,) = texts(findings, Level.ERROR)
    assert code == 2
    assert (
        "early_stopping.metric = 'auroc': no held-out row has label 1, so auroc is undefined and never stops" in error
    )


def test_a_run_says_once_what_check_would_have_said(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    rare(job)
    edit(job, "epochs = 5", "epochs = 2")
    files = [sl_queue.PartyFile.load(job.parent / f"{name}.toml") for name in ("bank", "insurer")]
    with caplog.at_level(logging.WARNING, logger="sl_queue"):
        result = sl_queue.run_local(sl_queue.Job.load(job), files)
    said = [record.message for record in caplog.records if "undefined" in record.message]
    assert said == [
        "insurer: no held-out row has label 1, so auroc is undefined; take a larger holdout or another holdout_seed"
    ]
    assert [line["holdout"]["auroc"] for line in result.history] == [None, None]


def test_a_sigmoid_under_a_loss_of_logits_is_warned_of(job: Path) -> None:
    edit(job.parent / "insurer.py", "return self.linear(", "return nn.Sigmoid()(self.linear(")
    text = (job.parent / "insurer.py").read_text().splitlines()
    (line,) = [i for i, found in enumerate(text) if "nn.Sigmoid()" in found]
    text[line] += ")"
    (job.parent / "insurer.py").write_text("\n".join(text) + "\n")
    code, findings = check(job)
    (warning,) = texts(findings, Level.WARNING)
    assert code == 0
    assert (
        "insurer: the fuse model ends in probabilities (a sigmoid or softmax), and loss = 'bce_with_logits'" in warning
    )


# Who was not looked at ----------------------------------------------------------------------------------------------


def test_a_file_with_errors_is_not_called_missing(job: Path) -> None:
    columns = bank_columns(job.parent)
    write_bank(job.parent, {**columns, "customer_id": np.zeros(200, int)})
    _, findings = check(job)
    assert "models not looked at: bank (see the errors above)" in texts(findings, Level.NOTE)
    assert "no party file was given" not in told(findings)


def test_a_file_that_cannot_be_read_may_be_anyones(job: Path) -> None:
    edit(job.parent / "bank.toml", 'party = "bank"', 'partei = "bank"')
    _, findings = check(job)
    assert "not looked at: bank (no party file, or only one with the errors above)" in texts(findings, Level.NOTE)

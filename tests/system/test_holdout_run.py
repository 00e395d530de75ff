"""A run whose label holder chooses the held-out rows: its weights are those of plain PyTorch with the same split."""

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sl_queue
from sl_queue.cli.main import app
from sl_queue.config.job import Job
from sl_queue.config.party import PartyFile
from sl_queue.errors import CheckpointError, JobError
from sl_queue.protocol.holdout import Chosen
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from sl_queue.security.keys import PrivateKey, read_key, write_key
from tests.support import raw_tables
from tests.support.local_run import started

pytestmark = pytest.mark.timeout(240)

BANK, INSURER = raw_tables.customers(60), raw_tables.customers(70, first=20)
SHARED = sorted(set(BANK) & set(INSURER))
BY_CARS = 'holdout = { column = "cars", from = 2 }\ntest = { column = "cars", values = [3] }'
BY_CLASS = "holdout = { share = 0.25, stratify = true }\ntest = 0.1"


def job_text(rule: str, aligned: bool) -> str:
    alignment = '\n[alignment]\nmethod = "psi"\npad = 50\n' if aligned else ""
    return raw_tables.JOB.replace("holdout = 0.25", rule) + alignment


def loaded(folder: Path) -> tuple[Any, list[Any]]:
    files = [PartyFile.load(folder / f"{name}.toml") for name in ("bank", "insurer")]
    return Job.load(folder / "job.toml"), files


def write(folder: Path, rule: str, *, aligned: bool = True) -> Path:
    """Write both companies; what chooses rows is no feature of the insurer, so its base model has one column."""
    folder.mkdir(exist_ok=True)
    ids = (BANK, INSURER) if aligned else (SHARED, SHARED[::-1])
    raw_tables.write_all(folder, *ids, job_text(rule, aligned))
    text = (folder / "bank.toml").read_text()  # as many columns whatever rows are trained on
    (folder / "bank.toml").write_text(text.replace("rare = 3", "rare = 1000").replace("width = 9", "width = 6"))
    if "cars" in rule:
        text = (folder / "insurer.toml").read_text()
        (folder / "insurer.toml").write_text(text.replace("width = 2, out = 2", "width = 1, out = 2"))
    return folder


def chosen_here(rule: str) -> Chosen:
    """Choose as the job says, in another way: row by row."""
    table = raw_tables.insurer_table(SHARED)
    cars, claims = table["cars"].to_pylist(), np.array(table["claim"].to_pylist())
    if rule == BY_CARS:
        found = [[i for i, n in enumerate(cars) if n == wanted] for wanted in (2, 3)]
        return Chosen(np.array(found[0]), np.array(found[1]))
    test = np.flatnonzero(sl_queue.test_rows(SHARED, 7, 0.1))
    held: list[int] = []
    for value in (0, 1):
        own = [i for i in range(len(SHARED)) if claims[i] == value and i not in test]
        held += [own[i] for i in np.flatnonzero(_smallest([SHARED[i] for i in own], round(0.25 * len(own))))]
    return Chosen(np.array(sorted(held)), test)


def _smallest(ids: list[str], count: int) -> Any:
    return sl_queue.holdout_rows(ids, 7, count / len(ids))


def plainly(folder: Path, chosen: Chosen) -> list[torch.nn.Module]:
    """Train with plain PyTorch on joined tables that are encoded from the training rows alone."""
    job, files = loaded(folder)
    features, modules = {}, {}
    left = np.setdiff1d(np.arange(len(SHARED)), np.concatenate([chosen.held_out, chosen.test]))
    quiet = job.replace(epochs=1, alignment={})
    still = {"name": "sgd", "lr": 1e-30}
    for file in files:
        given = file.replace(base=file.base.replace(optimizer=still))
        given = given if file.fuse is None else given.replace(fuse=file.fuse.replace(optimizer=still))
        modules[file.party] = given
    initial = sl_queue.run_local(quiet, list(modules.values()))
    from sl_queue.config.resolve import table_spec
    from sl_queue.config.user_code import Importer
    from sl_queue.data.table import read_table

    for file in files:
        table = read_table(table_spec(job, file, Importer()), chosen=chosen)
        features[file.party] = torch.tensor(table.features)
        if table.labels is not None:
            labels = torch.tensor(table.labels).float()
    bases = {party: copy.deepcopy(initial.base(party)).train() for party in features}
    fuse = copy.deepcopy(initial.fuse).train()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.05) for module in (*bases.values(), fuse)]
    for epoch in range(job.epochs):
        order = left[sl_queue.row_order(len(left), job.seed, epoch)]
        for first in range(0, len(order), job.batch_size):
            rows = order[first : first + job.batch_size]
            output = fuse([base(features[party][rows]) for party, base in bases.items()])
            torch.nn.functional.binary_cross_entropy_with_logits(output, labels[rows]).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return [*bases.values(), fuse]


def assert_equal(result: Any, modules: list[torch.nn.Module]) -> None:
    trained = [result.base("bank"), result.base("insurer"), result.fuse]
    for one, other in zip(trained, modules, strict=True):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", [BY_CARS, BY_CLASS], ids=["by column", "by class"])
def test_the_weights_are_those_of_plain_pytorch_with_the_same_split(tmp_path: Path, rule: str) -> None:
    folder = write(tmp_path / "raw", rule)
    result = sl_queue.run_local(*loaded(folder), out=folder / "out")
    chosen = chosen_here(rule)
    assert len(chosen.held_out) and len(chosen.test)
    for party in ("bank", "insurer"):
        kept = json.loads((folder / "out" / party / "held_out.json").read_text())
        assert kept["held_out"] == chosen.held_out.tolist() and kept["test"] == chosen.test.tolist()
    assert_equal(result, plainly(write(tmp_path / "joined", rule, aligned=False), chosen))


def test_sealed_over_a_broker_it_is_the_same_and_no_message_holds_a_value(
    tmp_path: Path, broker_url: str, unique: str
) -> None:
    folder = write(tmp_path / "raw", BY_CARS)
    roles = ("bank", "insurer", SCHEDULER, OPERATOR)
    for role in roles:
        (folder / "keys" / role).mkdir(parents=True)
        write_key(folder / "keys" / role / "seal.key", PrivateKey.generate(signs=role == SCHEDULER))
    public = {role: read_key(folder / "keys" / role / "seal.key").public.texts() for role in roles}
    table = tomllib.loads(job_text(BY_CARS, aligned=True))
    sealed = Job(**{**table, "name": unique, "security": {"seal": True, "keys": public}})
    result = sl_queue.run_local(sealed, loaded(folder)[1], broker=broker_url, out=folder / "out", keys=folder / "keys")
    plain = sl_queue.run_local(*loaded(folder), out=folder / "plain")
    for one, other in zip(result.fuse.parameters(), plain.fuse.parameters(), strict=True):
        assert torch.equal(one, other)


def test_processes_over_a_broker_without_an_alignment_are_told_too(
    tmp_path: Path, broker_url: str, unique: str
) -> None:
    folder = write(tmp_path / "raw", BY_CARS, aligned=False)
    text = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(text.replace('name = "raw"', f'name = "{unique}"'))
    files = [folder / name for name in ("job.toml", "bank.toml", "insurer.toml")]
    with started(files, folder / "out", broker_url) as run:
        assert run.wait() == 0, run.text
    here = sl_queue.run_local(*loaded(folder), out=folder / "plain")
    for name in ("bank/final/base", "insurer/final/base", "insurer/final/fuse"):
        both = [(folder / out / f"{name}.safetensors").read_bytes() for out in ("out", "plain")]
        assert both[0] == both[1], name
    assert here.history[-1]["holdout"] is not None


def test_a_finished_run_is_evaluated_on_its_held_out_rows_and_on_its_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "raw", BY_CARS)
    result = sl_queue.run_local(*loaded(folder), out=folder / "state")
    files = [str(folder / name) for name in ("job.toml", "bank.toml", "insurer.toml")]
    chosen = chosen_here(BY_CARS)
    app(["evaluate", *files, "--held-out"], standalone_mode=False)
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["rows"] == len(chosen.held_out)
    assert found["metrics"]["loss"] == pytest.approx(result.history[-1]["holdout"]["loss"], rel=1e-5)
    app(["evaluate", *files, "--test"], standalone_mode=False)
    assert json.loads((folder / "evaluation.json").read_text())["rows"] == len(chosen.test)
    sl_queue.run_local(*loaded(folder), out=folder / "state")  # finished already, and compared


def test_check_reports_the_split_and_a_party_alone_says_who_knows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, chosen = write(tmp_path / "raw", BY_CARS), chosen_here(BY_CARS)
    files = {name: str(folder / f"{name}.toml") for name in ("job", "bank", "insurer")}
    with pytest.raises(SystemExit, match="0"):
        app(["check", files["job"], files["bank"], files["insurer"]], standalone_mode=True)
    said = " ".join(capsys.readouterr().out.split())
    assert f"chooses {len(chosen.held_out)} of 40 rows to hold out" in said
    assert f"{len(chosen.test)} rows are for a test" in said
    assert f"{40 - len(chosen.held_out) - len(chosen.test)} rows to train on, {len(chosen.held_out)} held out" in said
    with pytest.raises(SystemExit, match="0"):
        app(["check", files["job"], files["bank"]], standalone_mode=True)
    assert "for the label holder to say" in " ".join(capsys.readouterr().out.split())


def test_a_column_that_changed_after_the_others_were_told_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", BY_CARS, aligned=False)
    sl_queue.run_local(*loaded(folder), out=folder / "out")
    run = json.loads((folder / "out/insurer/final/run.json").read_text())
    (folder / "out/insurer/final/run.json").write_text(json.dumps({**run, "told": False, "reported": False}))
    kept = json.loads((folder / "out/insurer/held_out.json").read_text())
    (folder / "out/insurer/held_out.json").write_text(json.dumps({**kept, "held_out": kept["held_out"][1:]}))
    with pytest.raises(CheckpointError, match="are not those that the other parties know of"):
        sl_queue.run_local(*loaded(folder), out=folder / "out")


def test_hands_cannot_find_what_the_label_holder_chooses(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", BY_CARS, aligned=False)
    with (folder / "bank.toml").open("a") as file:
        file.write("\n[hands]\n")
    with pytest.raises(JobError, match="the label holder chooses them"):
        sl_queue.run_local(*loaded(folder), out=folder / "out")

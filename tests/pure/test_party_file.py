"""A party file is read as it is documented, and a mistake in it is named."""

from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.job import BaseFile, DataFile, Job, PartyFile
from sl_queue.config.resolve import agree
from sl_queue.data.spec import Rows
from sl_queue.errors import JobError
from tests.support.job_files import (
    BANK_TOML,
    BASE,
    FUSE,
    INSURER_TOML,
    JOB_TOML,
    PARTIES,
    check_complaint,
    job,
    party_complaint,
    written,
)


def test_the_documented_party_files_are_read_as_they_stand(tmp_path: Path) -> None:
    bank = PartyFile.load(written(tmp_path, "bank.toml", BANK_TOML))
    assert (bank.party, bank.broker, bank.state) == ("bank", "amqps://bank@broker:5671/credit", tmp_path / "state/bank")
    assert isinstance(bank.data, DataFile)
    assert (bank.data.path, bank.data.id) == (tmp_path / "bank.parquet", "customer_id")
    assert (bank.data.features, bank.data.label) == (["age", "income"], None)
    assert bank.base == BaseFile(
        model="bank:BaseModel", args={"input_dim": 2, "hidden_dim": 32}, optimizer={"name": "adam", "lr": 1e-3}
    )
    assert (bank.fuse, bank.device, bank.threads, bank.folder) == (None, "cpu", None, tmp_path)
    insurer = PartyFile.load(written(tmp_path, "insurer.toml", INSURER_TOML))
    assert insurer.fuse is not None
    assert (insurer.fuse.loss, insurer.fuse.metrics) == ("bce_with_logits", ["auroc", "accuracy"])
    agreed = Job.load(written(tmp_path, "job.toml", JOB_TOML))
    agree(agreed, bank)
    agree(agreed, insurer)


def test_paths_are_relative_to_the_file_and_absolute_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    text = BANK_TOML.replace('"state/bank"', '"/var/state"')
    written(tmp_path / "files", "bank.toml", text)
    monkeypatch.chdir(tmp_path)
    bank = PartyFile.load("files/bank.toml")
    assert isinstance(bank.data, DataFile)
    assert (bank.data.path, bank.state) == (tmp_path / "files/bank.parquet", Path("/var/state"))
    assert bank.folder == tmp_path / "files"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"party": ""}, ["party = ''"]),
        ({"data": None}, ["data = None", "[data]"]),
        ({"data": {}}, ["data needs a path and an id, or a source", "path, id"]),
        ({"data": {"path": "x.csv"}}, ["missing: id"]),
        ({"data": {"path": 3, "id": "i"}}, ["data.path = 3", ".csv"]),
        ({"data": {"path": "x.csv", "id": "i", "feature": []}}, ["data.feature is unknown; did you mean 'features'?"]),
        ({"data": {"path": "x.csv", "id": "i", "features": "age"}}, ["data.features = 'age'", "list of column names"]),
        ({"data": {"path": "x.csv", "id": "i", "features": ["a", 3]}}, ["data.features[1] = 3"]),
        ({"data": {"path": "x.csv", "id": "i", "label": "a", "features": ["a"]}}, ["more than once", ": a"]),
        ({"data": {"path": "x.csv", "id": "i", "features": ["i"]}}, ["more than once", ": i"]),
        ({"data": {"path": "x.csv", "id": "i", "features": ["a", "b", "a"]}}, ["more than once", ": a"]),
        ({"data": {"path": "x.csv", "id": "i", "label": "i"}}, ["more than once", ": i"]),
        ({"data": {"path": "x.csv", "id": 3}}, ["PartyFile: data.id = 3; it must be the name of a column, or a list"]),
        ({"data": {"path": "x.csv", "id": ["a", 3]}}, ["PartyFile: data.id[1] = 3; it must be the name of a column"]),
        ({"start": {"from": 3}}, ["start.from = 3; it must be the name of a folder"]),
        ({"features": {"age": {"kind": "x"}}}, ['features.age.kind = \'x\'; it must be "number", "category" or']),
        ({"data": {"source": "m:f", "path": "x.csv", "id": "i"}}, ["remove path, id"]),
        ({"data": {"source": "rows"}}, ["data.source = 'rows'", "module:callable"]),
        ({"data": {"source": 3}}, ["data.source = 3"]),
        ({"data": {"path": "a\0.csv", "id": "i"}}, ["data.path = 'a\\x00.csv'; a path holds no NUL character"]),
        ({"state": "a\0"}, ["state = 'a\\x00'; a path holds no NUL character"]),
        ({"start": {"from": "a\0"}}, ["start.from = 'a\\x00'; a path holds no NUL character"]),
        ({"privacy": {"secret": "a\0"}}, ["privacy.secret = 'a\\x00'; a path holds no NUL character"]),
        ({"privacy": {"gradients": {"noise": 10**400}}}, ["privacy.gradients.noise = a number of 1329 bits"]),
        ({"fuse": {**FUSE, "loss": {"name": "huber", "delta": 10**400}}}, ["fuse.loss.delta = a number of 1329 bits"]),
        ({"base": {**BASE, "schedule": {"name": ["step"]}}}, ["base.schedule = ['step'] is unknown", "cosine"]),
        ({"base": {"model": "BaseModel"}}, ["base.model = 'BaseModel'", "module:callable"]),
        ({"base": {"model": 3}}, ["base.model = 3"]),
        ({"base": {}}, ["base.model is missing", "nn.Module"]),
        ({"base": {**BASE, "optimizer": {"lr": 0.1}}}, ["base.optimizer needs a name", "adam"]),
        ({"base": {**BASE, "optimizer": "adam"}}, ["base.optimizer = 'adam'", "a table like"]),
        ({"base": {**BASE, "loss": "mse"}}, ["base.loss is unknown", "it belongs in [fuse]"]),
        ({"fuse": BASE}, ["fuse.loss is missing", "bce_with_logits"]),
        ({"fuse": {**FUSE, "loss": "bce_with_logit"}}, ["fuse.loss = 'bce_with_logit'", "'bce_with_logits'?"]),
        ({"fuse": {**FUSE, "loss": 3}}, ["fuse.loss = 3"]),
        ({"fuse": {**FUSE, "metrics": "auroc"}}, ["fuse.metrics = 'auroc'", "a list"]),
        (
            {"fuse": {**FUSE, "metrics": [{"name": "fbeta", "as": "loss"}]}},
            ["fuse.metrics [0] is called 'loss'", "as ="],
        ),
        ({"fuse": {**FUSE, "metrics": ["mae", "own:loss"]}}, ["fuse.metrics [1] is called 'loss'", "another name"]),
        ({"fuse": {**FUSE, "metrics": [{"name": "fbeta", "as": 3}]}}, ["[0].as = 3", "must be text"]),
        ({"fuse": {**FUSE, "metrics": [{"name": "fbeta", "as": ["x"]}]}}, ["[0].as = ['x']", "must be text"]),
        ({"fuse": {**FUSE, "metrics": [{"name": "fbeta", "as": ""}]}}, ["[0].as = ''", "must be text"]),
        ({"fuse": {**FUSE, "metrics": ["mae", {"name": "r2", "as": "mae"}]}}, ["has 'mae' twice", "as ="]),
        ({"threads": 0}, ["threads = 0", "from 1 to 4096"]),
        ({"threads": 3 * 10**9}, ["threads = 3000000000", "from 1 to 4096"]),
        ({"device": ""}, ["device = ''"]),
        ({"device": 0}, ["device = 0"]),
        ({"brokers": "x"}, ["brokers is unknown; did you mean 'broker'?"]),
    ],
)
def test_a_mistake_in_a_party_file_is_named(changes: dict[str, Any], expected: list[str]) -> None:
    said = party_complaint(**changes)
    for words in expected:
        assert words in said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"party": "bnk"}, ["party = 'bnk'", "did you mean 'bank'?", "bank, insurer"]),
        ({"base": None}, ["[base] is missing", "[32]"]),
        ({"fuse": FUSE}, ["[fuse] has no use", "'insurer'"]),
        ({"data": {"path": "x.csv", "id": "i", "label": "y"}}, ["data.label has no use", "'insurer'"]),
        ({"data": {"path": "x.csv", "id": "i", "features": []}}, ["data.features is empty"]),
        ({"data": Rows([1], None)}, ["data.features is empty"]),
        ({"party": "insurer", "data": {"path": "x.csv", "id": "i", "label": "y"}}, ["[fuse] is missing"]),
        ({"party": "insurer", "fuse": FUSE}, ["data.label is missing"]),
        ({"party": "insurer", "fuse": FUSE, "data": Rows([1], [[1]])}, ["its Rows have no labels"]),
        ({"party": "insurer", "base": None, "fuse": FUSE, "data": {"source": "m:f"}}, ["[base] is missing", "[16]"]),
    ],
)
def test_what_only_job_and_party_file_show_together_is_named(changes: dict[str, Any], expected: list[str]) -> None:
    said = check_complaint(job(), **changes)
    for words in expected:
        assert words in said


def test_a_base_model_without_a_cut_is_named() -> None:
    labels_only = job(parties={**PARTIES, "insurer": {"role": "label"}})
    data = {"path": "x.csv", "id": "i", "label": "y"}
    said = check_complaint(labels_only, party="insurer", data=data, fuse=FUSE)
    assert "[base] has no use" in said
    assert "parties.insurer.cut" in said
    agree(labels_only, PartyFile(party="insurer", data=data, fuse=FUSE))


def test_early_stopping_watches_what_the_label_holder_measures() -> None:
    holder = PartyFile(party="insurer", data={"source": "m:f"}, base=BASE, fuse=FUSE)
    for metric in ("loss", "mae"):
        agree(job(holdout=0.1, early_stopping={"metric": metric, "patience": 2}), holder)
    with pytest.raises(JobError, match=r"early_stopping.metric = 'mea' is not measured; did you mean 'mae'\?"):
        agree(job(holdout=0.1, early_stopping={"metric": "mea", "patience": 2}), holder)


def test_the_loss_may_stand_among_the_metrics_by_its_own_name() -> None:
    file = PartyFile(party="insurer", data={"source": "m:f"}, base=BASE, fuse={**FUSE, "metrics": ["loss", "mae"]})
    assert file.fuse is not None
    assert file.fuse.metrics == ["loss", "mae"]


def test_a_metric_whose_name_begins_with_train_is_not_what_early_stopping_reads() -> None:
    fuse = {**FUSE, "metrics": [{"name": "mae", "as": "train_mae"}]}
    holder = PartyFile(party="insurer", data={"source": "m:f"}, base=BASE, fuse=fuse)
    agree(job(), holder)
    with pytest.raises(JobError, match="'train_mae' is not measured"):
        agree(job(holdout=0.1, early_stopping={"metric": "train_mae", "patience": 2}), holder)


def test_the_file_of_a_broker_url_is_a_path_that_a_system_has() -> None:
    file = PartyFile(party="bank", broker="file:a\0b", data={"source": "m:f"}, base=BASE)
    with pytest.raises(JobError, match=r"'a\\x00b': a path holds no NUL character"):
        file.broker_url()

"""Job and party files: what a user writes is read as it stands, and every mistake is one JobError that says where."""

import json
import subprocess
import sys
import threading
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.compute.spec import NAMED_LOSSES
from sl_queue.config.job import BaseFile, DataFile, Job, JobParty, PartyFile, redacted
from sl_queue.config.resolve import agree
from sl_queue.config.user_code import Importer
from sl_queue.data.spec import Rows
from sl_queue.errors import JobError
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.scheduler.agreement import told_difference
from sl_queue.protocol.topology import Topology

JOB_TOML = """
name = "credit"
seed = 7
epochs = 20
batch_size = 512                  # rows per optimizer step
holdout = 0.2                     # share of rows kept for evaluation, chosen by hash, the same at every party; default 0
shuffle = true                    # false: canonical order in every epoch
drop_last = false                 # a short last batch is trained on, with uneven micro-batches

[parties.bank]                    # order here is the order of the fuse model's inputs
role = "feature"
cut = [32]                        # shape of one row's activation at the cut layer

[parties.insurer]
role = "label"                    # exactly one label holder
cut = [16]                        # only if the label holder has a base model of its own; it is fused in place, not sent

[fuse]
aggregation = "list"              # list: fuse(inputs) gets a list of tensors; concat | sum | mean: one tensor

[pipeline]                        # all optional
micro_batches = 4
depth = 4                         # default: micro_batches
staleness = 0
checkpoint_every = 50             # steps

[broker]                          # optional
persistent = false                # true: the broker writes messages to disk
patience = 60.0                   # seconds of silence after which a waiting worker names whom it waits for
"""  # noqa: E501 - as it is documented

BANK_TOML = """
party = "bank"
broker = "amqps://bank@broker:5671/credit"        # or memory://; --broker and SL_QUEUE_BROKER override it
state = "state/bank"                              # checkpoints and final weights; --state overrides it

[data]
path = "bank.parquet"                             # .csv or .parquet
id = "customer_id"
features = ["age", "income"]                      # default: every column but id and label
# or: source = "bank:rows"                        # a callable returning sl_queue.Rows, for images, text, anything

[base]
model = "bank:BaseModel"                          # module:callable returning an nn.Module
args = { input_dim = 2, hidden_dim = 32 }
optimizer = { name = "adam", lr = 1e-3 }          # any torch.optim class, by its name in lower case
"""

INSURER_TOML = """
party = "insurer"

[data]
path = "insurer.csv"
id = "customer_id"
label = "defaulted"

[base]
model = "insurer:BaseModel"
optimizer = { name = "adam", lr = 1e-3 }

[fuse]
model = "insurer:FuseModel"
args = { input_dim = 48, output_dim = 1 }
optimizer = { name = "adam", lr = 1e-3 }
loss = "bce_with_logits"                          # cross_entropy, mse, or module:callable
metrics = ["auroc", "accuracy"]
"""

PARTIES: dict[str, Any] = {"bank": {"role": "feature", "cut": [32]}, "insurer": {"role": "label", "cut": [16]}}
KEYS_OF = [b64encode(bytes([number]) * 32).decode() for number in range(5)]
SEALING: dict[str, dict[str, str]] = {
    "bank": {"seal": KEYS_OF[0]},
    "insurer": {"seal": KEYS_OF[1]},
    "scheduler": {"seal": KEYS_OF[2], "sign": KEYS_OF[3]},
    "operator": {"seal": KEYS_OF[4]},
}
FEATURE, LABEL = {"role": "feature", "cut": [4]}, {"role": "label"}
VALUES: dict[str, Any] = {"name": "credit", "seed": 7, "epochs": 20, "batch_size": 512, "parties": PARTIES}
BASE = {"model": "bank:BaseModel", "optimizer": {"name": "adam"}}
FUSE = {**BASE, "loss": "mse", "metrics": ["mae"]}


def job(**changes: Any) -> Job:
    return Job(**{**VALUES, **changes})


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def complaint(**changes: Any) -> str:
    with pytest.raises(JobError) as raised:
        job(**changes)
    return str(raised.value)


def party_complaint(**changes: Any) -> str:
    with pytest.raises(JobError) as raised:
        PartyFile(**{"party": "bank", "data": {"path": "bank.csv", "id": "id"}, "base": BASE, **changes})
    return str(raised.value)


def check_complaint(job_: Job, **changes: Any) -> str:
    values = {"party": "bank", "data": {"path": "bank.csv", "id": "id"}, "base": BASE, **changes}
    with pytest.raises(JobError) as raised:
        agree(job_, PartyFile(**{name: value for name, value in values.items() if value is not None}))
    return str(raised.value)


# The job file ---------------------------------------------------------------------------------------------------


def test_the_documented_job_file_is_read_as_it_stands(tmp_path: Path) -> None:
    read = Job.load(written(tmp_path, "job.toml", JOB_TOML))
    assert (read.name, read.seed, read.epochs, read.batch_size, read.holdout) == ("credit", 7, 20, 512, 0.2)
    assert (read.shuffle, read.drop_last) == (True, False)
    assert read.label_holder == "insurer"
    assert read.feature_parties == ("bank",)
    assert read.fused == ("bank", "insurer")
    assert (read.cut("bank"), read.cut("insurer")) == ((32,), (16,))
    assert read.fuse.aggregation == "list"
    assert (read.pipeline.micro_batches, read.pipeline.depth, read.pipeline.staleness) == (4, 4, 0)
    assert read.pipeline.checkpoint_every == 50
    assert (read.broker.persistent, read.broker.patience) == (False, 60.0)
    assert read.early_stopping is None


def test_a_job_of_defaults_is_the_job_that_spells_them_out(tmp_path: Path) -> None:
    spelled_out = Job.load(written(tmp_path, "job.toml", JOB_TOML))
    brief = job(holdout=0.2, pipeline={"micro_batches": 4})
    assert brief == spelled_out
    assert brief.digest == spelled_out.digest
    assert told_difference(brief.canonical(), spelled_out.canonical()) == ""


def test_depth_defaults_to_micro_batches() -> None:
    assert job().pipeline.depth == 1
    assert job(pipeline={"micro_batches": 4}).pipeline.depth == 4
    assert job(pipeline={"micro_batches": 4, "depth": None}).pipeline.depth == 4
    assert job(pipeline={"micro_batches": 4, "depth": 2}).pipeline.depth == 2


def test_a_job_gives_its_batches_pipeline_and_topology() -> None:
    agreed = job(holdout=0.25, shuffle=False, drop_last=True, pipeline={"micro_batches": 4, "depth": 3, "staleness": 1})
    batches = agreed.batches(1000)
    assert batches == Batches(1000, 7, 20, 512, 4, 0.25, shuffle=False, drop_last=True)
    pipeline = agreed.pipeline_of(batches)
    assert (pipeline.depth, pipeline.staleness, pipeline.checkpoint_every) == (3, 1, 50)
    assert agreed.topology("credit.") == Topology("insurer", ("bank",), "credit.")


def test_a_canonical_job_survives_json() -> None:
    canonical = job(early_stopping={"metric": "loss", "patience": 3}, holdout=0.1).canonical()
    assert json.loads(json.dumps(canonical)) == canonical


KEYS: list[tuple[str, dict[str, Any]]] = [
    ("name", {"name": "other"}),
    ("seed", {"seed": 8}),
    ("epochs", {"epochs": 21}),
    ("batch_size", {"batch_size": 256}),
    ("holdout", {"holdout": 0.1}),
    ("shuffle", {"shuffle": False}),
    ("drop_last", {"drop_last": True}),
    ("parties.bank.cut", {"parties": {**PARTIES, "bank": {"role": "feature", "cut": [31]}}}),
    ("parties.shop", {"parties": {**PARTIES, "shop": {"role": "feature", "cut": [32]}}}),
    ("fuse.inputs", {"parties": dict(reversed(PARTIES.items()))}),
    ("fuse.aggregation", {"fuse": {"aggregation": "concat"}}),
    ("pipeline.micro_batches", {"pipeline": {"micro_batches": 2}}),
    ("pipeline.depth", {"pipeline": {"depth": 2}}),
    ("pipeline.staleness", {"pipeline": {"staleness": 1}}),
    ("pipeline.checkpoint_every", {"pipeline": {"checkpoint_every": 51}}),
    ("broker.persistent", {"broker": {"persistent": True}}),
    ("broker.patience", {"broker": {"patience": 61}}),
    ("broker.queues", {"broker": {"queues": "quorum"}}),
    ("wire.dtype", {"wire": {"dtype": "int8"}}),
    ("wire.compress", {"wire": {"compress": "bitmap"}}),
    ("early_stopping", {"holdout": 0.1, "early_stopping": {"metric": "loss", "patience": 3}}),
    ("security.seal", {"security": {"seal": True, "keys": SEALING}}),
    ("security.cipher", {"security": {"cipher": "chacha20-poly1305"}}),
    ("security.keys.bank", {"security": {"keys": SEALING}}),
]


@pytest.mark.parametrize(("key", "changes"), KEYS)
def test_a_change_of_any_key_changes_the_digest_and_is_named(key: str, changes: dict[str, Any]) -> None:
    assert job(**changes).digest != job().digest
    assert f"{key}: " in told_difference(job().canonical(), job(**changes).canonical())


def test_every_key_of_the_job_is_among_those_whose_change_is_named() -> None:
    def keys(values: dict[str, Any], prefix: str = "") -> set[str]:
        return {
            key
            for name, value in values.items()
            for key in (keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"})
        }

    covered = {key for key, _ in KEYS}
    assert {key for key in keys(job().canonical()) if not key.startswith("parties.")} <= covered


def test_differences_tell_both_values() -> None:
    other = job(epochs=30, broker={"patience": 5}).canonical()
    assert (
        told_difference(job().canonical(), other) == "broker.patience: 60.0 here, 5.0 there; epochs: 20 here, 30 there"
    )


def test_a_digest_does_not_depend_on_the_order_in_which_keys_are_written(tmp_path: Path) -> None:
    head, *tables = JOB_TOML.split("\n\n")
    parties, others = tables[:2], tables[2:]
    turned = "\n\n".join(["\n".join(reversed(head.splitlines())), *reversed(others), *parties])
    first, second = written(tmp_path, "a.toml", JOB_TOML), written(tmp_path, "b.toml", turned)
    assert Job.load(first).digest == Job.load(second).digest


def test_the_place_of_a_party_without_a_base_model_does_not_matter() -> None:
    first, last = (job(parties=p) for p in ({"b": LABEL, "a": FEATURE}, {"a": FEATURE, "b": LABEL}))
    assert first.digest == last.digest
    assert told_difference(first.canonical(), last.canonical()) == ""


# Mistakes in a job file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 0}, ["epochs = 0", "at least 1"]),
        ({"batch_size": -1}, ["batch_size = -1", "at least 1"]),
        ({"batch_size": 2.5}, ["batch_size = 2.5", "whole number"]),
        ({"epochs": True}, ["epochs = True", "whole number"]),
        ({"epochs": "5"}, ["epochs = '5'", "whole number"]),
        ({"seed": 2**63}, ["seed = 9223372036854775808", "64 bits"]),
        ({"holdout": 1.0}, ["holdout = 1.0", "from 0 to below 1"]),
        ({"holdout": -0.1}, ["holdout = -0.1"]),
        ({"holdout": float("nan")}, ["holdout = nan"]),
        ({"shuffle": 1}, ["shuffle = 1", "true or false"]),
        ({"name": ""}, ["name = ''", "letters"]),
        ({"name": "a/b"}, ["name = 'a/b'", "letters"]),
        ({"name": "amq.x"}, ["name = 'amq.x'", "RabbitMQ"]),
        ({"epoch": 3}, ["epoch is unknown", "did you mean 'epochs'?"]),
        ({"micro_batches": 3}, ["micro_batches is unknown", "it belongs in [pipeline]"]),
        ({"pipeline": {"holdout": 0.1}}, ["pipeline.holdout is unknown", "at the top of the file"]),
        ({"security": {"seal": True}}, ["security.keys: no key of bank, insurer, scheduler, operator; "]),
        ({"security": {"keys": {"bnak": SEALING["bank"]}}}, ["security.keys.bnak", "did you mean 'bank'"]),
        (
            {"security": {"keys": {**SEALING, "scheduler": {"seal": KEYS_OF[2]}}}},
            ["security.keys.scheduler.sign is mis"],
        ),
        ({"security": {"keys": {"bank": SEALING["insurer"], "insurer": SEALING["insurer"]}}}, ["have the same key"]),
        ({"security": {"keys": {"bank": {"seal": "c2hvcnQ="}}}}, ["security.keys.bank.seal = 'c2hvcnQ='", "base64"]),
        ({"security": {"cipher": "rot13"}}, ["security.cipher = 'rot13'", "chacha20-poly1305"]),
        ({"fuse": {"agregation": "sum"}}, ["fuse.agregation is unknown", "did you mean 'aggregation'?"]),
        ({"fuse": {"aggregation": "max"}}, ["fuse.aggregation = 'max'", '"concat"']),
        ({"pipeline": {"micro_batches": 0}}, ["pipeline.micro_batches = 0"]),
        ({"pipeline": {"micro_batches": 513}}, ["pipeline.micro_batches = 513", "batch_size, which is 512"]),
        ({"pipeline": {"depth": 0}}, ["pipeline.depth = 0"]),
        ({"pipeline": {"staleness": -1}}, ["pipeline.staleness = -1"]),
        ({"pipeline": {"checkpoint_every": 0}}, ["pipeline.checkpoint_every = 0"]),
        ({"pipeline": 4}, ["pipeline = 4", "a table [pipeline]"]),
        ({"broker": {"patience": 0}}, ["broker.patience = 0"]),
        ({"broker": {"patience": float("inf")}}, ["broker.patience = inf"]),
        ({"broker": {"persistent": "yes"}}, ["broker.persistent = 'yes'"]),
        ({"wire": {"dtype": "float8"}}, ["wire.dtype = 'float8'", '"bfloat16"']),
        ({"wire": {"compress": "zip"}}, ["wire.compress = 'zip'", '"bitmap"']),
        ({"early_stopping": {"metric": "loss", "patience": 3}}, ["early_stopping", "holdout = 0"]),
        ({"early_stopping": {"metric": "loss"}, "holdout": 0.1}, ["early_stopping.patience is missing", "epochs"]),
        (
            {"early_stopping": {"metric": "loss", "patience": 0, "min_delta": -1.0}, "holdout": 0.1},
            ["early_stopping.patience = 0", "early_stopping.min_delta = -1.0"],
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(changes: dict[str, Any], expected: list[str]) -> None:
    said = complaint(**changes)
    for words in expected:
        assert words in said


@pytest.mark.parametrize(
    ("parties", "expected"),
    [
        ({}, ['no party has role = "label"', 'no party has role = "feature"']),
        ({"a": FEATURE}, ['no party has role = "label"']),
        ({"a": FEATURE, "b": LABEL, "c": LABEL}, ['b, c have role = "label"', "exactly one"]),
        ({"b": LABEL}, ['no party has role = "feature"']),
        ({"b": {**LABEL, "cut": [3]}}, ['no party has role = "feature"']),
        ({"a": {"role": "feature"}, "b": LABEL}, ["parties.a.cut is missing", "[32]"]),
        ({"a": {"cut": [3]}, "b": LABEL}, ["parties.a.role is missing", '"feature" or "label"']),
        ({"a": {"role": "fature", "cut": [3]}, "b": LABEL}, ["parties.a.role = 'fature'", '"feature" or "label"']),
        ({"a": {**FEATURE, "cut": []}, "b": LABEL}, ["parties.a.cut = []"]),
        ({"a": {**FEATURE, "cut": 32}, "b": LABEL}, ["parties.a.cut = 32"]),
        ({"a": {**FEATURE, "cut": [4, 0]}, "b": LABEL}, ["parties.a.cut[1] = 0"]),
        ({"a": {**FEATURE, "cut": [4.0]}, "b": LABEL}, ["parties.a.cut[0] = 4.0"]),
        ({"a": {**FEATURE, "colour": 1}, "b": LABEL}, ["parties.a.colour is unknown", "role, cut"]),
        ({"cut": {"role": 3, "cut": [3]}, "b": LABEL}, ["parties.cut.role = 3", '"feature" or "label"']),
        ({"a": 3, "b": LABEL}, ["parties.a = 3"]),
        ({"scheduler": FEATURE, "b": LABEL}, ["parties.scheduler", "'operator'"]),
        ({"operator": FEATURE, "b": LABEL}, ["parties.operator"]),
        ({"dead": FEATURE, "b": LABEL}, ["parties.dead"]),
        ({"a.b": FEATURE, "b": LABEL}, ["parties.a.b: a party's name"]),
        ({"a*": FEATURE, "b": LABEL}, ["parties.a*: a party's name"]),
        ({"": FEATURE, "b": LABEL}, ["a party's name"]),
        ({"bänk": FEATURE, "b": LABEL}, ["a party's name"]),
        ({"x" * 65: FEATURE, "b": LABEL}, ["at most 64"]),
    ],
)
def test_parties_that_cannot_train_together_are_named(parties: dict[str, Any], expected: list[str]) -> None:
    said = complaint(parties=parties)
    for words in expected:
        assert words in said


RESERVED = ("scheduler", "operator", "dead", "insurer")


@given(st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True).filter(lambda name: name not in RESERVED))
def test_any_word_can_name_a_party(name: str) -> None:
    assert job(parties={name: FEATURE, "insurer": LABEL}).feature_parties == (name,)


@pytest.mark.parametrize("aggregation", ["list", "concat", "sum", "mean"])
def test_equal_cuts_can_be_aggregated_in_every_way(aggregation: str) -> None:
    parties = {"a": {"role": "feature", "cut": [4, 8]}, "b": {"role": "label", "cut": [4, 8]}}
    assert job(parties=parties, fuse={"aggregation": aggregation}).fuse.aggregation == aggregation


@pytest.mark.parametrize(
    ("aggregation", "other", "allowed"),
    [
        ("sum", [5, 8], False),
        ("mean", [4], False),
        ("concat", [5, 8], True),
        ("concat", [4, 9], False),
        ("concat", [4], False),
        ("list", [7], True),
    ],
)
def test_aggregations_need_cuts_that_fit(aggregation: str, other: list[int], allowed: bool) -> None:
    parties = {"a": {"role": "feature", "cut": [4, 8]}, "b": {"role": "label", "cut": other}}
    if allowed:
        job(parties=parties, fuse={"aggregation": aggregation})
        return
    said = complaint(parties=parties, fuse={"aggregation": aggregation})
    assert f"fuse.aggregation = {aggregation!r}" in said
    assert f"a [4, 8], b {other}" in said


def test_all_mistakes_of_a_file_are_told_at_once_and_the_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "job.toml", 'name = "x"\nepochs = 0\nsead = 7\n')
    with pytest.raises(JobError) as raised:
        Job.load(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: 5 things are wrong\n")
    for words in ("epochs = 0", "sead is unknown; did you mean 'seed'?", "seed is missing", "batch_size is missing"):
        assert words in said
    assert "parties is missing; it must be a table [parties.NAME]" in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"name = ", "is not valid TOML"), (b"name = '\xff'", "is not UTF-8"), (b"a = 1\na = 2", "is not valid TOML")],
)
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(JobError, match=expected) as raised:
        Job.load(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"none\.toml: there is no such file"):
        Job.load(tmp_path / "none.toml")
    with pytest.raises(JobError, match="cannot be read"):
        PartyFile.load(tmp_path)


def test_tables_built_in_code_complain_in_the_same_way() -> None:
    with pytest.raises(JobError, match='JobParty: role = \'x\'; it must be "feature" or "label"'):
        JobParty(role="x")  # type: ignore[arg-type]
    with pytest.raises(JobError, match="DataFile: needs a path and an id"):
        DataFile(path=Path("x.csv"))
    with pytest.raises(JobError, match=r"Job: parties\.a\.role"):
        Job(**{**VALUES, "parties": {"a": {"role": "x"}, "b": LABEL}})


def test_early_stopping_needs_rows_that_are_held_out() -> None:
    careful = job(batch_size=4, holdout=0.01, early_stopping={"metric": "loss", "patience": 2})
    assert careful.batches(1000).holdout_rows == 10
    with pytest.raises(JobError, match=r"holdout = 0.01 of 10 rows is none"):
        careful.batches(10)


# The party file -------------------------------------------------------------------------------------------------


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


def test_a_party_file_is_built_in_code_with_modules_and_arrays() -> None:
    from torch import nn

    module = nn.Linear(2, 32)
    rows = Rows([1, 2], np.zeros((2, 2), np.float32))
    built = PartyFile(party="bank", data=rows, base={"model": module, "optimizer": {"name": "adam", "lr": 1e-3}})
    assert built.base is not None
    assert built.base.model is module
    assert built.data is rows
    assert built.folder is None
    agree(job(), built)
    holder = PartyFile(
        party="insurer",
        data=Rows([1, 2], np.zeros((2, 2)), np.zeros(2)),
        base={"model": nn.Linear, "args": {"in_features": 2, "out_features": 16}, "optimizer": {"name": "sgd"}},
        fuse={"model": module, "optimizer": {"name": "sgd"}, "loss": nn.functional.mse_loss},
    )
    agree(job(), holder)
    from_callable = PartyFile(party="bank", data={"source": lambda: rows}, base={"model": module})
    agree(job(), from_callable)
    assert "Linear(" in repr(built)
    assert "0." not in repr(rows)


def test_losses_that_a_party_file_may_name_are_those_that_exist() -> None:
    from sl_queue.compute import losses

    assert set(NAMED_LOSSES) == set(losses.LOSSES)


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
        ({"data": {"source": "m:f", "path": "x.csv", "id": "i"}}, ["take out path, id"]),
        ({"data": {"source": "rows"}}, ["data.source = 'rows'", "module:callable"]),
        ({"data": {"source": 3}}, ["data.source = 3"]),
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
        ({"threads": 0}, ["threads = 0", "at least 1"]),
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


def test_reading_job_and_party_files_loads_no_torch_and_no_pika() -> None:
    code = "import sys, sl_queue.config.job; sys.exit(bool({'torch', 'pika', 'pyarrow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The broker and its password ------------------------------------------------------------------------------------


def test_the_option_comes_before_the_environment_and_that_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SL_QUEUE_BROKER", raising=False)
    party = PartyFile(party="bank", broker="amqp://file", data={"source": "m:f"})
    assert party.broker_url(None) == "amqp://file"
    monkeypatch.setenv("SL_QUEUE_BROKER", "amqp://environment")
    assert party.broker_url(None) == "amqp://environment"
    assert party.broker_url("memory://") == "memory://"
    monkeypatch.setenv("SL_QUEUE_BROKER", "")
    assert party.broker_url(None) == "amqp://file"
    with pytest.raises(JobError, match="has no broker: give --broker URL, set SL_QUEUE_BROKER"):
        PartyFile(party="bank", data={"source": "m:f"}).broker_url(None)
    monkeypatch.setenv("SL_QUEUE_BROKER", "http://u:hunter2@host")
    with pytest.raises(JobError, match=r"SL_QUEUE_BROKER = 'http://u:\*\*\*@host'") as raised:
        party.broker_url(None)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "memory://",
        "amqp://localhost",
        "amqps://bank:hunter2@broker.example:5671/credit",
        "amqp://guest:guest@[::1]:5672/%2F",
        "amqps://u:hunter2@one:5671,two:5671,[::1]/v",
        "amqp://u:hunter2@h/v?heartbeat=10",
    ],
)
def test_these_urls_are_brokers(url: str) -> None:
    assert PartyFile(party="bank", broker=url, data={"source": "m:f"}).broker_url() == url


@pytest.mark.parametrize(
    "url",
    [
        "ampq://bank:hunter2@h/v",
        "amqp://",
        "amqp://bank:hunter2",
        "bank:hunter2@h",
        "amqp://bank:hunter2/x@h/v",
        "amqp://bank:1/hunter2@h/v",
        "amqp://bank:1#hunter2@h/v",
        "amqp://bank:1?hunter2@h/v",
        "amqp://h:99999/v",
        "amqp://u:hunter2@h,/v",
        "amqp://u:hunter2@h:5672,two:99999/v",
        "memory://h",
        "",
    ],
)
def test_these_urls_are_not_and_the_complaint_shows_no_password(url: str) -> None:
    said = party_complaint(broker=url)
    assert "broker = " in said
    assert "amqps://user:password@host" in said
    assert "hunter2" not in said


def test_a_url_in_the_wrong_place_shows_no_password() -> None:
    url = "amqp://bank:hunter2@h/v"
    for changes in ({"broker": [url]}, {"party": 1, "borker": url}, {"device": [url]}, {"threads": url}, {"base": url}):
        assert "hunter2" not in party_complaint(**changes)


def test_no_representation_of_a_party_file_shows_a_password() -> None:
    party = PartyFile(party="bank", broker="amqp://bank:hunter2@h/v", data={"source": "m:f"})
    for text in (repr(party), str(party), f"{party}", f"{[party]}"):
        assert "hunter2" not in text
        assert "amqp://bank:***@h/v" in text


PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=20)


@given(PRINTABLE.filter(lambda p: "***" not in p and p not in "amqps://user@host.example:5671/vhost"))
def test_no_password_survives_redaction_whatever_it_is_made_of(password: str) -> None:
    shown = redacted(f"amqps://user:{password}@host.example:5671/vhost")
    assert shown == "amqps://user:***@host.example:5671/vhost"


# Importing what a party file names ------------------------------------------------------------------------------


def test_a_callable_is_imported_from_the_folder_of_the_file(tmp_path: Path) -> None:
    written(tmp_path, "a_bank.py", "class Models:\n    def base():\n        return 1\n")
    assert Importer().within(tmp_path).load("a_bank:Models.base")() == 1
    assert Importer().within(None).load("os.path:join") is __import__("os").path.join


def test_modules_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        written(folder, "two_layers.py", f"where = {folder.name!r}")
        written(folder, "two_models.py", "import two_layers\ndef where():\n    return two_layers.where\n")
        (folder / "two_packages").mkdir()
        written(folder / "two_packages", "models.py", f"def where():\n    return {folder.name!r}\n")
    importer = Importer()
    for name in ("two_models:where", "two_packages.models:where"):
        found = [importer.within(folder).load(name) for folder in folders]
        assert [function() for function in found] == ["first", "second"]
        assert importer.within(folders[0]).load(name) is found[0]


def test_threads_that_import_at_once_get_their_own_modules(tmp_path: Path) -> None:
    folders = [tmp_path / f"party_{i}" for i in range(8)]
    for folder in folders:
        folder.mkdir()
        written(folder, "at_once.py", f"def where():\n    return {folder.name!r}\n")
    importer, found = Importer(), dict[Path, str]()
    threads = [
        threading.Thread(target=lambda f=folder: found.update({f: importer.within(f).load("at_once:where")()}))
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {folder: folder.name for folder in folders}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_module:f", "there is no module 'no_such_module' in "),
        ("broken_syntax:f", "importing 'broken_syntax' from .* fails: SyntaxError"),
        ("broken_import:f", "importing 'broken_import' from .* fails: No module named 'no_such_library'"),
        ("a_few:rowz", "there is no 'rowz' in .*did you mean 'rows'?"),
        ("a_few:number", "is of type int; it must be callable"),
        ("a_few", "is not of the form module:callable"),
        ("a_few:", "is not of the form"),
        ("queue:f", "Python already knows another module 'queue'"),
    ],
)
def test_what_cannot_be_imported_is_explained(tmp_path: Path, name: str, expected: str) -> None:
    written(tmp_path, "broken_syntax.py", "def f(:\n")
    written(tmp_path, "broken_import.py", "import no_such_library\n")
    written(tmp_path, "a_few.py", "number = 3\ndef rows():\n    pass\n")
    written(tmp_path, "queue.py", "def f():\n    pass\n")
    with pytest.raises(JobError, match=expected) as raised:
        Importer().within(tmp_path).load(name)
    assert repr(name) in str(raised.value)


def test_a_url_may_lie_in_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SL_QUEUE_BROKER", raising=False)
    written(tmp_path, "broker.url", "amqps://bank:secret@broker/credit\n").chmod(0o600)
    bank = PartyFile.load(
        written(tmp_path, "bank.toml", BANK_TOML.replace('"amqps://bank@broker:5671/credit"', '"file:broker.url"'))
    )
    assert bank.broker_url() == "amqps://bank:secret@broker/credit"
    assert bank.broker_url(f"file:{tmp_path / 'broker.url'}") == "amqps://bank:secret@broker/credit"
    assert "secret" not in repr(bank)
    (tmp_path / "broker.url").write_text("http://bank:secret@broker/credit")
    for url in (None, "file:nowhere.url"):
        with pytest.raises(JobError) as raised:
            bank.broker_url(url)
        assert "secret" not in str(raised.value) and "broker" in str(raised.value)


def test_another_importer_of_this_process_knows_the_folders_of_the_first(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("earlier", "later")]
    for folder in folders:
        folder.mkdir()
        written(folder, "twice_run.py", f"def where():\n    return {folder.name!r}\n")
    found = [Importer().within(folder).load("twice_run:where")() for folder in (*folders, *folders)]
    assert found == ["earlier", "later", "earlier", "later"]

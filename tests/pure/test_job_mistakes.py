"""A mistake in a job file is named, with what is allowed."""

from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.config.job import DataFile, Job, JobParty, PartyFile
from sl_queue.errors import JobError
from tests.support.job_files import FEATURE, KEYS_OF, LABEL, SEALING, VALUES, complaint, job, written


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
        ({"broker": {"patience": 1e-300}}, ["broker.patience = 1e-300", "at least 0.1"]),
        (
            {"alignment": {"method": "psi", "pad": 2 * 10**9}},
            ["alignment.pad = 2000000000", "1 to 10000000", "stand for"],
        ),
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
        ({"a": {**FEATURE, "cut": {}}, "b": LABEL}, ["parties.a.cut = a table of nothing", "at least 1"]),
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


BOUND = "it must be a number, or a date like 2026-01-31 or 2026-01: the smallest value "
CHOSEN = "it must be a list of texts, numbers, or true and false: those that are chosen"


@pytest.mark.parametrize(
    ("holdout", "expected"),
    [
        ({"from": datetime(1979, 5, 27, 7, 32)}, f"holdout.from = a datetime; {BOUND}that is chosen"),
        ({"from": float("nan")}, f"holdout.from = nan; {BOUND}that is chosen"),
        ({"to": time(7, 32)}, f"holdout.to = a time; {BOUND}above those that are chosen"),
        ({"values": [date(2026, 1, 1)]}, f"holdout.values[0] = a date; {CHOSEN}"),
        ({"values": [1, None]}, f"holdout.values[1] = None; {CHOSEN}"),
        ({"values": 3}, f"holdout.values = 3; {CHOSEN}"),
        (
            {"form": 3},
            "holdout.form is unknown; did you mean 'from'? allowed in this table are column, from, to, values",
        ),
    ],
)
def test_a_value_that_may_be_of_several_kinds_is_named_once_as_the_file_names_it(
    holdout: dict[str, Any], expected: str
) -> None:
    assert complaint(holdout={"column": "a", **holdout}).startswith(f"Job: {expected}")


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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = " + "9" * 5000, ": holds a whole number of more than 300 digits"),
        ("x = 0x" + "f" * 5000, ": x = a number of 20000 bits; it must have at most 300 digits"),
        ("[y.z]\nx = [1, 0x" + "f" * 400 + "]", r": y\.z\.x\[1\] = a number of 1600 bits"),
        ("x = " + "[" * 5000 + "]" * 5000, ": holds lists or tables more than 100 deep"),
        ("x = " + "[" * 101 + "]" * 101, r": x\[0\]\[0\].* holds lists or tables more than 100 deep"),
        (".".join(["a"] * 5000) + " = 1", r": a\.a\.a.* holds lists or tables more than 100 deep"),
    ],
)
def test_what_no_key_takes_is_refused_wherever_it_stands(tmp_path: Path, line: str, expected: str) -> None:
    for kind in (Job, PartyFile):
        with pytest.raises(JobError, match=expected):
            kind.load(written(tmp_path, "x.toml", line))


def test_a_number_too_large_for_arithmetic_is_refused_in_code_too() -> None:
    assert "Job: seed = a number of 16610 bits; it must have at most 300 digits" in complaint(seed=10**5000)
    with pytest.raises(JobError, match=r"Job: broker\.patience = a number of"):
        job().replace(broker={"patience": 10**400})


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
    with pytest.raises(JobError, match=r"holdout = 0.01 of 10 rows holds out none"):
        careful.batches(10)


def test_a_run_has_no_more_steps_than_a_message_can_count() -> None:
    assert job(batch_size=5, epochs=2**63 - 1).batches(5).steps == 2**63 - 1
    assert job(batch_size=5, epochs=2**62 - 1).batches(10).steps == 2**63 - 2
    with pytest.raises(JobError, match=r"epochs = 4611686018427387904 of 2 steps each are .* use fewer epochs"):
        job(batch_size=5, epochs=2**62).batches(10)

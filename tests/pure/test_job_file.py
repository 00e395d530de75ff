"""A job file is read as it is documented, and its digest names what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.job import Job
from sl_queue.protocol.schedule.row_order import Batches
from sl_queue.protocol.scheduler.agreement import told_difference
from sl_queue.protocol.topology import Topology
from tests.support.job_files import FEATURE, JOB_TOML, LABEL, PARTIES, SEALING, job, written


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

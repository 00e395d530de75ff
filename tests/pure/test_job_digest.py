"""The digest of a job never changes: a later version of sl_queue goes on with what an earlier one began."""

import tomllib
from typing import Any

import pytest
from pydantic import Field

from sl_queue.config.canonical import FIRST
from sl_queue.config.job import Job
from sl_queue.config.job_tables import JobParty, JobPipeline
from sl_queue.config.schema import Schema
from tests.support.credit import EXAMPLE

KEY = "A" * 43 + "="
EVERY_TABLE: dict[str, Any] = {
    "name": "every",
    "seed": 3,
    "epochs": 4,
    "batch_size": 64,
    "holdout": 0.25,
    "shuffle": False,
    "drop_last": True,
    "parties": {"a": {"role": "feature", "cut": [4, 2]}, "b": {"role": "label", "cut": [5, 2]}},
    "fuse": {"aggregation": "concat"},
    "pipeline": {"micro_batches": 2, "depth": 3, "staleness": 1, "checkpoint_every": 10},
    "broker": {"persistent": True, "patience": 30.0, "queues": "quorum"},
    "wire": {"dtype": "int8", "compress": "zstd"},
    "early_stopping": {"metric": "auroc", "patience": 3, "min_delta": 0.01},
    "security": {"cipher": "chacha20-poly1305", "keys": {"a": {"seal": KEY}}},
}


def test_the_digests_of_jobs_are_those_of_the_first_version() -> None:
    credit = Job.load(EXAMPLE / "job.toml")
    assert credit.digest == "bf059c6e663a0e20eb832dcc498354022b02407c218eeb8e3a3c6bf450976a09"
    assert Job(**EVERY_TABLE).digest == "14f6361954cf1df80dfa7eb29a8b251ebe9b8b8499df469835a931cd160d5122"


def test_a_later_key_counts_as_soon_as_it_says_something_else() -> None:
    assert Job(**EVERY_TABLE, holdout_seed=3).digest != Job(**EVERY_TABLE).digest
    assert Job(**EVERY_TABLE, holdout_seed=3).canonical()["holdout_seed"] == 3


class NextTable(Schema):
    """A table that the next version has."""

    ids: str = "exact"
    keys: list[str] = Field(default=[])


class NextPipeline(JobPipeline):
    """A table of today with a key more."""

    ahead: int = 0


class NextParty(JobParty):
    """A party with a key more."""

    replicas: int = 1


class NextJob(Job):
    """The job of the next version: a table more, one that may be left out, and keys in three places."""

    conversion: NextTable = NextTable()
    prediction: NextTable | None = None
    pipeline: NextPipeline = Field(default=NextPipeline())
    parties: dict[str, NextParty]  # type: ignore[assignment]
    note: str = ""


def test_a_table_or_key_of_a_later_version_leaves_the_digests_as_they_are() -> None:
    credit = tomllib.loads((EXAMPLE / "job.toml").read_text())
    assert NextJob(**credit).digest == Job(**credit).digest
    assert NextJob(**EVERY_TABLE).digest == Job(**EVERY_TABLE).digest
    spelled_out = {"conversion": {"ids": "exact"}, "note": ""}
    assert NextJob(**EVERY_TABLE, **spelled_out).digest == Job(**EVERY_TABLE).digest


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"note": "x"}, {"note": "x"}),
        ({"conversion": {"ids": "hashed"}}, {"conversion": {"ids": "hashed"}}),
        ({"prediction": {}}, {"prediction": {}}),
        ({"prediction": {"keys": ["a"]}}, {"prediction": {"keys": ["a"]}}),
    ],
)
def test_what_a_later_version_asks_for_is_in_the_canonical_job(changes: Any, where: dict[str, Any]) -> None:
    job = NextJob(**EVERY_TABLE, **changes)
    assert job.digest != Job(**EVERY_TABLE).digest
    assert job.canonical() == Job(**EVERY_TABLE).canonical() | where


def test_a_later_key_of_a_party_or_an_older_table_counts_too() -> None:
    parties = {**EVERY_TABLE["parties"], "a": {**EVERY_TABLE["parties"]["a"], "replicas": 2}}
    pipeline = {**EVERY_TABLE["pipeline"], "ahead": 1}
    job = NextJob(**{**EVERY_TABLE, "parties": parties, "pipeline": pipeline})
    assert job.canonical()["parties"]["a"] == {"role": "feature", "cut": [4, 2], "replicas": 2}
    assert job.canonical()["parties"]["b"] == {"role": "label", "cut": [5, 2]}
    assert job.canonical()["pipeline"]["ahead"] == 1


def test_every_key_of_the_first_version_is_always_in_the_canonical_job() -> None:
    least = {"name": "least", "seed": 1, "epochs": 1, "batch_size": 1}
    job = Job(**least, parties={"a": {"role": "feature", "cut": [1]}, "b": {"role": "label"}})
    assert job.digest == "f5dd3934da471bd6ce1a90154809a0df7a1e64125e9324f741f84c8d94325c7c"
    assert {key for key in FIRST if "." not in key} == set(job.canonical())
    assert set(job.canonical()["pipeline"]) == {key.partition(".")[2] for key in FIRST if key.startswith("pipeline.")}


def test_the_rules_of_a_run_are_no_part_of_its_job() -> None:
    assert Job(**EVERY_TABLE, rules=1).canonical() == Job(**EVERY_TABLE).canonical()

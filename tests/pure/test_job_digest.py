"""The digest of a job never changes: a later version of sl_queue goes on with what an earlier one began."""

from typing import Any

import pytest

from sl_queue.config.job import LATER, Job
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


@pytest.mark.parametrize("dotted", LATER)
def test_what_is_left_out_of_the_canonical_job_is_the_default_of_its_key(dotted: str) -> None:
    whole: Any = Job(**EVERY_TABLE).model_dump(mode="json")
    table = Job(**EVERY_TABLE).canonical()
    *tables, key = dotted.split(".")
    for name in tables:
        whole, table = whole[name], table[name]
    assert whole[key] == LATER[dotted]
    assert key not in table


def test_the_rules_of_a_run_are_no_part_of_its_job() -> None:
    assert Job(**EVERY_TABLE, rules=1).canonical() == Job(**EVERY_TABLE).canonical()

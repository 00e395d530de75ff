"""The planner's tables can be pasted, and it recommends what hides a delay."""

import tomllib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import nn

from sl_queue.config.job import Job
from sl_queue.errors import JobError
from sl_queue.planning.measuring import Link
from sl_queue.planning.plan import Plan, lines, links_named, plan_job
from tests.support.split import Concatenated, parties


def planned(link: Link, **job: Any) -> Plan:
    draw = np.random.default_rng(5)
    run = parties(
        {"a": nn.Sequential(nn.Linear(3, 8), nn.ReLU())},
        Concatenated(8, 1),
        {"a": draw.normal(size=(80, 3)).astype(np.float32)},
        draw.integers(0, 2, 80),
        cuts={"a": [8]},
        **job,
    )
    return plan_job(run.job, list(run.files.values()), link)


@pytest.fixture(scope="module")
def far() -> Plan:
    return planned(Link(own={"a": Link(rtt_ms=200.0)}))


def test_over_a_slow_link_lock_step_waits_for_it_and_a_run_ahead_is_recommended(far: Plan) -> None:
    assert 0.2 < far.exact.prediction.step_s < 0.4
    assert far.fastest.pipeline.staleness == 4
    assert far.fastest.prediction.step_s == pytest.approx(0.2 / 5, rel=0.5)
    assert far.exact.exact
    assert not far.fastest.exact


def test_what_one_broker_node_cannot_carry_is_among_what_is_printed(far: Plan) -> None:
    assert far.too_much == ()
    said = "\n".join(lines(replace(far, too_much=("the job as it is: up to 5 GiB lie there",))))
    assert "one broker node is too small for the job as it is: up to 5 GiB lie there" in said


def test_links_are_read_by_name_and_a_mistake_is_named() -> None:
    cuts = {"a": {"role": "feature", "cut": [8]}, "b": {"role": "feature", "cut": [8]}, "holder": {"role": "label"}}
    job = Job(name="x", seed=1, epochs=1, batch_size=12, parties=cuts)
    assert links_named(["a=80", "b=0.5,100"], job) == {"a": Link(80.0), "b": Link(0.5, 100.0)}
    for text, said in (("c=80", "'c' is not one of"), ("holder=80", "a, b"), ("a", "a=80,100"), ("a=80,0", "MBIT")):
        with pytest.raises(JobError, match=said):
            links_named([text], job)


def test_every_candidate_is_ranked_and_the_present_one_is_among_what_is_printed(far: Plan) -> None:
    times = [candidate.prediction.step_s for candidate in far.candidates]
    assert times == sorted(times)
    assert sum("(the job as it is)" in line for line in lines(far)) == 1


def test_the_recommended_tables_are_those_of_a_job_file(far: Plan) -> None:
    tables = "\n".join(lines(far)).split(":\n\n")[1:]
    assert len(tables) == 2
    for text in tables:
        values = tomllib.loads(text.split("\n\nfastest")[0])
        cut = {"a": {"role": "feature", "cut": [8]}, "holder": {"role": "label"}}
        job = Job(name="x", seed=1, epochs=1, batch_size=12, parties=cut, **values)
        assert (job.pipeline.staleness > 0) == (text == tables[1])


def test_hands_are_planned_for_a_party_that_may_have_some_whose_own_link_counts() -> None:
    draw = np.random.default_rng(5)
    wide = nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 8))
    run = parties(
        {"a": wide},
        Concatenated(8, 1),
        {"a": draw.normal(size=(800, 3)).astype(np.float32)},
        draw.integers(0, 2, 800),
        cuts={"a": [8]},
        batch_size=256,
        pipeline={"micro_batches": 4, "depth": 4},
    )
    files = [file.replace(hands={}) if file.party == "a" else file for file in run.files.values()]
    found = plan_job(run.job, files, Link(rtt_ms=2000.0, own={"a": Link()}))
    assert found.exact.prediction.step_s < 1.0
    assert list(found.hands) == ["a"] and list(found.hands["a"]) == [1, 2, 4]
    one, two, four = found.hands["a"].values()
    assert four <= 1.001 * two and two <= 1.001 * one  # where others hold it up, it stays, but for what waits in turn
    (line,) = [line for line in lines(found) if line.startswith("with hands at a")]
    assert line.count(":") == 4


def test_a_link_of_all_that_is_far_and_narrow_makes_fewer_bytes_worth_it() -> None:
    narrow = planned(Link(rtt_ms=200.0, mbit_s=0.01))
    assert narrow.exact.prediction.step_s > 0.2
    assert narrow.fastest.wire.dtype == "int8"
    assert narrow.exact.wire.compress == "bitmap"

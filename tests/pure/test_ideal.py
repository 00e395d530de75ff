"""The bubble that a schedule leaves by itself, from what each party computes for a step."""

import pytest

from sl_queue.config.job import Job
from sl_queue.planning.ideal import ideal_bubble


def job(micro_batches: int) -> Job:
    parties = {"a": {"role": "feature", "cut": [4]}, "b": {"role": "feature", "cut": [4]}, "label": {"role": "label"}}
    pipeline = {"micro_batches": micro_batches}
    return Job.model_validate(
        {"name": "toy", "seed": 1, "epochs": 1, "batch_size": 64, "parties": parties, "pipeline": pipeline}
    )


def test_one_micro_batch_at_a_time_leaves_the_busiest_party_the_share_that_the_others_take() -> None:
    assert ideal_bubble(job(1), {"a": 0.5, "b": 0.5, "label": 0.5}) == pytest.approx(0.5)
    assert ideal_bubble(job(1), {"a": 0.75, "b": 0.01, "label": 0.25}) == pytest.approx(0.25)


def test_more_micro_batches_leave_less_and_a_single_busy_party_waits_for_nobody() -> None:
    even = {"a": 0.5, "b": 0.5, "label": 0.5}
    one, four = ideal_bubble(job(1), even), ideal_bubble(job(4), even)
    assert one is not None
    assert four is not None
    assert four < one - 0.1
    alone = ideal_bubble(job(4), {"a": 1.0, "b": 0.001, "label": 0.001})
    assert alone == pytest.approx(0.0, abs=0.01)


def test_without_all_parties_nothing_is_known() -> None:
    assert ideal_bubble(job(1), {"a": 0.5, "label": 0.5}) is None
    assert ideal_bubble(job(1), {"a": 0.5, "b": 0.0, "label": 0.5}) is None

"""Predicted times are those that can be worked out by hand."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_queue.planning.costs import COLD_S, LABEL, Affine, Costs, FeatureCosts, Way
from sl_queue.planning.simulation import simulate
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.protocol.schedule.row_order import Batches

STEPS = 40


def pipeline(micro_batches: int = 1, depth: int = 1, staleness: int = 0, checkpoint_every: int = STEPS) -> Pipeline:
    batches = Batches(8 * STEPS, 7, 1, 8, micro_batches)
    return Pipeline(batches, depth, staleness, checkpoint_every)


def costs(
    forward_s: float = 1.0,
    fuse_s: float = 1.0,
    parties: int = 1,
    rtt_s: float = 0.0,
    bytes_per_s: float | None = None,
    **more: object,
) -> Costs:
    """Seconds for a whole step of eight rows; a backward takes as long as a forward, everything else nothing."""
    each = FeatureCosts(Affine(0, forward_s / 8), Affine(0, forward_s / 8), 0.0, Affine(0, 1.0), Affine(0, 1.0))
    features = {f"party{i}": each for i in range(parties)}
    nothing = {"fuse_update_s": 0.0, "commit_s": 0.0, "fuse_prepare": Affine(), "handling": Affine()}
    settings = nothing | {"way": Way(rtt_s, bytes_per_s)} | more
    return Costs(features, Affine(0, fuse_s / 8), **settings)  # type: ignore[arg-type]


def step_s(order: Pipeline, given_costs: Costs) -> float:
    return simulate(order, given_costs).step_s


def test_lock_step_adds_everything_up() -> None:
    found = simulate(pipeline(), costs(1.0, 2.0, rtt_s=0.5, handling=Affine(0.25)))
    assert found.step_s == pytest.approx(1.0 + 2.0 + 1.0 + 0.5 + 2 * 0.25)
    assert found.busy == pytest.approx({LABEL: 2.0 / 5.0, "party0": 2.0 / 5.0})
    assert found.bubble == pytest.approx(0.6)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_hands_share_a_party_s_work_and_nothing_else(count: int) -> None:
    order = pipeline(8, 8)
    plain = step_s(order, costs(4.0, 0.0))
    assert plain == pytest.approx(8.0)
    assert simulate(order, costs(4.0, 0.0), hands={"party0": count}).step_s == pytest.approx(8.0 / count)
    assert simulate(order, costs(0.0, 4.0), hands={LABEL: count}).step_s == pytest.approx(4.0 / count)
    beside = simulate(order, costs(4.0, 4.0), hands={"party0": count}).step_s
    assert beside >= 4.0, "the label holder has no more hands than before"


def test_one_hand_takes_the_time_of_a_plain_worker() -> None:
    for order in (pipeline(), pipeline(4, 4), pipeline(1, 3, 2)):
        for given_costs in (costs(1.0, 2.0), costs(2.0, 1.0, rtt_s=0.5)):
            plain = simulate(order, given_costs, warm_up=5).step_s
            for who in ("party0", LABEL):
                assert simulate(order, given_costs, 5, {who: 1}).step_s == pytest.approx(plain, rel=0.35)


def test_a_narrow_link_takes_its_time_for_every_byte() -> None:
    assert step_s(pipeline(), costs(1.0, 1.0, bytes_per_s=4.0)) == pytest.approx(3.0 + 2 * 8 / 4)


def test_in_lock_step_the_party_with_the_longest_way_decides_and_the_others_wait_for_it() -> None:
    ways = {"party0": Way(0.1), "party2": Way(3.0)}
    different = costs(1.0, 1.0, parties=3, rtt_s=1.0, ways=ways)
    assert step_s(pipeline(), different) == pytest.approx(3.0 + 3.0)
    assert step_s(pipeline(), different) == pytest.approx(step_s(pipeline(), costs(1.0, 1.0, parties=3, rtt_s=3.0)))
    found = simulate(pipeline(), different)
    assert found.busy["party0"] == pytest.approx(found.busy["party2"]), "nobody does more for it"


def test_a_run_ahead_hides_a_long_way_of_one_party_from_the_others() -> None:
    different = costs(1.0, 3.0, parties=2, ways={"party1": Way(4.0)})
    assert step_s(pipeline(), different) == pytest.approx(2.0 + 3.0 + 4.0)
    assert simulate(pipeline(1, 5, 4), different, warm_up=8).step_s == pytest.approx(3.0)


def test_only_the_party_with_a_narrow_link_takes_its_time_for_bytes() -> None:
    one = costs(1.0, 1.0, parties=2, ways={"party1": Way(bytes_per_s=4.0)})
    assert step_s(pipeline(), one) == pytest.approx(3.0 + 2 * 8 / 4)


def test_gpipe_overlaps_micro_batches() -> None:
    assert step_s(pipeline(4, 4), costs(1.0, 1.0)) == pytest.approx(2.0), "the feature party never waits"
    assert step_s(pipeline(4, 4), costs(1.0, 3.0)) == pytest.approx(0.25 + 3.0 + 0.25), "the label holder hardly does"


def test_a_run_ahead_hides_the_link_until_the_window_is_used_up() -> None:
    slow = costs(1.0, 1.0, rtt_s=20.0)
    assert step_s(pipeline(), slow) == pytest.approx(23.0)
    ahead = simulate(pipeline(1, 3, 2), slow, warm_up=5).step_s
    assert ahead == pytest.approx(23.0 / 3, rel=0.05)


def test_with_enough_staleness_the_bottleneck_never_waits() -> None:
    found = simulate(pipeline(1, 9, 8), costs(1.0, 3.0, rtt_s=5.0), warm_up=8)
    assert found.step_s == pytest.approx(3.0)
    assert found.busy[LABEL] == pytest.approx(1.0)


def test_parties_that_share_a_core_take_turns() -> None:
    assert step_s(pipeline(), costs(1.0, 1.0, parties=3)) == pytest.approx(3.0)
    assert step_s(pipeline(), costs(1.0, 1.0, parties=3, cores=1)) == pytest.approx(3 * 2.0 + 1.0)
    assert step_s(pipeline(), costs(1.0, 1.0, parties=3, cores=2)) == pytest.approx(3 * 2.0 / 2 + 1.0)


def test_what_is_prepared_while_messages_travel_costs_no_time() -> None:
    assert step_s(pipeline(), costs(1.0, 1.0, rtt_s=4.0, fuse_prepare=Affine(1.0))) == pytest.approx(3.0 + 4.0)
    assert step_s(pipeline(), costs(1.0, 1.0, fuse_prepare=Affine(3.0))) == pytest.approx(1.0 + 3.0)


def test_a_commit_takes_no_time_while_the_pipeline_fills_again() -> None:
    each = pipeline(checkpoint_every=1)
    assert step_s(each, costs(1.0, 1.0, commit_s=2.0)) == pytest.approx(3.0), "a forward and a fuse"
    assert step_s(each, costs(1.0, 1.0, commit_s=5.0)) == pytest.approx(5.0 + 1.0), "nothing is learned meanwhile"


def test_a_driver_takes_one_message_after_the_other() -> None:
    one, two = (step_s(pipeline(), costs(1.0, 1.0, parties=n, driver=Affine(0.5))) for n in (1, 2))
    assert one == pytest.approx(3.0 + 4 * 0.5)
    assert two == pytest.approx(one + 0.5), "whose gradient leaves first, its activation comes first"


def test_who_has_waited_is_slower_afterwards() -> None:
    assert step_s(pipeline(), costs(1.0, 1.0, cold_factor=1.5)) == pytest.approx(1.5 * 3.0), "everybody always waits"
    hardly = costs(COLD_S / 10, COLD_S / 10, cold_factor=2.0)
    assert 1.0 < step_s(pipeline(), hardly) / (3 * COLD_S / 10) < 1.5, "the shorter it was, the less"
    assert simulate(pipeline(1, 9, 8), costs(1.0, 4.0, cold_factor=1.5), warm_up=8).step_s == pytest.approx(4.0)


def test_who_computes_beside_others_is_slower() -> None:
    assert step_s(pipeline(), costs(1.0, 1.0, contention=1.5)) == pytest.approx(3.0), "each has a machine of its own"
    assert step_s(pipeline(), costs(1.0, 1.0, contention=1.5, cores=4)) == pytest.approx(3.0), "one after the other"
    two = costs(1.0, 1.0, parties=2, cores=4)
    assert step_s(pipeline(), replace(two, contention=1.5)) == pytest.approx(1.5 * 2.0 + 1.0)
    assert step_s(pipeline(), replace(two, contention=1.5, cores=1)) == pytest.approx(2 * 2.0 + 1.0)


def test_what_a_message_costs_beside_its_way_is_felt_where_cores_are_shared() -> None:
    assert step_s(pipeline(), costs(1.0, 1.0, overhead=Affine(1.0))) == pytest.approx(3.0)
    assert step_s(pipeline(), costs(1.0, 1.0, overhead=Affine(1.0), cores=1)) == pytest.approx(3.0 + 2.0)


@settings(max_examples=25, deadline=None)
@given(
    order=st.builds(pipeline, st.integers(1, 8), st.integers(1, 9), st.integers(0, 3)),
    forward_s=st.floats(0.01, 5.0),
    fuse_s=st.floats(0.01, 5.0),
    rtt_s=st.floats(0.0, 5.0),
    parties=st.integers(1, 4),
    cores=st.none() | st.integers(1, 4),
)
def test_no_pipeline_beats_its_busiest_party_or_loses_to_doing_one_thing_after_the_other(
    order: Pipeline, forward_s: float, fuse_s: float, rtt_s: float, parties: int, cores: int | None
) -> None:
    given_costs = costs(forward_s, fuse_s, parties=parties, rtt_s=rtt_s, cores=cores)
    found = simulate(order, given_costs)
    least = max(2 * forward_s, fuse_s, 0 if cores is None else (parties * 2 * forward_s + fuse_s) / cores)
    ahead = 1 + order.staleness  # steps computed in part before the clock began, and in part after it ended
    lost = (ahead * least + rtt_s) / (STEPS - 1)
    assert found.step_s >= least - lost - 1e-9
    parts = order.batches.micro_batches
    assert found.step_s <= parties * 2 * forward_s + fuse_s + parts * rtt_s + 1e-9
    assert 0.0 <= found.bubble <= 1.0


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.integers(1, 1000), st.integers(1, 1000))
def test_a_line_through_two_measurements_never_falls(one: float, other: float, few: int, many: int) -> None:
    line = Affine.through((few, one), (many, other))
    assert line.each >= 0
    assert line.fixed >= 0
    assert line(10) <= line(20)

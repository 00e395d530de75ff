"""Totals on their way: from what a worker does, over the channel, to the scheduler's status."""

from dataclasses import replace

import pytest

from sl_queue.observe.meter import Meter
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.control import Alive, Failed, Finished, Report, Stopped
from sl_queue.protocol.events import Received, Reconnected, Resent, Sent
from sl_queue.protocol.messages import SCHEDULER, Header, Kind, MicroBatch
from sl_queue.protocol.scheduler.state import durable
from sl_queue.protocol.scheduler.status import as_json, describe, from_json
from sl_queue.protocol.totals import Now, Totals
from sl_queue.transport.waiting import waiting
from tests.support.post import Post
from tests.support.progress import Mind, plan
from tests.support.waiting import await_that

SECOND = 1_000_000_000


class Clock:
    """A clock that is set. Mutable."""

    now = 0

    def __call__(self) -> int:
        return self.now


def test_totals_are_what_prometheus_counts_with_the_wait_that_goes_on() -> None:
    clock = Clock()
    meter = Meter(clock)
    clock.now = 2 * SECOND
    meter(Sent("a", "label", "activation", 100, numbers=20))
    meter(Sent("a", SCHEDULER, "report", 30))
    meter(Received("a", "label", 50, redelivered=False))
    meter(Resent("a", "label", 3, seconds=1.0))
    meter(Reconnected("a"))
    with waiting(meter, "a", "label", Kind.GRADIENT):
        clock.now = 7 * SECOND
        totals = meter.totals({"applied": 4})
    assert totals == Totals(
        age_s=7.0,
        busy_s=2.0,
        waited_s={"label": {"gradient": 5.0}},
        messages={"applied": 4},
        sent_bytes=130,
        received_bytes=50,
        tensor_bytes=100,
        float32_bytes=80,
        resent=3,
        commits=0,
        reconnects=1,
        now=Now("label", "gradient", 5.0),
    )
    assert meter.totals({}).now is None


def test_they_reach_the_status_and_are_neither_kept_on_disk_nor_of_an_earlier_process() -> None:
    mind = Mind().everyone_joins()
    told = Totals(7.0, 2.0, {"label": {"gradient": 5.0}}, {"applied": 4}, 130, now=Now("label", "gradient", 0.5))
    mind.hear("a", Alive("a1", told))
    status = describe(plan(), mind.state, 1.0, 1.0)
    assert status.parties["a"].totals == told
    assert status.parties["b"].totals is None
    assert from_json(as_json(status)) == status
    assert durable(mind.state).members["a"].totals is None
    mind.hear("a", Alive("another process", replace(told, age_s=99.0)))
    assert mind.state.members["a"].totals == told


def test_a_sign_of_life_of_the_version_before_and_of_a_later_one_is_read() -> None:
    header = Header("", 0, Kind.REPORT, "a", SCHEDULER, MicroBatch(0, 0))
    bare = encode(header, Alive("a1"))
    assert decode(bare)[1] == Alive("a1")
    full = Alive("a1", Totals(1.0, 0.5, {"label": {"gradient": 0.5}}, now=Now("label", "gradient", 0.1)))
    assert decode(encode(header, full))[1] == full


@pytest.mark.parametrize("end", [Finished("a1", {}), Failed("a1", "JobError", "no"), Stopped("a1", 3)], ids=repr)
def test_a_worker_that_ends_at_once_has_told_what_it_did(post: Post, end: Report) -> None:
    waited = {"label": {"gradient": 5.0}}
    bank = post.channel("a", totals=lambda counts: Totals(7.0, 2.0, waited, counts))
    post.listen()
    bank.report(end)
    await_that(lambda: end in post.reported(type(end)))
    before = [message for message in post.reported(object) if message == end or isinstance(message, Alive)]
    assert before.index(end) > 0 and before[0] == Alive("a1", Totals(7.0, 2.0, waited, bank.counts))

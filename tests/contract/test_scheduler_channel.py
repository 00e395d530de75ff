"""The scheduler's channel: reports come until they have taken effect, and nothing else comes through."""

import pytest

from sl_queue.protocol.control import (
    Alive,
    Start,
    StopRequest,
)
from sl_queue.protocol.messages import OPERATOR, SCHEDULER
from tests.support.post import Post, activation, body, scheduler


def test_reports_are_acknowledged_when_they_have_taken_effect_and_come_again_otherwise(post: Post) -> None:
    channel = scheduler(post)
    alive = [Alive("a1"), Alive("a2")]
    post.publish(SCHEDULER, "a", *(body(report, "a", SCHEDULER) for report in alive))
    assert channel.reports(timeout_s=1.0) == [("a", report, False) for report in alive]
    assert post.left(SCHEDULER, "a") == 2
    channel.close()
    post.channels.remove(channel)
    again = scheduler(post)
    assert again.reports(timeout_s=1.0) == [("a", report, True) for report in alive], "delivered again"
    again.acknowledge()
    assert post.left(SCHEDULER, "a") == 0
    assert again.reports(timeout_s=0.0) == []


@pytest.mark.parametrize(
    ("queue", "published"),
    [
        pytest.param("a", b"garbage", id="garbage"),
        pytest.param("a", body(Alive("b1"), "b", SCHEDULER), id="forged"),
        pytest.param("a", body(StopRequest("s"), "a", SCHEDULER), id="a stop that is not the operator's"),
        pytest.param("operator", body(Alive("a1"), OPERATOR, SCHEDULER), id="a report of the operator"),
        pytest.param("a", body(activation(0), "a", SCHEDULER), id="a tensor"),
        pytest.param("a", body(Start("a1", "r"), "a", SCHEDULER), id="a command"),
    ],
)
def test_what_the_scheduler_may_not_be_sent_goes_to_the_dead_letters(post: Post, queue: str, published: bytes) -> None:
    channel = scheduler(post)
    post.publish(SCHEDULER, queue, published)
    assert [(party, dead) for party, _, dead in post.broker.dead_letters] == [(SCHEDULER, published)]
    assert channel.reports(timeout_s=0.0) == []

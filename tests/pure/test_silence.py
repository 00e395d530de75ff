"""Silence is counted only of peers that could be heard, and only what was not heard before is a sign of life."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sl_queue.errors import PeerSilent
from sl_queue.observe.log import to_log
from sl_queue.protocol.control import Alive, Join
from sl_queue.protocol.messages import Gradient, MicroBatch
from sl_queue.protocol.scheduler.reducer import reduce
from sl_queue.protocol.scheduler.state import GIVE_UP, Member, RunState, excused, silent
from sl_queue.transport.link import Outage
from sl_queue.transport.liveness import Liveness
from sl_queue.transport.outages import Outages
from tests.support.post import Post, body, tensor
from tests.support.progress import PARTIES, Mind, plan


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def patient(clock: Clock, outages: Outages, absent_s: Callable[[], float] = float) -> Liveness:
    patience = Liveness("bank", 1.0, lambda _: False, outages.read, clock, to_log, absent_s)
    patience.hear(["insurer"])
    return patience


@given(st.lists(st.tuples(st.sampled_from(["pass", "down", "up", "hear", "stop"]), st.integers(0, 9)), max_size=30))
def test_nobodys_silence_grows_while_the_link_is_down_or_the_process_stopped(
    story: list[tuple[str, int]],
) -> None:
    clock = Clock()
    outages = Outages(clock)
    is_down, silent_s, down_s, stopped_s = False, 0, 0, 0
    patience = patient(clock, outages, lambda: stopped_s)
    for what, seconds in story:
        match what:
            case "pass":
                clock.now += seconds
                silent_s, down_s = (silent_s, down_s + seconds) if is_down else (silent_s + seconds, down_s)
            case "stop":
                clock.now += seconds
                stopped_s, down_s = stopped_s + seconds, down_s + (seconds if is_down else 0)
            case "down":
                outages.begin("refused")
                is_down = True
            case "up":
                outages.end()
                is_down = False
            case "hear":
                patience.hear(["insurer"])
                silent_s = 0
        assert patience.silence_s("insurer") == silent_s
        assert outages.read().total_s == down_s


def test_who_cannot_reach_the_broker_says_so_and_blames_no_peer(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    outages = Outages(clock)
    patience = patient(clock, outages)
    outages.begin("lost")
    outages.begin("user 'bank' was refused: wrong password")
    clock.now += 60.0
    with caplog.at_level(logging.WARNING, "sl_queue"):
        patience.name("insurer", "gradient 1.0 of party 'insurer'", 60.0)
    assert "its own link to the broker has been unusable for 60 s: user 'bank' was refused" in caplog.text
    assert "last heard" not in caplog.text
    outages.end()
    clock.now += GIVE_UP - 1.0
    patience.name("insurer", "gradient 1.0 of party 'insurer'", 70.0)
    clock.now += 2.0
    with pytest.raises(PeerSilent, match=r"silent for 11 s"):
        patience.name("insurer", "gradient 1.0 of party 'insurer'", 72.0)


def test_an_outage_without_an_end_has_a_reason_and_one_that_is_over_has_none() -> None:
    clock = Clock()
    outages = Outages(clock)
    assert outages.read() == Outage()
    outages.begin("blocked")
    clock.now += 2.0
    assert outages.read() == Outage(2.0, 2.0, "blocked")
    outages.end()
    outages.end()
    assert outages.read() == Outage(2.0)


def test_what_is_delivered_again_is_no_sign_of_life_of_a_party() -> None:
    mind = Mind().everyone_joins()
    for party in PARTIES:
        mind.hear(party, Alive(f"{party}1"), now=5.0)
    again: list[Any] = [Alive("a1"), Join("a1", mind.plan.job, 10, "d", "integer", "r", 0, (1,))]
    for report in again:
        mind.state, _ = reduce(mind.plan, mind.state, "a", report, 60.0, "r", redelivered=True)
        assert mind.state.members["a"].heard == 5.0
    assert silent(mind.plan, mind.state, 0.0, 6.0 + GIVE_UP)["a"] == GIVE_UP + 1.0


def test_a_peer_whose_messages_are_delivered_again_is_not_heard() -> None:
    post = Post()
    bank = post.channel("a", patience_s=60.0)
    gradient = body(Gradient(MicroBatch(0, 0), tensor(0)), "label", "a")
    post.broker.publish("a", "label", gradient, persistent=True, expires=False)
    before_s = bank.silent_s["label"]
    time.sleep(0.2)
    post.broker.crash()
    assert bank.counts["redelivered"] == 1
    assert bank.silent_s["label"] >= before_s + 0.2
    began = time.monotonic()
    post.broker.publish("a", "label", gradient, persistent=True, expires=False)
    assert bank.silent_s["label"] <= time.monotonic() - began, "but what is new is heard"
    bank.close()


@given(st.floats(0, 1e4), st.floats(0, 1e4))
def test_a_scheduler_excuses_the_silence_of_its_own_outage(outage_s: float, after_s: float) -> None:
    members = {"a": Member("a1", True, heard=3.0), "b": Member("b1", True)}
    state = excused(RunState(members=members), outage_s)
    assert state.members["a"].heard == 3.0 + outage_s
    assert state.members["b"] == members["b"]
    told = silent(plan(), replace(state), 0.0, 3.0 + outage_s + after_s)
    assert ("a" in told) == (3.0 + outage_s + after_s - (3.0 + outage_s) > GIVE_UP)

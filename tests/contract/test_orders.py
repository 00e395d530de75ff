"""Scheduler's orders as a waiting worker hears them, and its words about a peer that is silent."""

import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from sl_queue.errors import (
    AlignmentError,
    PeerSilent,
    RunStopped,
)
from sl_queue.protocol.control import (
    Alive,
    Join,
    Open,
    Start,
    Status,
    Stop,
    Waiting,
)
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Gradient, Kind, MicroBatch, Payload
from sl_queue.protocol.party.orders import Restarted
from sl_queue.protocol.scheduler.state import GIVE_UP
from tests.support.post import Post, activation, body, nothing, scheduler, tensor
from tests.support.toy import ToyStage
from tests.support.toy_run import ToyRun
from tests.support.waiting import await_that

# Orders -------------------------------------------------------------------------------------------------------


def test_a_waiting_worker_hears_the_orders_that_are_for_it_and_no_others(post: Post) -> None:
    bank = post.channel("a")
    post.command("a", Open("a0", 9))
    post.command("a", Open("a1", 3, keep=1))
    assert bank.wait_for(lambda orders: orders.open) == Open("a1", 3, keep=1)
    post.command("a", Stop("a0", "of an earlier worker", error="RunStopped"))
    threading.Timer(0.05, lambda: post.command("a", Stop("a1", "ids differ", error="AlignmentError"))).start()
    with pytest.raises(AlignmentError, match="ids differ"):
        bank.receive("label", Kind.GRADIENT, MicroBatch(0, 0))


def test_an_order_is_done_with_once_it_came_also_one_for_an_earlier_process(post: Post) -> None:
    post.channel("a")
    for order in (Stop("a0", "enough"), Stop("a1", "enough")):
        post.command("a", order)
        assert post.left("a", SCHEDULER) == 0


def test_a_stop_ends_a_worker_after_its_step_and_one_without_a_step_after_the_next_commit(post: Post) -> None:
    label, bank = post.channel("label"), post.channel("a")
    post.command("a", Stop("a1", "enough", after_step=3))
    post.command("label", Stop("label1", "enough"))
    for step in (1, 3):
        post.publish("a", "label", body(Gradient(MicroBatch(step, 0), tensor(step)), "label", "a"))
        bank.receive("label", Kind.GRADIENT, MicroBatch(step, 0))
        bank.commit(step, nothing)
        bank.wait_committed()
    with pytest.raises(RunStopped, match="enough"):
        bank.receive("label", Kind.GRADIENT, MicroBatch(4, 0))
    post.publish("label", "a", body(activation(0), "a", "label"))
    label.receive("a", Kind.ACTIVATION, MicroBatch(0, 0))
    label.commit(1, nothing)
    with pytest.raises(RunStopped, match="enough"):
        label.wait_for(lambda orders: orders.finish)


def test_a_new_generation_takes_a_waiting_worker_out_of_its_loop(post: Post) -> None:
    bank = post.channel("a")
    threading.Timer(0.05, lambda: post.command("a", Start("a1", "r", (-1, 3)))).start()
    with pytest.raises(Restarted) as restarted:
        bank.receive("label", Kind.GRADIENT, MicroBatch(4, 0))
    assert restarted.value.start.rollback_steps == (-1, 3)


def test_a_scheduler_that_was_started_again_is_told_anew_who_is_here(post: Post) -> None:
    bank = post.channel("a", adopt=False)
    post.listen()
    here = Join("a1", {}, 9, "d", "integer", None, 0, ())
    bank.announce(lambda: here)
    for generation, each in enumerate(("s1", "s2"), 1):
        post.publish("a", SCHEDULER, body(Alive(each), SCHEDULER, "a"))
        post.publish("a", SCHEDULER, body(Alive(each), SCHEDULER, "a"))
        start = Start("a1", "r", (-1,) * generation)
        post.when(lambda each=each: each in [join.to for join in post.reported(Join)], "a", start)  # type: ignore[misc]
        bank.wait_for(lambda orders, start=start: orders.start == start or None)  # type: ignore[misc]
    assert [joined.to for joined in post.reported(Join)] == ["", "s1", "s2"]


def test_who_joined_an_earlier_scheduler_is_asked_again_before_it_is_believed(post: Post) -> None:
    here = Join("a0", {}, 9, "d", "integer", None, 0, ())
    post.publish(SCHEDULER, "a", body(replace(here, to="s0"), "a", SCHEDULER), body(here, "a", SCHEDULER))
    channel = scheduler(post)
    assert channel.reports(timeout_s=0.0) == []
    assert post.left(SCHEDULER, "a") == 0
    bank = post.channel("a", adopt=False)
    bank.announce(lambda: replace(here, incarnation="a1"))
    heard: list[Any] = []

    def told(heard: list[Any]) -> list[Any]:
        return [each for each in heard if isinstance(each[1], Join)]  # beside signs of life

    post.when(lambda: heard.extend(channel.reports(timeout_s=1.0)) or told(heard), "a", Start("a1", "r"))
    bank.wait_for(lambda orders: orders.start)
    assert told(heard) == [("a", replace(here, incarnation="a1", to="s1"), False)]


# Silence ------------------------------------------------------------------------------------------------------


def test_a_worker_whose_peer_is_silent_for_too_long_says_whom_it_waited_for(post: Post) -> None:
    began = time.monotonic()
    bank = post.channel("a", patience_s=0.05)
    post.listen()
    with pytest.raises(PeerSilent, match=r"party 'a' waits for gradient 2\.0 of party 'label', .* silent for"):
        bank.receive("label", Kind.GRADIENT, MicroBatch(2, 0))
    assert time.monotonic() - began > GIVE_UP * 0.05
    assert {(w.source, w.kind, w.step, w.index) for w in post.reported(Waiting)} == {("label", Kind.GRADIENT, 2, 0)}
    seconds = [w.seconds for w in post.reported(Waiting)]
    assert seconds == sorted(seconds)


def test_a_peer_that_only_computes_for_long_is_not_silent(post: Post) -> None:
    bank, label = post.channel("a", patience_s=0.3), post.channel("label", patience_s=0.3)
    answer = Gradient(MicroBatch(0, 0), tensor(0))
    threading.Timer(0.3 * GIVE_UP * 1.2, lambda: label.send("a", answer)).start()
    assert bank.receive("label", Kind.GRADIENT, MicroBatch(0, 0)) == tensor(0)


def test_who_waits_for_whom_is_in_the_status_while_it_waits_and_a_slow_party_changes_no_weight(post: Post) -> None:
    def status() -> dict[str, Any]:
        return dict(post.reported(Status)[-1].run) if post.reported(Status) else {"parties": {}}

    class Slow(ToyStage):
        def forward(self, micro_batch: MicroBatch) -> Payload:
            if micro_batch == MicroBatch(3, 1):
                await_that(lambda: "activation 3.1 of b" in str(status()["parties"].get("label")))
            return ToyStage.forward(self, micro_batch)

    post.listen(OPERATOR)
    slow = ToyRun(
        broker=post.broker, patience_s=0.5, stage=lambda party: Slow(party) if party == "b" else ToyStage(party)
    )
    assert slow.run().weights() == ToyRun().run().weights()

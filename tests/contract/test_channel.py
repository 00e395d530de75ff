"""A party's channel over a broker: what is received and sent again, with nothing but real channels."""

import random
import threading
from dataclasses import replace

import pytest

from sl_queue.errors import (
    CheckpointError,
    LocalProtocolError,
)
from sl_queue.protocol.codec import decode
from sl_queue.protocol.control import (
    Alive,
    Lost,
    Progress,
    Start,
    Status,
    Stop,
    Waiting,
)
from sl_queue.protocol.messages import Gradient, Kind, MicroBatch
from sl_queue.transport.party_channel import PartyChannel
from tests.support.post import Post, activation, body, nothing, tensor
from tests.support.waiting import await_that

# What is received ---------------------------------------------------------------------------------------------


def test_messages_that_come_twice_and_in_any_order_are_received_once_each_by_their_key(post: Post) -> None:
    label = post.channel("label")
    bodies = [body(activation(s, i), p, "label") for s in range(4) for i in range(2) for p in ("a", "b")] * 3
    random.Random(7).shuffle(bodies)
    for published in bodies:
        post.publish("label", decode(published)[0].sender, published)
    for step in range(4):
        for index in range(2):
            for party in ("b", "a"):
                received = label.receive(party, Kind.ACTIVATION, MicroBatch(step, index))
                assert received == tensor(step, index)
    assert label.counts["applied"] == 16
    assert label.counts["duplicates"] == 32


def test_receives_are_acknowledged_after_the_checkpoint_and_not_at_all_if_it_fails(post: Post) -> None:
    label = post.channel("label")
    for step in range(3):
        post.publish("label", "a", body(activation(step), "a", "label"))
        label.receive("a", Kind.ACTIVATION, MicroBatch(step, 0))

    def no_room() -> None:
        raise OSError("disk full")

    label.commit(1, no_room)
    with pytest.raises(OSError, match="disk full"):
        label.wait_committed()
    left: list[int] = []
    label.commit(1, lambda: left.append(post.left("label", "a")))
    label.wait_committed()
    assert left == [3], "while it was saved"
    assert post.left("label", "a") == 1, "of step 2, which is not committed"


def test_while_a_commit_is_under_way_messages_are_sent_and_none_is_given_out(post: Post) -> None:
    label, bank = post.channel("label"), post.channel("a")
    post.publish("a", "label", body(Gradient(MicroBatch(2, 0), tensor(2)), "label", "a"))
    on_disk, received = threading.Event(), threading.Event()
    bank.commit(1, lambda: await_that(on_disk.is_set))
    bank.send("label", activation(2))
    assert label.receive("a", Kind.ACTIVATION, MicroBatch(2, 0)) == tensor(2, 0)

    def receive() -> None:
        bank.receive("label", Kind.GRADIENT, MicroBatch(2, 0))
        received.set()

    receiver = threading.Thread(target=receive)
    receiver.start()
    await_that(lambda: bank.counts["applied"] == 1)
    assert not received.wait(0.1)
    on_disk.set()
    assert received.wait(10.0)
    receiver.join()


def test_who_waits_for_a_message_hears_at_once_that_the_commit_failed(post: Post) -> None:
    bank = post.channel("a")
    waits = threading.Event()

    def no_room() -> None:
        await_that(waits.is_set)
        raise CheckpointError("no room")

    bank.commit(1, no_room)
    threading.Timer(0.05, waits.set).start()
    with pytest.raises(CheckpointError, match="no room"):
        bank.receive("label", Kind.GRADIENT, MicroBatch(2, 0))


@pytest.mark.parametrize(
    ("queue", "published", "reason"),
    [
        pytest.param("a", b"", "not a message of sl_queue", id="nothing"),
        pytest.param("a", b"GET / HTTP/1.1\r\n\r\n", "not a message of sl_queue", id="another protocol"),
        pytest.param("a", body(activation(0), "a", "label")[:-1], "truncated or padded", id="truncated"),
        pytest.param("a", body(activation(0), "b", "label"), "says it is from 'b', but came from 'a'", id="forged"),
        pytest.param("a", body(activation(0), "a", "b"), "is for 'b', but came to 'label'", id="misdirected"),
        pytest.param("scheduler", body(activation(0), "scheduler", "label"), "who sends none", id="no peer"),
        pytest.param("a", body(Stop("label1", "no"), "a", "label"), "only the scheduler commands", id="command"),
        pytest.param("a", body(Progress("a1", 1, 0, ()), "a", "label"), "not meant for a party", id="report"),
        pytest.param("scheduler", body(Status({}), "scheduler", "label"), "not meant for a party", id="status"),
        pytest.param("a", body(Alive("a1"), "b", "label"), "says it is from 'b', but came from 'a'", id="sign of life"),
    ],
)
def test_what_is_not_for_this_party_goes_to_the_dead_letters_and_what_is_comes_through(
    post: Post, queue: str, published: bytes, reason: str
) -> None:
    label = post.channel("label")
    post.publish("label", queue, published)
    ((party, why, dead),) = post.broker.dead_letters
    assert (party, dead) == ("label", published)
    assert reason in why
    assert label.counts["rejected"] == 1
    post.publish("label", "a", body(activation(0), "a", "label"))
    assert label.receive("a", Kind.ACTIVATION, MicroBatch(0, 0)) == tensor(0, 0)


def test_a_message_of_the_next_generation_waits_until_that_is_adopted(post: Post) -> None:
    label = post.channel("label")
    post.publish("label", "a", body(activation(0), "a", "label", generation=2))
    assert (post.left("label", "a"), post.broker.dead_letters) == (1, [])
    label.enter(Start("label1", "r", (-1, -1)), -1)
    assert label.receive("a", Kind.ACTIVATION, MicroBatch(0, 0)) == tensor(0, 0)


def test_what_came_before_the_start_is_received_after_it(post: Post) -> None:
    label = post.channel("label", adopt=False)
    post.publish("label", "a", body(activation(0), "a", "label"), body(activation(0), "a", "label", run="old"))
    label.enter(Start("label1", "r", (-1,)), -1)
    assert label.receive("a", Kind.ACTIVATION, MicroBatch(0, 0)) == tensor(0, 0)
    assert (label.counts["stale"], post.broker.dead_letters) == (1, [])


def test_nothing_is_sent_before_a_run_is_adopted(post: Post) -> None:
    with pytest.raises(LocalProtocolError, match="before it entered a run"):
        post.channel("a", adopt=False).send("label", activation(0))


# What is sent again -------------------------------------------------------------------------------------------


def waiting(step: int, kind: Kind = Kind.GRADIENT) -> Waiting:
    return Waiting("a1", 1, "label", kind, step, 0, 1.5, 0.1)


def sent_to_a(post: Post) -> list[MicroBatch]:
    ready = post.broker.queue("a", "label").ready
    told = [decode(message.body) for message in ready]
    return [header.micro_batch for header, message in told if isinstance(message, Gradient)]


def gradients(label: PartyChannel, *steps: int) -> None:
    for step in steps:
        for party in ("a", "b"):
            label.send(party, Gradient(MicroBatch(step, 0), tensor(step)))


def test_who_waits_gets_what_it_waits_for_again_and_all_after_it_in_order(post: Post) -> None:
    label = post.channel("label")
    gradients(label, 0, 1, 2)
    post.broker.queue("a", "label").ready.clear()
    post.publish("label", "a", body(waiting(1), "a", "label"))
    assert sent_to_a(post) == [MicroBatch(1, 0), MicroBatch(2, 0)]


def test_what_is_asked_for_and_no_longer_kept_is_told_to_the_scheduler_as_lost(post: Post) -> None:
    label = post.channel("label")
    post.listen()
    gradients(label, 0, 1, 2)
    post.publish("label", "a", body(Alive("a1"), "a", "label", committed=1))
    post.publish("label", "a", body(waiting(1), "a", "label"), body(waiting(7), "a", "label"))
    assert post.reported(Lost) == [Lost("label1", 1, "a", Kind.GRADIENT, 1, 0, 1.5)]


@pytest.mark.parametrize(
    "question",
    [
        pytest.param(body(waiting(0), "b", "label"), id="sender"),
        pytest.param(body(waiting(0), "a", "label", run="q"), id="run"),
        pytest.param(body(waiting(0), "a", "label", generation=0), id="older generation"),
        pytest.param(body(waiting(0), "a", "label", generation=2), id="newer generation"),
    ],
)
def test_a_question_of_another_sender_run_or_generation_is_not_answered(post: Post, question: bytes) -> None:
    label = post.channel("label")
    post.listen()
    gradients(label, 0)
    post.broker.queue("a", "label").ready.clear()
    post.publish("label", "a", question)
    assert sent_to_a(post) == []
    assert post.reported(Lost) == []


def test_no_party_can_say_for_another_what_that_one_has_committed(post: Post) -> None:
    label = post.channel("label")
    post.listen()
    gradients(label, 0)
    forged = replace(activation(5), micro_batch=MicroBatch(5, 0))
    post.publish("label", "b", body(forged, "a", "label", committed=9), body(Alive("a1"), "a", "label", committed=9))
    post.broker.queue("a", "label").ready.clear()
    post.publish("label", "a", body(waiting(0), "a", "label"))
    assert sent_to_a(post) == [MicroBatch(0, 0)]
    assert label.counts["rejected"] == 2


def test_after_a_reconnect_the_newest_messages_are_sent_again_and_nothing_is_applied_twice(post: Post) -> None:
    label, bank = post.channel("label"), post.channel("a", depth=2)
    for step in range(4):
        bank.send("label", activation(step))
    label.receive("a", Kind.ACTIVATION, MicroBatch(0, 0))
    post.broker.crash()
    for step in (1, 2, 3):
        assert label.receive("a", Kind.ACTIVATION, MicroBatch(step, 0)) == tensor(step, 0)
    assert label.counts["applied"] == 4
    assert label.counts["duplicates"] == 2
    label.commit(3, nothing)
    label.wait_committed()
    assert post.left("label", "a") == 0


def test_what_a_commit_has_told_is_not_followed_by_what_was_true_before_it(post: Post) -> None:
    bank = post.channel("a")
    post.listen()
    true: list[Progress] = []
    for step in range(20):
        true += [Progress("a1", 1, step, (step - 1,), loss=0.5), Progress("a1", 1, step, (step,))]
        bank.progress(true[-2])
        bank.report(true[-1])
    await_that(lambda: len(post.reported(Progress)) == len(true))
    assert post.reported(Progress)[-1] == true[-1]

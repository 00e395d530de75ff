"""A party's channel over a broker: duplicates, strangers, garbage and silence, with nothing but real channels."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from sl_queue.errors import (
    AlignmentError,
    CheckpointError,
    LocalProtocolError,
    PeerSilent,
    RunStopped,
    TransportError,
)
from sl_queue.protocol.codec import decode, encode
from sl_queue.protocol.control import (
    Alive,
    Command,
    Join,
    Lost,
    Message,
    Open,
    Progress,
    Start,
    Status,
    Stop,
    StopRequest,
    Waiting,
    kind_of,
)
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Activation, Gradient, Header, Kind, MicroBatch, Payload
from sl_queue.protocol.party.orders import Restarted
from sl_queue.protocol.scheduler.state import GIVE_UP
from sl_queue.protocol.topology import Topology
from sl_queue.transport.link import Delivery
from sl_queue.transport.memory import MemoryBroker, MemoryLink
from sl_queue.transport.party_channel import PartyChannel
from sl_queue.transport.scheduler_channel import LinkSchedulerChannel
from tests.support.toy import ToyStage
from tests.support.toy_run import ToyRun

TOPOLOGY = Topology("label", ("a", "b"))
PATIENCE_S = 60.0  # no test waits for it


def tensor(*values: int) -> Payload:
    return Payload("int8", (len(values),), bytes(values))


def activation(step: int, index: int = 0) -> Activation:
    return Activation(MicroBatch(step, index), tensor(step, index))


def body(message: Message, sender: str, receiver: str, **changes: Any) -> bytes:
    """The message as its sender would publish it in run r, generation 1, unless something is changed."""
    where = message.micro_batch if isinstance(message, Activation | Gradient) else MicroBatch(0, 0)
    header = Header("r", 1, kind_of(message), sender, receiver, where)
    return encode(replace(header, **changes), message)


@dataclass
class Post:
    """A broker, the channels that are open at it, and what the scheduler and the operator have been sent."""

    broker: MemoryBroker = field(default_factory=MemoryBroker)
    channels: list[Any] = field(default_factory=list)
    told: list[tuple[str, Message]] = field(default_factory=list)

    def channel(self, party: str, patience_s: float = PATIENCE_S, depth: int = 2, adopt: bool = True) -> PartyChannel:
        link = self.broker.link(party, TOPOLOGY, 100)
        me = f"{party}1"
        channel = PartyChannel(link, party, TOPOLOGY, me, patience_s=patience_s, persistent=False, depth=depth)
        channel.open()
        self.channels.append(channel)
        if adopt:
            channel.enter(Start(me, "r", (-1,)), -1)
        return channel

    def listen(self, who: str = SCHEDULER) -> None:
        """Collect what is sent to the scheduler, or to the operator."""
        link = self.broker.link(who, TOPOLOGY)

        def on_delivery(delivery: Delivery) -> None:
            self.told.append((delivery.sender, decode(delivery.body)[1]))
            link.acknowledge([delivery.tag])

        link.open(on_delivery, lambda: None, lambda error: None)
        self.channels.append(link)

    def publish(self, receiver: str, sender: str, *bodies: bytes) -> None:
        for published in bodies:
            self.broker.publish(receiver, sender, published, persistent=False, expires=False)

    def command(self, party: str, command: Command) -> None:
        self.publish(party, SCHEDULER, body(command, SCHEDULER, party))

    def left(self, receiver: str, sender: str) -> int:
        """How many messages the broker still holds for that queue."""
        queue = self.broker.queue(receiver, sender)
        return len(queue.ready) + len(queue.unacknowledged)

    def reported(self, kind: type[Any]) -> list[Any]:
        return [message for _, message in list(self.told) if isinstance(message, kind)]


@pytest.fixture
def post() -> Iterator[Post]:
    post = Post()
    yield post
    for channel in post.channels:
        channel.close()


def nothing() -> None:
    """Save no checkpoint."""


def until(true: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Block until that is so."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


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
    bank.commit(1, lambda: until(on_disk.is_set))
    bank.send("label", activation(2))
    assert label.receive("a", Kind.ACTIVATION, MicroBatch(2, 0)) == tensor(2, 0)

    def receive() -> None:
        bank.receive("label", Kind.GRADIENT, MicroBatch(2, 0))
        received.set()

    receiver = threading.Thread(target=receive)
    receiver.start()
    until(lambda: bank.counts["applied"] == 1)
    assert not received.wait(0.1)
    on_disk.set()
    assert received.wait(10.0)
    receiver.join()


def test_a_link_that_fails_while_a_channel_closes_leaves_no_commit_behind(post: Post) -> None:
    class Failing(MemoryLink):
        def flush(self, timeout_s: float | None = None, mark: int | None = None) -> bool:
            if mark is None:  # as the channel closes
                raise TransportError("the connection is gone")
            return True

    link = Failing(post.broker, "a", TOPOLOGY.senders_to("a"), 100)
    bank = PartyChannel(link, "a", TOPOLOGY, "a1", patience_s=PATIENCE_S, persistent=False, depth=2)
    bank.open()
    bank.enter(Start("a1", "r", (-1,)), -1)
    saved = threading.Event()
    began = threading.Event()

    def save() -> None:
        began.set()
        time.sleep(0.2)  # a slow disk
        saved.set()

    bank.commit(1, save)
    assert began.wait(10.0)
    bank.close()
    assert saved.is_set(), "the state folder may be another worker's from now on"
    with pytest.raises(TransportError):
        link.publish("label", Kind.REPORT, "r", b"", persistent=False)


def test_who_waits_for_a_message_hears_at_once_that_the_commit_failed(post: Post) -> None:
    bank = post.channel("a")
    waits = threading.Event()

    def no_room() -> None:
        until(waits.is_set)
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
    until(lambda: len(post.reported(Progress)) == len(true))
    assert post.reported(Progress)[-1] == true[-1]


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
    for scheduler in ("s1", "s2"):
        post.publish("a", SCHEDULER, body(Alive(scheduler), SCHEDULER, "a"))
        post.publish("a", SCHEDULER, body(Alive(scheduler), SCHEDULER, "a"))
        threading.Timer(0.05, lambda: post.command("a", Open("a1", 0))).start()
        bank.wait_for(lambda orders: orders.open)
        post.command("a", Start("a1", "r", (-1,) * int(scheduler[1])))
    assert [joined.to for joined in post.reported(Join)] == ["", "s1", "s2"]


def test_who_joined_an_earlier_scheduler_is_asked_again_before_it_is_believed(post: Post) -> None:
    here = Join("a0", {}, 9, "d", "integer", None, 0, ())
    post.publish(SCHEDULER, "a", body(replace(here, to="s0"), "a", SCHEDULER), body(here, "a", SCHEDULER))
    channel = scheduler(post)
    assert channel.reports(timeout_s=0.0) == []
    assert post.left(SCHEDULER, "a") == 0
    bank = post.channel("a", adopt=False)
    bank.announce(lambda: replace(here, incarnation="a1"))
    threading.Timer(0.1, lambda: post.command("a", Start("a1", "r"))).start()
    bank.wait_for(lambda orders: orders.start)
    assert channel.reports(timeout_s=1.0) == [("a", replace(here, incarnation="a1", to="s1"), False)]


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
    bank, label = post.channel("a", patience_s=0.1), post.channel("label", patience_s=0.1)
    answer = Gradient(MicroBatch(0, 0), tensor(0))
    threading.Timer(0.1 * GIVE_UP * 1.5, lambda: label.send("a", answer)).start()
    assert bank.receive("label", Kind.GRADIENT, MicroBatch(0, 0)) == tensor(0)


def test_who_waits_for_whom_is_in_the_status_while_it_waits_and_a_slow_party_changes_no_weight(post: Post) -> None:
    def status() -> dict[str, Any]:
        return dict(post.reported(Status)[-1].run) if post.reported(Status) else {"parties": {}}

    class Slow(ToyStage):
        def forward(self, micro_batch: MicroBatch) -> Payload:
            if micro_batch == MicroBatch(3, 1):
                until(lambda: "activation 3.1 of b" in str(status()["parties"].get("label")))
            return ToyStage.forward(self, micro_batch)

    post.listen(OPERATOR)
    slow = ToyRun(
        broker=post.broker, patience_s=0.5, stage=lambda party: Slow(party) if party == "b" else ToyStage(party)
    )
    assert slow.run().weights() == ToyRun().run().weights()


# The scheduler's end ------------------------------------------------------------------------------------------


def scheduler(post: Post) -> LinkSchedulerChannel:
    channel = LinkSchedulerChannel(post.broker.link(SCHEDULER, TOPOLOGY), TOPOLOGY, "s1", patience_s=PATIENCE_S)
    channel.open()
    post.channels.append(channel)
    return channel


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


# Sabotage -----------------------------------------------------------------------------------------------------

TOTAL = 4000
QUEUES = [(receiver, sender) for receiver in (*TOPOLOGY.parties, SCHEDULER) for sender in TOPOLOGY.senders_to(receiver)]


def wrong_messages(rng: random.Random, run: ToyRun, receiver: str, sender: str) -> Iterator[bytes]:
    """What anyone with write access to a queue might put there: nothing of it is a message of that sender."""
    state = run.ledger.state
    name = state.run if state is not None and state.run is not None else "?"
    step = rng.randrange(20)
    true = {"run": name, "generation": 0, "micro_batch": MicroBatch(step, 0), "committed": 19}
    other = "b" if sender != "b" else "a"
    yield rng.randbytes(rng.randrange(200))
    yield body(activation(step), sender, receiver, **true)[:-1]
    yield body(activation(step), sender, receiver, **true) + b"\0"
    yield body(activation(step), other, receiver, **true)
    yield body(Gradient(MicroBatch(step, 0), tensor(9)), other, receiver, **true)
    yield body(activation(step), sender, receiver, **(true | {"run": "another"}))
    yield body(Stop("0", "sabotage", error="RunStopped"), other, receiver, **true)
    yield body(Lost("0", 0, "a", Kind.GRADIENT, step, 0, 1.0), other, receiver, **true)
    yield body(Alive("0"), other, receiver, **true)


def test_thousands_of_wrong_messages_into_every_queue_of_a_live_run_change_nothing() -> None:
    quiet = ToyRun(epochs=3).run()
    run = ToyRun(epochs=3)
    rng, published = random.Random(7), list[bytes]()
    last_step = run.pipeline.batches.steps - 1

    class Attacked(ToyStage):
        def forward(self, micro_batch: MicroBatch) -> Payload:
            share = TOTAL * micro_batch.step // last_step
            until(lambda: len(published) >= share if micro_batch.step < last_step else not saboteur.is_alive())
            return ToyStage.forward(self, micro_batch)

    def sabotage() -> None:
        while len(published) < TOTAL:
            for receiver, sender in QUEUES:
                for wrong in wrong_messages(rng, run, receiver, sender):
                    run.broker.publish(receiver, sender, wrong, persistent=False, expires=False)
                    published.append(wrong)

    run.stage = Attacked
    saboteur = threading.Thread(target=sabotage)
    saboteur.start()
    try:
        run.run()
    finally:
        saboteur.join()
    assert run.weights() == quiet.weights()
    assert run.state is not None
    assert run.state.generation == 0
    fates = Counter[str]()
    for counts in run.counts.values():
        fates.update(counts)
    to_parties = sum(QUEUES[n % len(QUEUES)][0] != SCHEDULER for n in range(len(QUEUES))) / len(QUEUES)
    assert fates["rejected"] + fates["stale"] >= to_parties * TOTAL * 0.95
    dead = run.broker.dead_letters
    assert Counter(letter for _, _, letter in dead) <= Counter(published), "nothing of the parties' own"
    assert all(reason for _, reason, _ in dead)
    copied = Counter(party for party, _, _ in dead)
    assert set(copied) == {SCHEDULER, *TOPOLOGY.parties} and max(copied.values()) < 100, "a few for each sender"

"""A live run into whose queues anybody writes anything."""

import random
import threading
from collections import Counter
from collections.abc import Iterator

from sl_queue.protocol.control import (
    Alive,
    Lost,
    Stop,
)
from sl_queue.protocol.messages import SCHEDULER, Gradient, Kind, MicroBatch, Payload
from tests.support.post import TOPOLOGY, activation, body, tensor
from tests.support.toy import ToyStage
from tests.support.toy_run import ToyRun
from tests.support.waiting import await_that

TOTAL = 4000
QUEUES = [(receiver, sender) for receiver in (*TOPOLOGY.parties, SCHEDULER) for sender in TOPOLOGY.senders_to(receiver)]


def wrong_messages(rng: random.Random, run: ToyRun, receiver: str, sender: str) -> Iterator[bytes]:
    """Yield what anyone with write access to a queue might put there: nothing of it is a message of that sender."""
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
            await_that(lambda: len(published) >= share if micro_batch.step < last_step else not saboteur.is_alive())
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

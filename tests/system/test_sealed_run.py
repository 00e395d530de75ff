"""A run whose messages are sealed ends with the same weights, whatever the broker does to them and whoever crashes."""

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from sl_queue.errors import AlignmentError
from sl_queue.protocol.codec import encode
from sl_queue.protocol.control import StopRequest
from sl_queue.protocol.messages import OPERATOR, SCHEDULER, Header, Kind, MicroBatch
from sl_queue.security.hpke import Cipher
from sl_queue.security.keys import PrivateKey
from sl_queue.security.sealing import Seal
from sl_queue.transport.memory import MemoryBroker
from tests.support.toy_run import CrashAt, ToyRun

OWN = {name: PrivateKey.generate(signs=name == SCHEDULER) for name in ("a", "b", "label", SCHEDULER, OPERATOR)}
PUBLIC = {name: key.public for name, key in OWN.items()}


CIPHER = Cipher.AES_256_GCM


def seal_of(role: str) -> Seal:
    return Seal(role, OWN[role], PUBLIC, CIPHER)


class Operator(MemoryBroker):
    """Runs the broker, knows every message that ever passed, and means harm."""

    def __init__(self, seed: int, often: float, seen: Sequence[tuple[str, str, bytes]] = ()) -> None:
        super().__init__()
        self.seen = list(seen)
        self.tampered: Counter[str] = Counter()
        self._often, self._random, self._choosing = often, random.Random(seed), threading.Lock()
        self._held_back: list[tuple[str, str, bytes]] = []

    def publish(self, receiver: str, sender: str, body: bytes, *, persistent: bool, expires: bool) -> None:
        with self._choosing:
            forwarded = self._tamper(receiver, sender, body)
            self.seen.append((receiver, sender, body))
        for to, by, what in forwarded:
            super().publish(to, by, what, persistent=persistent, expires=expires)

    def _tamper(self, receiver: str, sender: str, body: bytes) -> list[tuple[str, str, bytes]]:
        """Return what is put into the queues instead of this message, or with it.

        Nothing is withheld from the scheduler for good: who loses what it had confirmed has stopped the run, sealed or
        not. Of what parties tell each other some is replaced.
        """
        original = (receiver, sender, body)
        if self._random.random() > self._often or not self.seen:
            return [original]
        trick = self._random.choice(["edit", "cut", "replay", "reroute", "pretend", "hold back", "release"])
        self.tampered[trick] += 1
        to, by, what = self._random.choice(self.seen)
        kept = [original] if SCHEDULER in (receiver, sender) or self._random.random() < 0.5 else []
        match trick:
            case "edit":
                edited = bytearray(body)
                edited[self._random.randrange(len(body))] ^= self._random.randint(1, 255)
                return [*kept, (receiver, sender, bytes(edited))]
            case "cut":
                return [(receiver, sender, body[: self._random.randrange(len(body))]), *kept]
            case "replay":
                return [original, (to, by, what)]
            case "reroute":
                return [original, (receiver, by, what)]
            case "pretend":
                return [original, (to, sender, what)]
            case "hold back":
                self._held_back.append(original)
                return kept
            case _:
                released, self._held_back = self._held_back, []
                self._random.shuffle(released)
                return [original, *released]


def run(broker: MemoryBroker, patience_s: float = 0.6, **changes: Any) -> ToyRun:
    return ToyRun(epochs=3, n_rows=60, checkpoint_every=3, patience_s=patience_s, broker=broker, **changes)


@pytest.fixture(scope="module")
def quiet() -> ToyRun:
    return run(MemoryBroker()).run()


@pytest.mark.parametrize("seed", range(8))
def test_a_broker_that_edits_replays_reorders_and_swaps_changes_no_weight_and_stops_no_run(
    quiet: ToyRun, seed: int
) -> None:
    broker = Operator(seed, often=0.4)
    sealed = run(broker, seal_of=seal_of).run()
    assert broker.tampered.total() >= 125 and len(broker.tampered) == 7, broker.tampered
    assert sealed.weights() == quiet.weights()
    assert [e.loss for e in sealed.state.history] == [e.loss for e in quiet.state.history]
    assert sealed.state.generation == 0, "somebody was sent back"


@pytest.mark.parametrize("victim", ["a", "label", SCHEDULER])
def test_nor_does_it_when_a_worker_is_restarted_at_any_moment(quiet: ToyRun, victim: str) -> None:
    operations = CrashAt()
    run(MemoryBroker(), crashes={victim: operations}).run()
    for seed, operation in enumerate(range(2, operations.count, operations.count // 5)):
        broker = Operator(seed, often=0.2)
        crashed = run(broker, seal_of=seal_of, crashes={victim: CrashAt(operation)}).run()
        assert crashed.weights() == quiet.weights(), operation


def test_nothing_that_was_said_in_an_earlier_run_with_the_same_keys_counts_in_this_one(quiet: ToyRun) -> None:
    earlier = Operator(0, often=0.0)
    run(earlier, seal_of=seal_of).run()
    again = Operator(1, often=0.0)
    for receiver, sender, body in earlier.seen:
        again.publish(receiver, sender, body, persistent=True, expires=False)
    repeated = run(again, seal_of=seal_of).run()
    assert repeated.weights() == quiet.weights()
    assert repeated.state.generation == 0


def test_the_brokers_operator_cannot_stop_a_run(quiet: ToyRun) -> None:
    broker = Operator(0, often=0.0)
    request = encode(Header("", 0, Kind.REPORT, OPERATOR, SCHEDULER, MicroBatch(0, 0)), StopRequest("s"))
    stolen = Seal(OPERATOR, (key := PrivateKey.generate(signs=False)), {**PUBLIC, OPERATOR: key.public}, CIPHER)
    for body in (request, stolen.seal(SCHEDULER, request)):
        broker.publish(SCHEDULER, OPERATOR, body, persistent=True, expires=False)
    sealed = run(broker, seal_of=seal_of).run()
    assert sealed.weights() == quiet.weights() and sealed.state.phase == "finished"
    assert len(broker.dead_letters) == 2


def test_the_same_broker_does_change_weights_that_are_not_sealed(quiet: ToyRun) -> None:
    """The attack is real: this is what the seal is for."""

    class Editor(MemoryBroker):
        def publish(self, receiver: str, sender: str, body: bytes, *, persistent: bool, expires: bool) -> None:
            if sender == "a" and receiver == "label" and not expires:
                body = body[:-1] + bytes([body[-1] ^ 1])
            super().publish(receiver, sender, body, persistent=persistent, expires=expires)

    assert run(Editor()).run().weights() != quiet.weights()


@pytest.mark.parametrize("receiver", ["a", "label", SCHEDULER])
def test_what_the_brokers_operator_puts_in_before_anybody_has_spoken_stops_no_run(quiet: ToyRun, receiver: str) -> None:
    """Somebody starts late, later than patience: till then nothing but rubbish came in his name."""
    broker = MemoryBroker()
    for sender in ToyRun.topology.senders_to(receiver):
        broker.publish(receiver, sender, b"rubbish", persistent=True, expires=False)
    late = ToyRun.topology.senders_to(receiver)[0]
    sealed = run(broker, seal_of=seal_of, patience_s=0.3, on_start=lambda role, _: role == late and time.sleep(1.0))
    assert sealed.run().weights() == quiet.weights()
    assert len(broker.dead_letters) >= 1


@pytest.mark.parametrize("stranger", ["a", SCHEDULER])
def test_parties_whose_jobs_list_different_keys_are_told_so(stranger: str) -> None:
    other = {**PUBLIC, "label": PrivateKey.generate(signs=False).public, SCHEDULER: PUBLIC["label"], "a": PUBLIC["b"]}

    def keys(role: str) -> Seal:
        return Seal(role, OWN[role], {**other, role: PUBLIC[role]} if role == stranger else PUBLIC, CIPHER)

    with pytest.raises(AlignmentError, match=r"no message of .* can be opened.*\[security\]"):
        run(MemoryBroker(), patience_s=0.2, seal_of=keys).run()

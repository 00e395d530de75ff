"""The table of effects says what the real loops do: every message and every piece of work, in this order."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from hypothesis import given, settings

from sl_queue.loops.lifecycle import Identity, Worker
from sl_queue.loops.training import FeatureParty, LabelHolder
from sl_queue.protocol.control import Open
from sl_queue.protocol.messages import Activation, Gradient, Kind, MicroBatch, Payload
from sl_queue.protocol.party.orders import Orders
from sl_queue.protocol.schedule.actions import EFFECTS, Action, Begin, Commit, Update
from sl_queue.protocol.schedule.pipeline import Pipeline
from tests.pure.test_pipeline import pipelines
from tests.support.toy import MemoryCheckpoints, ToyStage, payload

PEERS = ("a", "b")
DATA = (Kind.ACTIVATION, Kind.HOLDOUT, Kind.GRADIENT)
Deed = tuple[str, str, MicroBatch | int]  # what, of or to whom or which work, key


@dataclass(slots=True)
class Recorder:
    """ports.Channel whose peers have always sent what is awaited; writes down what it is asked for."""

    deeds: list[Deed] = field(default_factory=list)

    def send(self, receiver: str, message: Activation | Gradient) -> None:
        self.deeds.append((f"send {message.kind}", receiver, message.micro_batch))

    def receive(self, sender: str, kind: Kind, micro_batch: MicroBatch) -> Payload:
        self.deeds.append((f"await {kind}", sender, micro_batch))
        return payload(sender, kind, micro_batch)

    def commit(self, step: int, save: Callable[[], None]) -> None:
        self.deeds.append(("work", "commit", step))
        save()

    def wait_for(self, decision: Callable[[Orders], Any]) -> Any:
        return decision(Orders(open=Open("s", through=1_000_000)))

    def wait_committed(self) -> None:
        pass

    def report(self, report: Any) -> None:
        pass

    def progress(self, report: Any) -> None:
        pass


@dataclass(slots=True)
class RecordingStage(ToyStage):
    """Writes down its work where the channel writes down messages."""

    deeds: list[Deed] = field(default_factory=list)
    step: int = 0

    def prepare(self, micro_batch: MicroBatch) -> None:
        self.deeds.append(("work", "prepare", micro_batch))
        ToyStage.prepare(self, micro_batch)

    def forward(self, micro_batch: MicroBatch) -> Payload:
        self.deeds.append(("work", "forward", micro_batch))
        return ToyStage.forward(self, micro_batch)

    def backward(self, micro_batch: MicroBatch, gradient: Payload) -> None:
        self.deeds.append(("work", "backward", micro_batch))
        ToyStage.backward(self, micro_batch, gradient)

    def forward_backward(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> Mapping[str, Payload]:
        self.deeds.append(("work", "fuse", micro_batch))
        return ToyStage.forward_backward(self, micro_batch, activations)

    def predict(self, micro_batch: MicroBatch) -> Payload:
        self.deeds.append(("work", "predict", micro_batch))
        return ToyStage.predict(self, micro_batch)

    def evaluate(self, micro_batch: MicroBatch, activations: Mapping[str, Payload]) -> None:
        self.deeds.append(("work", "score", micro_batch))
        ToyStage.evaluate(self, micro_batch, activations)

    def update(self) -> float:
        self.deeds.append(("work", "update", self.step))
        self.step += 1
        return ToyStage.update(self)


def done(party: str, pipeline: Pipeline) -> list[Deed]:
    """Everything that the real loop of a role does."""
    channel = Recorder()
    stage = RecordingStage(party, deeds=channel.deeds)
    identity = Identity("i", {}, pipeline.batches.n_rows, "digest", "integer")
    worker = Worker(identity, channel, stage, MemoryCheckpoints(), pipeline, run="r")  # type: ignore[arg-type]
    if party == "label":
        LabelHolder(PEERS, channel, stage, pipeline, worker).train(0)  # type: ignore[arg-type]
    else:
        FeatureParty("label", channel, stage, pipeline, worker).train(0)  # type: ignore[arg-type]
    return channel.deeds


def said(actions: Iterable[Action], peers: tuple[str, ...]) -> Iterator[Deed]:
    """Everything that the table says of these actions."""
    for action in actions:
        if isinstance(action, Begin):
            continue
        effect, key = EFFECTS[type(action)], action.step if isinstance(action, Update | Commit) else action.micro_batch
        if effect.awaits is not None:
            yield from ((f"await {effect.awaits}", peer, key) for peer in peers)
        if effect.work is not None:
            yield "work", effect.work, key
        if effect.sends is not None:
            yield from ((f"send {effect.sends}", peer, key) for peer in peers)


@given(pipelines())
@settings(deadline=None, max_examples=60)
def test_the_loops_do_what_the_table_of_effects_says_and_nothing_else(pipeline: Pipeline) -> None:
    assert done("a", pipeline) == list(said(pipeline.feature_actions(0), ("label",)))
    assert done("label", pipeline) == list(said(pipeline.label_actions(0), PEERS))


def test_every_action_has_an_effect_and_what_one_role_sends_the_other_awaits() -> None:
    assert set(EFFECTS) == set(get_args(Action))
    assert {e.sends for e in EFFECTS.values()} == {e.awaits for e in EFFECTS.values()} == {*DATA, None}

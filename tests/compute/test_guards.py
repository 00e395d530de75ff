"""Defences and taps put in at the cut: in training, evaluation and recovery, and what they must not do."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sl_queue.cut.crossing import from_payload
from sl_queue.cut.guard import Crossing, Guard
from sl_queue.errors import ComputeError, LocalProtocolError, NonFiniteError, ShapeError
from sl_queue.protocol.messages import MicroBatch
from tests.support.resolved import base_stage, fuse_stage
from tests.support.split import Concatenated, Parties, Stages, equal_weights, parties
from tests.support.toy_run import CrashAt, ToyRun

ROWS = 22  # as ToyRun has them
Key = tuple[str, str, str, MicroBatch, bool]


@dataclass(frozen=True)
class KeyedNoise:
    """Noise that a secret, the micro-batch and its rows decide."""

    secret: bytes
    scale: float = 0.5

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        about = repr((crossing.what, crossing.micro_batch, crossing.rows.held_out)).encode() + crossing.rows.digest
        seed = int.from_bytes(blake2b(about, key=self.secret, digest_size=7).digest())
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=tensor.dtype)
        return tensor + self.scale * noise


@dataclass
class Album:
    """Keeps a copy of all that it is shown."""

    seen: dict[Key, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def see(self, tensor: Tensor, crossing: Crossing) -> None:
        key = (crossing.what, crossing.sender, crossing.receiver, crossing.micro_batch, crossing.rows.held_out)
        assert len(tensor) == len(crossing.rows.keys)
        self.seen[key].append(tensor.clone())

    def once(self) -> dict[Key, Tensor]:
        """Return what was shown, which must be the same however often."""
        assert all(torch.equal(each, tensors[0]) for tensors in self.seen.values() for each in tensors)
        return {key: tensors[0] for key, tensors in self.seen.items()}


def made(**job: Any) -> Parties:
    """Two feature parties and a label holder, as ToyRun has them."""
    torch.manual_seed(3)
    generator = np.random.default_rng(3)
    features = {party: generator.normal(size=(ROWS, 5)).astype(np.float32) for party in ("a", "b")}
    labels = generator.integers(0, 2, size=ROWS).astype(np.float32)
    bases = {party: nn.Sequential(nn.Linear(5, 4), nn.ReLU()) for party in features}
    settings: dict[str, Any] = {"batch_size": 4, "holdout": 0.2, "pipeline": {"micro_batches": 2, "depth": 2}} | job
    cuts = {party: [4] for party in features}
    return parties(bases, Concatenated(8, 1), features, labels, cuts=cuts, label_holder="label", **settings)


@dataclass
class Guarded:
    """Guards of all parties, and what their taps saw."""

    defended: bool = True
    parties: Parties = field(default_factory=lambda: made())  # drawn once: workers are threads
    left: Album = field(default_factory=Album)
    arrived: Album = field(default_factory=Album)

    def guard(self, party: str) -> Guard:
        defence = KeyedNoise(party.encode()) if self.defended else None
        return Guard(defence, self.left, self.arrived)

    def stage(self, party: str) -> Any:
        """Return a new stage, as a worker that starts again has one."""
        job, file, table = self.parties.job, self.parties.files[party], self.parties.tables[party]
        batches = job.batches(ROWS)
        if party == "label":
            guards = {peer: self.guard(party) for peer in job.feature_parties}
            return fuse_stage(job, file, table, batches, guards=guards)
        return base_stage(job, file, table, batches, guard=self.guard(party))

    def run(self, **crashes: int) -> dict[str, Any]:
        """Return the final weights of a run over a broker in memory, in which these parties crash once."""
        run = ToyRun(stage=self.stage, crashes={party: CrashAt(at) for party, at in crashes.items()}, patience_s=20.0)
        return run.run().weights()


def test_what_leaves_is_defended_in_training_and_evaluation_and_arrives_as_it_left() -> None:
    defended, plain = Guarded(), Guarded(defended=False)
    weights, others = defended.run(), plain.run()
    left, arrived = defended.left.once(), defended.arrived.once()
    assert left.keys() == arrived.keys()
    assert all(torch.equal(left[key], arrived[key]) for key in left)
    batches = made().job.batches(ROWS)
    training = {MicroBatch(s, i) for s in range(batches.steps) for i in range(batches.parts(s))}
    held_out = {MicroBatch(batches.last_step(e), i) for e in range(2) for i in range(batches.holdout_parts)}
    assert left.keys() == {
        *(("activation", party, "label", m, False) for party in "ab" for m in training),
        *(("gradient", "label", party, m, False) for party in "ab" for m in training),
        *(("activation", party, "label", m, True) for party in "ab" for m in held_out),
    }
    first = ("activation", "a", "label", MicroBatch(0, 0), False)
    assert (plain.left.once()[first] == 0).any(), "a ReLU's zeros"
    noise = left[first] - plain.left.once()[first]  # of the same initial weights
    assert 0.1 < float(noise.std()) < 1.0
    assert not (left[first] == 0).any()
    assert weights != others


def test_taps_change_no_weight() -> None:
    plain = made().stages().train(made().pipeline)
    tapped = Guarded(defended=False).run()
    found = {party: from_payload(tapped[party]["base"]["0.weight"]) for party in "ab"}
    assert all(torch.equal(found[party], plain.bases[party].module[0].weight) for party in "ab")  # type: ignore[index]


@pytest.mark.parametrize("victim", ["a", "label"])
def test_a_replayed_crossing_has_the_bits_of_the_first_wherever_a_party_crashed(victim: str) -> None:
    quiet = Guarded()
    weights = quiet.run()
    replayed = 0
    for operation in range(5, 75, 14):
        again = Guarded(parties=quiet.parties)
        assert again.run(**{victim: operation}) == weights, operation
        assert all(torch.equal(tensor, quiet.left.once()[key]) for key, tensor in again.left.once().items())
        replayed += any(len(tensors) > 1 for tensors in again.left.seen.values())
    assert replayed, "no crash made anything leave twice"


# What they must not do ------------------------------------------------------------------------------------------


class InPlace:
    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        return tensor.mul_(2)

    def see(self, tensor: Tensor, crossing: Crossing) -> None:
        tensor.mul_(2)


class Cropped:
    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        return tensor[:, :2]


class Wider:
    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        return tensor.double()


class Divided:
    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        return tensor / 0


@pytest.mark.parametrize(
    ("guard", "error", "said"),
    [
        (Guard(InPlace()), ComputeError, "the defence InPlace changes the activation in place"),
        (Guard(leaving=InPlace()), ComputeError, "the tap InPlace changes the activation in place"),
        (Guard(Cropped()), ShapeError, r"the defence Cropped returns float32 \(2, 2\) for float32 \(2, 4\)"),
        (Guard(Wider()), ShapeError, r"the defence Wider returns float64 \(2, 4\)"),
        (Guard(Divided()), NonFiniteError, "the defence Divided returns NaN or infinity"),
    ],
)
def test_a_defence_or_tap_that_breaks_its_contract_is_named(guard: Guard, error: type[Exception], said: str) -> None:
    run = made()
    stage = base_stage(run.job, run.files["a"], run.tables["a"], run.job.batches(ROWS), guard=guard)
    with pytest.raises(error, match=f"party 'a', micro-batch 0.0: {said}"):
        stage.forward(MicroBatch(0, 0))


class FirstTwoOnly:
    """Makes zeros of values that a ReLU has let through."""

    def apply(self, tensor: Tensor, crossing: Crossing) -> Tensor:
        return torch.cat([tensor[:, :2], torch.zeros_like(tensor[:, 2:])], dim=1)


def test_zeros_that_a_defence_makes_ask_for_their_gradients_all_the_same() -> None:
    plain, bitmap = (trained(Guard(FirstTwoOnly()), wire) for wire in ({}, {"compress": "bitmap"}))
    assert all(equal_weights(plain.modules()[name], bitmap.modules()[name]) for name in plain.modules())


def trained(guard: Guard, wire: Mapping[str, str]) -> Stages:
    run = made(wire=wire)
    stages = run.stages()
    for stage in stages.bases.values():
        stage.cut.guard = guard
    return stages.train(run.pipeline)


def test_a_gradient_of_an_activation_that_never_left_is_refused() -> None:
    stages = made().stages()
    base, first = stages.bases["a"], MicroBatch(0, 0)
    activations = {party: stage.forward(first) for party, stage in stages.bases.items()}
    gradients = stages.fuse.forward_backward(first, activations)
    rows = base._in_flight[first].rows
    assert base.cut.arrive(gradients["a"], first, rows) is not None
    with pytest.raises(LocalProtocolError, match="a gradient of an activation that never left"):
        base.cut.arrive(gradients["a"], first, rows)
    with pytest.raises(LocalProtocolError, match="a gradient of no activation of 'a'"):
        stages.fuse.cuts["a"].leave(None, first, rows)

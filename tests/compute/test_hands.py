"""Stages over hands: however many there are, and whoever is lost, not one bit differs."""

from itertools import count, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sl_queue.compute.hand import models_of, payloads
from sl_queue.compute.separate import separate
from sl_queue.cut.crossing import from_payload
from sl_queue.errors import JobError
from sl_queue.protocol.hands import Call
from sl_queue.protocol.messages import MicroBatch, Payload
from tests.support.hands import Crew, spread, workshop
from tests.support.split import Concatenated, Parties, Stages, equal_weights, parties

ADAM = {"name": "adam", "lr": 0.01}


def base(normalised: bool = True) -> nn.Module:
    norms = [nn.BatchNorm1d(8), nn.BatchNorm1d(5, momentum=None)] if normalised else [nn.Identity(), nn.Identity()]
    return nn.Sequential(nn.Linear(4, 8), norms[0], nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 5), norms[1])


def made(left: nn.Module | None = None, *, own_base: bool = True, **job: Any) -> Parties:
    rng = np.random.default_rng(0)
    rows = 118
    with_base = ("left", "holder") if own_base else ("left",)
    fuse = nn.Sequential(
        Concatenated(5 * len(with_base), 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 1)
    )
    features = {party: rng.standard_normal((rows, 4)).astype(np.float32) for party in with_base}
    labels = (features["left"][:, 0] > 0).astype(np.int64)
    settings: dict[str, Any] = {"batch_size": 20, "holdout": 0.2, "epochs": 3, "optimizer": ADAM, "metrics": ["auroc"]}
    cuts = {party: [5] for party in with_base}
    bases = {"left": left or base(), **({"holder": base()} if own_base else {})}
    return parties(bases, fuse, features, labels, cuts=cuts, **settings | job)


class Waiting(Stages):
    """Stages of which some are over hands: the label holder's answers come when they come."""

    def answer(self, micro_batch: MicroBatch, gradients: dict[str, Payload]) -> None:
        self.under_way |= {("gradient", party, micro_batch): g for party, g in gradients.items()}

    def _feature(self, party: str, *how: Any) -> Any:
        for wait in Stages._feature(self, party, *how):
            getattr(self.fuse, "deliver", lambda: None)()
            yield wait


def over_hands(of: Parties, hands: int, loss: float, who: tuple[str, ...], own: bool = False) -> tuple[Any, int]:
    """Train with hands at these parties; returns the stages, and how many hands were lost."""
    whole, pipeline = of.stages(), of.pipeline
    stages: Any = Waiting(dict(whole.bases), whole.fuse)
    crews = []
    for party in who:
        build: Any = (lambda: of.stages().bases["left"]) if party == "left" else (lambda: of.stages().fuse)
        crew = Crew(build, loss)
        for _ in range(hands):
            crew.join()
        lead = crew.lead(own)
        if party == "left":
            stages.bases["left"] = spread(whole.bases["left"], lead, pipeline)
        else:
            stages.fuse = spread(whole.fuse, lead, pipeline, stages.answer)
        crews.append((crew, lead))
    stages.train(pipeline)
    for crew, lead in crews:
        crew.loss = 0.0
        lead.close()
        crew.await_end()
    whole.losses, whole.evaluations = stages.losses, stages.evaluations
    return whole, sum(crew.lost for crew, _ in crews)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize(
    ("hands", "loss", "own"),
    [(0, 0.0, True), (1, 0.0, False), (2, 0.0, False), (3, 0.0, True), (3, 0.02, False), (4, 0.0, False)],
)
def test_hands_change_no_bit(hands: int, loss: float, own: bool, staleness: int) -> None:
    pipeline = {"micro_batches": 5, "depth": 5 * (staleness + 1), "staleness": staleness, "checkpoint_every": 3}
    of = made(pipeline=pipeline)
    plain = of.stages().train(of.pipeline)
    alone = [("left",), ("holder",)] if hands == 1 else []  # beside a party without hands; the rest is no other there
    for who in (*alone, ("left", "holder")):
        with_hands, lost = over_hands(of, hands, loss, who, own)
        assert with_hands.losses == plain.losses
        assert with_hands.evaluations == plain.evaluations
        for name, module in plain.modules().items():
            assert equal_weights(module, with_hands.modules()[name]), (who, name)
        assert bool(lost) == bool(loss)


SIZES = {0: 1, 3: 4, 6: 2, 9: 0, 12: 3}  # hands of the feature party after so many steps


def test_hands_that_come_and_go_in_mid_run_change_no_bit() -> None:
    of = made(pipeline={"micro_batches": 5, "depth": 5, "checkpoint_every": 3})
    plain, stages = of.stages().train(of.pipeline), of.stages()
    crew, steps = Crew(lambda: of.stages().bases["left"]), count(1)
    crew.resize(SIZES[0])
    lead, whole = crew.lead(own=True), stages.bases["left"]
    stage = spread(whole, lead, of.pipeline)

    class Resized:
        """A stage whose hands come and go after its steps."""

        def __getattr__(self, name: str) -> Any:
            return getattr(stage, name)

        def update(self) -> None:
            stage.update()
            if (size := SIZES.get(next(steps))) is not None:
                crew.resize(size)

    seen = Stages({"left": Resized()}, stages.fuse).train(of.pipeline)  # type: ignore[dict-item]
    lead.close()
    for thread in crew.threads[-SIZES[12] :]:  # the others are gone without a word
        thread.join(10)
    assert next(steps) > max(SIZES) and len(crew.threads) == 7
    seen.bases["left"] = whole
    assert (seen.losses, seen.evaluations) == (plain.losses, plain.evaluations)
    for name, module in plain.modules().items():
        assert equal_weights(module, seen.modules()[name]), name


@pytest.mark.parametrize("wire", [{"dtype": "float16"}, {"compress": "bitmap"}])
def test_what_is_packed_at_the_cut_is_packed_alike(wire: dict[str, str]) -> None:
    of = made(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), wire=wire, pipeline={"micro_batches": 3, "depth": 3})
    plain = of.stages().train(of.pipeline)
    with_hands, _ = over_hands(of, 2, 0.0, ("left", "holder"))
    assert with_hands.losses == plain.losses
    for name, module in plain.modules().items():
        assert equal_weights(module, with_hands.modules()[name]), name


def test_hands_of_a_label_holder_without_columns_change_no_bit() -> None:
    of = made(own_base=False, pipeline={"micro_batches": 5, "depth": 5, "checkpoint_every": 3})
    plain = of.stages().train(of.pipeline)
    with_hands, lost = over_hands(of, 3, 0.02, ("left", "holder"))
    assert (with_hands.losses, with_hands.evaluations) == (plain.losses, plain.evaluations) and lost
    for name, module in plain.modules().items():
        assert equal_weights(module, with_hands.modules()[name]), name


Said = tuple[dict[str, Any], dict[str, bytes]]


def said(outcome: tuple[dict[str, Any], dict[str, Payload]] | None) -> Said | None:
    return None if outcome is None else (outcome[0], {name: bytes(p.data) for name, p in outcome[1].items()})


@pytest.mark.parametrize("own_base", [False, True])
def test_a_task_that_comes_again_at_any_of_its_calls_has_the_same_results(own_base: bool) -> None:
    of = made(own_base=own_base)
    stages, part = of.stages(), MicroBatch(0, 0)
    hand = workshop(lambda: of.stages().fuse)
    shared = {f"{m.part}/{name}": tensor for m in models_of(hand.stage) for name, tensor in m.shared().items()}
    hand.equip(1, payloads(shared), 1, 0)
    arrived = payloads({"left": from_payload(stages.bases["left"].forward(part))})
    calls = [*(["prepare"] if own_base else []), "fuse", "learn"]

    def done(task: int, what: str) -> Said | None:
        return said(hand.do(Call("", task, what, part, 1, arrived if what == "fuse" else {})))

    expected = {what: done(0, what) for what in calls}
    assert None not in expected.values()
    for task, before in enumerate(product(calls, repeat=3), start=1):
        for what in before:  # by claims that came to nothing, tickets that were dealt twice, whatever
            assert done(task, what) in (expected[what], *([None] if what == "learn" else []))
        assert {what: done(task, what) for what in calls} == expected, before


def test_hands_draw_with_the_secret_of_their_party() -> None:
    of = made(pipeline={"micro_batches": 3, "depth": 3})
    plain, private, crew = of.stages(), of.stages(), Crew(lambda: of.stages().bases["left"])
    plain.bases["left"].model.secret = b"s" * 32
    crew.join()
    lead = crew.lead(secret=b"s" * 32)
    stage = spread(private.bases["left"], lead, of.pipeline)
    first = MicroBatch(0, 0)
    assert bytes(stage.forward(first).data) == bytes(plain.bases["left"].forward(first).data)
    assert bytes(stage.forward(MicroBatch(0, 1)).data) != bytes(
        of.stages().bases["left"].forward(MicroBatch(0, 1)).data
    )
    lead.close()


class Hits(nn.Module):
    """Each forward changes what the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.register_buffer("hits", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hits += 1
        return self.linear(x) * self.hits  # type: ignore[no-any-return]


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 5), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x)  # type: ignore[no-any-return]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.norm(x)))  # type: ignore[no-any-return]


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 5, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding((x[:, 0] > 0).long())  # type: ignore[no-any-return]


class Aside(nn.Module):
    """Reaches its weight in another way than by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.aside = [self.linear.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.aside[0].T


REFUSED = {
    "hits": (Hits(), "each forward pass changes 'hits', which the next one may read"),
    "spectral norm": (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), "each forward pass changes 'parametri"),
    "attribute": (Counts(), "each forward pass changes 'calls'"),
    "twice": (Twice(), "one forward pass uses 'norm' more than once, with running averages"),
    "sparse": (Embedded(), "the gradients of 'embedding.weight' are sparse"),
    "aside": (Aside(), "in another way than by name"),
}


@pytest.mark.parametrize(("model", "complaint"), REFUSED.values(), ids=REFUSED)
def test_a_model_whose_micro_batches_depend_on_each_other_is_refused(model: nn.Module, complaint: str) -> None:
    stage = made(left=model, optimizer={"name": "sgd", "lr": 0.1}).stages().bases["left"]
    before = {name: tensor.clone() for name, tensor in stage.module.state_dict().items()}
    with pytest.raises(JobError, match="cannot be computed apart") as raised:
        separate(stage)
    assert complaint in str(raised.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in stage.module.state_dict().items())

"""A lead that crashes at each operation of a commit while hands are at work: the weights are those of a plain run."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from torch import nn

from sl_queue.loops.lead import Lead
from sl_queue.protocol.schedule.pipeline import Pipeline
from sl_queue.transport.party_channel import PartyChannel
from tests.support.hands import Crew, spread
from tests.support.split import Concatenated, Parties, parties
from tests.support.toy_run import CrashAt, ToyRun

ROWS = 30
COMMIT = ("save", "acknowledge", "history", "write_final")  # operations of a commit, and of the end


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 4))


def made() -> Parties:
    chance = np.random.default_rng(0)
    features = {party: chance.standard_normal((ROWS, 3)).astype(np.float32) for party in ("a", "b", "label")}
    fuse = nn.Sequential(Concatenated(12, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 1))
    return parties(
        {party: base() for party in features},
        fuse,
        features,
        (features["a"][:, 0] > 0).astype(np.int64),
        cuts={party: [4] for party in features},
        label_holder="label",
        optimizer={"name": "adam", "lr": 0.02},
        batch_size=8,
        holdout=0.2,
        pipeline={"micro_batches": 2, "depth": 2, "checkpoint_every": 2},
    )


@dataclass(slots=True)
class Run(ToyRun):
    """A run over torch, in which `led` has hands that outlive it."""

    of: Parties = field(kw_only=True)
    n_rows: int = ROWS
    patience_s: float = 10.0
    led: str = ""
    leads: list[Lead] = field(default_factory=list)
    crew: Crew | None = None

    @property
    def pipeline(self) -> Pipeline:
        return self.of.pipeline

    def build(self, party: str) -> Any:
        stages = self.of.stages()
        stage = stages.fuse if party == "label" else stages.bases[party]
        if party != self.led:
            return stage
        if self.crew is None:
            self.crew = Crew(lambda: self.build_plain(party))
            for _ in range(2):
                self.crew.join()
        for before in self.leads[-1:]:
            before.close(home=False)  # its process is gone, and so is its connection
        self.leads.append(self.crew.lead())
        return spread(stage, self.leads[-1], self.pipeline)

    def build_plain(self, party: str) -> Any:
        stages = self.of.stages()
        return stages.fuse if party == "label" else stages.bases[party]

    def connect(self, stage: Any, role: Any, channel: PartyChannel) -> None:
        if hasattr(stage, "deliver"):
            stage.answer, channel.between = role.answer, stage.deliver

    def finish(self) -> "Run":
        self.stage, self.on_role = self.build, self.connect
        self.of.stages()  # the first optimizer of a process loads half of torch, in more than a patience
        try:
            self.run(timeout_s=60.0)
        finally:
            for lead in self.leads[-1:]:
                lead.close()
            if self.crew is not None:
                self.crew.await_end()
        return self

    def outcome(self) -> dict[str, Any]:
        found = {
            f"{party}/{stem}/{name}": bytes(payload.data)
            for party, weights in self.weights().items()
            for stem, tensors in weights.items()
            for name, payload in tensors.items()
        }
        assert self.state is not None
        return {**found, "history": [(epoch.loss, epoch.holdout) for epoch in self.state.history]}


@pytest.fixture(scope="module")
def of() -> Parties:
    return made()


@pytest.mark.timeout(600)  # some sixty runs
@pytest.mark.parametrize("led", ["a", "label"])
def test_a_lead_that_crashes_at_any_operation_of_a_commit_changes_no_bit(led: str, of: Parties) -> None:
    plain = Run(of=of).finish().outcome()
    quiet = Run(of=of, led=led, crashes={led: CrashAt()}).finish()
    assert quiet.outcome() == plain
    seen = quiet.crashes[led].seen
    operations = [n for n, name in enumerate(seen) if name.split()[-1] in COMMIT]
    assert len(operations) > 20, seen
    for operation in operations:
        run = Run(of=of, led=led, crashes={led: CrashAt(operation)}).finish()
        where = f"{led} at operation {operation}, {seen[operation]}"
        assert len(run.leads) == 2, where
        assert run.outcome() == plain, where
        assert run.state is not None and run.state.generation == 0, f"{where}: somebody was rolled back"
        assert run.broker.dead_letters == [], where

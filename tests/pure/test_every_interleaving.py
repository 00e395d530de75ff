"""Whatever arrives in whatever order, and whoever is killed: every run ends with the same final step."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sl_queue.protocol.control import (
    EpochDone,
    EpochResult,
    Finish,
    Finished,
    Progress,
    Report,
    Stop,
    Stopped,
    StopRequest,
)
from sl_queue.protocol.messages import OPERATOR
from sl_queue.protocol.party.orders import Orders
from sl_queue.protocol.scheduler.state import (
    EarlyStopping,
    Phase,
)
from tests.support.progress import PARTIES, STEPS, Mind, decide, epoch, joined, plan


@dataclass(slots=True)
class Party:
    """Worker, modelled by its reports: joins, commits an epoch at a time, stops or finishes when ordered."""

    name: str
    life: int = 0
    held: tuple[int, ...] = ()
    epochs: tuple[EpochResult, ...] = ()
    orders: Orders = field(default_factory=Orders)
    out: deque[Report] = field(default_factory=deque)
    introduce: bool = True
    final: int | None = None
    ended: bool = False

    @property
    def me(self) -> str:
        return f"{self.name}{self.life}"

    def killed(self) -> None:
        """And started again; what it reported is at the broker."""
        if not self.ended:
            self.life, self.orders, self.introduce = self.life + 1, Orders(), True

    def act(self, losses: Sequence[float], label: "Party") -> None:
        """One thing that a worker of this party would do next."""
        if self.ended:
            return
        stop, start, finish = self.orders.stop, self.orders.start, self.orders.finish
        if self.introduce:
            self.introduce = False
            run = "r" if self.held else None
            self.out.append(joined(self.me, held=self.held, run=run, epochs=self.epochs))
        elif stop is not None and (stop.error or self._reached(stop)):
            self.ended = True
            self.out.append(Stopped(self.me, max(self.held, default=-1)))
        elif start is not None and finish is not None:
            assert finish.step in self.held
            self.final, self.ended = finish.step, True
            self.out.append(Finished(self.me, {}))
        elif self._may_train() and (len(self.held) < len(label.held) or label._may_train()):
            self._commit(losses)

    def _may_train(self) -> bool:
        """Return True if its next epoch is open; gradients come only of what the label holder trains."""
        stop, start, opened = self.orders.stop, self.orders.start, self.orders.open
        if self.ended or self.introduce or start is None or opened is None:
            return False
        return opened.through >= len(self.held) and not (stop is not None and self._reached(stop))

    def _reached(self, stop: Stop) -> bool:
        return stop.after_step is not None and max(self.held, default=-1) >= stop.after_step

    def _commit(self, losses: Sequence[float]) -> None:
        number = len(self.held)
        result = epoch(number, losses[number])
        self.held = (*self.held, result.step)
        if self.name == "label":
            self.epochs = (*self.epochs, result)
            stop = self.orders.stop
            if stop is not None and stop.after_step is None:
                self.orders = replace(self.orders, stop=replace(stop, after_step=result.step))
        self.out.append(Progress(self.me, 0, result.step, self.held))
        if self.name == "label":
            self.out.append(EpochDone(self.me, 0, result))


@dataclass(slots=True)
class World:
    """Parties, a broker that keeps what was said, and a scheduler that is killed between any two things it does."""

    mind: Mind
    losses: Sequence[float]
    parties: dict[str, Party] = field(default_factory=lambda: {name: Party(name) for name in PARTIES})

    def hear(self, party: Party, die: str = "") -> None:
        """Have the scheduler reduce a report, save, order and acknowledge, or be killed on the way."""
        if not party.out or self.mind.state.phase is Phase.STOPPED:
            return  # a scheduler that has stopped hears nothing; its next process will
        self.mind.hear(party.name, party.out[0])
        if die != "before the orders":
            self.deliver()
        if not die:
            party.out.popleft()
        else:
            self.mind.restart()
            self.deliver()
            for other in self.parties.values():
                other.introduce = True

    def deliver(self) -> None:
        committed = {p.name: max(p.held, default=-1) for p in self.parties.values()}
        for name, order in self.mind.orders:
            if isinstance(order, Finish):
                assert len(set(committed.values())) == 1, "a Finish before all have committed"
            party = self.parties[name]
            if order.incarnation == party.me:
                party.orders = party.orders.after(order)

    def settle(self) -> None:
        """Everyone goes on undisturbed until nothing more happens."""
        for _ in range(200):
            before = (self.mind.state, {p.name: replace(p, out=deque(p.out)) for p in self.parties.values()})
            for party in self.parties.values():
                party.act(self.losses, self.parties["label"])
                for _ in range(len(party.out)):
                    self.hear(party)
            if before == (self.mind.state, self.parties):
                return
        raise AssertionError("the run does not come to rest")


moves = st.tuples(
    st.sampled_from(PARTIES), st.sampled_from(["act", "hear", "act", "hear", "kill", "die", "die late", "stop"])
)


@given(st.lists(moves, max_size=60), st.sampled_from([None, 1, 2]), st.lists(st.floats(0, 1), min_size=5, max_size=5))
@settings(max_examples=150, deadline=None)
@example([(party, move) for party in PARTIES for move in ("act", "hear")] + [("a", "stop")], None, [0.0] * 5)
def test_any_interleaving_kills_and_stops_end_with_the_same_final_step(
    story: list[tuple[str, str]], patience: int | None, losses: list[float]
) -> None:
    early = None if patience is None else EarlyStopping("loss", patience, 0.0, lower_is_better=True)
    world = World(Mind(plan(len(losses), early)), losses)
    for name, move in story:
        party = world.parties[name]
        match move:
            case "act":
                party.act(losses, world.parties["label"])
            case "hear":
                world.hear(party)
            case "kill":
                party.killed()
            case "die":
                world.hear(party, "before the orders")
            case "die late":
                world.hear(party, "before the acknowledgement")
            case "stop":
                world.mind.hear(OPERATOR, StopRequest("s"))
                world.deliver()
    world.settle()
    if world.mind.state.phase is Phase.STOPPED:
        unfinished = [p for p in world.parties.values() if p.final is None]
        assert len({max(p.held, default=-1) for p in unfinished}) <= 1, "not all stopped after the same step"
        world.mind.restart()
        for party in unfinished:
            party.ended = False
            party.killed()
        world.settle()
    assert world.mind.state.phase is Phase.FINISHED
    trained, best = (len(losses), len(losses) - 1) if early is None else decide(early, losses)
    assert [r.epoch for r in world.mind.state.history] == list(range(trained))
    assert {p.final for p in world.parties.values()} == {STEPS * (best + 1) - 1}
